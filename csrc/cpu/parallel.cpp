// A second OpenMP runtime beside PyTorch's would mean two pools of spinning threads on the same cores. GCC's, LLVM's
// and Intel's runtimes all export GOMP_parallel, so the one that PyTorch has loaded is looked up at run time.
#include "parallel.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <thread>
#include <vector>

namespace sslfast {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetInt = int (*)();

struct OpenMP {
  GompParallel run = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  GetInt thread_num = reinterpret_cast<GetInt>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  GetInt num_threads = reinterpret_cast<GetInt>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  bool found() const { return run && thread_num && num_threads; }
};

const OpenMP& openmp() {
  static const OpenMP found;
  return found;
}

struct Team {
  int parts;
  void (*body)(void*, int);
  void* data;
};

void on_openmp_thread(void* data) {
  const Team& team = *static_cast<Team*>(data);
  // The runtime may give fewer threads than asked for (nested regions, limits); every part still runs once.
  const int step = openmp().num_threads();
  for (int part = openmp().thread_num(); part < team.parts; part += step) team.body(team.data, part);
}

}  // namespace

bool shares_openmp_pool() { return openmp().found(); }

void parallel(int parts, void (*body)(void*, int), void* data) {
  if (parts <= 1) {
    if (parts == 1) body(data, 0);
    return;
  }
  if (openmp().found()) {
    Team team{parts, body, data};
    openmp().run(on_openmp_thread, &team, static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> threads;
  int part = 1;
  try {
    for (; part < parts; ++part) threads.emplace_back(body, data, part);
  } catch (...) {  // no more threads to be had: what is left runs here
  }
  for (; part < parts; ++part) body(data, part);
  body(data, 0);
  for (std::thread& thread : threads) thread.join();
}

void expect_writes(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kOwnMapping = 32 << 20;  // glibc maps a larger array by itself, and unmaps it when it is freed
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kOwnMapping) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace sslfast
