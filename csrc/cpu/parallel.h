// Fork-join on the thread pool that PyTorch already runs, without linking against any OpenMP of our own.
#pragma once
#include <cstdint>

namespace sslfast {

// Runs body(data, part) once for each part in [0, parts), the parts on different threads where a pool was found.
void parallel(int parts, void (*body)(void*, int), void* data);

// True when the process has an OpenMP runtime (PyTorch's own) whose pool is used; otherwise threads are started per
// call.
bool shares_openmp_pool();

// For a large array that is about to be written for the first time: asks the kernel for 2 MiB pages, since zeroing and
// mapping 4 KiB ones takes longer than writing them.
void expect_writes(void* data, int64_t bytes);

namespace {  // each translation unit has its own copy, compiled for its own instruction set

constexpr int64_t kMinWorkPerThread = 16384;  // elements; below this a thread costs more than it saves

inline int parts_for(int64_t rows, int64_t work, int threads) {
  int64_t parts = work / kMinWorkPerThread;
  if (parts > threads) parts = threads;
  if (parts > rows) parts = rows;
  return parts < 1 ? 1 : static_cast<int>(parts);
}

// Splits [0, rows) evenly and calls f(part, begin, end) for each part. The split depends on sizes and thread count
// only.
template <class F>
void parallel_rows(int64_t rows, int parts, const F& f) {
  struct Job {
    const F* f;
    int64_t rows;
    int parts;
  } job{&f, rows, parts};
  parallel(
      parts,
      [](void* data, int part) {
        const Job& j = *static_cast<Job*>(data);
        (*j.f)(part, j.rows* part / j.parts, j.rows * (part + 1) / j.parts);
      },
      &job);
}

}  // namespace
}  // namespace sslfast
