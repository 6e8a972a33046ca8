// A second OpenMP runtime beside PyTorch's would mean two pools of spinning threads on the same cores. GCC's, LLVM's
// and Intel's runtimes all export GOMP_parallel, so the one that PyTorch has loaded is looked up at run time.
#include "parallel.h"

#include <dlfcn.h>

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

}  // namespace sslfast
