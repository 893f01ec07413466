#include "threads.h"

#include <pthread.h>
#include <sched.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <atomic>

namespace fastattn {
namespace {

// libgomp's workers do not survive fork(); starting a parallel region in the child would wait for them for ever.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void parallel_for(int threads, int64_t count, void (*body)(void*, int64_t, int), void* context) {
#if defined(_OPENMP)
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1 && !forked && fork_handler == 0) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
      const int rank = omp_get_thread_num();
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i, rank);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) body(context, i, 0);
}

void wait_until(const int32_t* counter, int32_t value) {
  // With more threads than cores the one waited for may not be running: give way to it before long.
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++spins)
    if (spins > 1000) sched_yield();
}

}  // namespace fastattn
