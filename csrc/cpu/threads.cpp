#include "threads.h"

#include <sched.h>

#include <atomic>
#include <chrono>
#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace fastattn {
namespace {

#if defined(_OPENMP)

// libgomp's workers do not survive fork(); starting a parallel region in the child would wait for them for ever.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class Body>
void on_threads(int threads, Body body) {
  if (threads == 1 || forked || fork_handler != 0) return body(0);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num());
}

#else

// Started anew for each call: the price of a build without OpenMP, and what ThreadSanitizer can follow.
template <class Body>
void on_threads(int threads, Body body) {
  std::vector<std::thread> others;
  try {
    for (int rank = 1; rank < threads; ++rank) others.emplace_back(body, rank);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  body(0);
  for (std::thread& other : others) other.join();
}

#endif

thread_local Interruption* current = nullptr;

int64_t milliseconds() {
  using namespace std::chrono;
  return duration_cast<std::chrono::milliseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*body)(void*, int64_t, int), void* context) {
  Interruption* const interruption = current;
  if (count <= 0 || (interruption && interruption->happened())) return;
  std::atomic<int64_t> next{0};
  on_threads(threads < count ? threads : static_cast<int>(count), [&](int rank) {
    for (;;) {
      if (rank == 0 && interruption && interruption->ask()) next.store(count, std::memory_order_relaxed);
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      body(context, index, rank);
    }
  });
}

void wait_until(const int32_t* counter, int32_t value) {
  // With more threads than cores the one waited for may not be running: give way to it before long.
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++spins)
    if (spins > 1000) sched_yield();
}

Interruption::Interruption(bool (*wanted)()) : wanted_(wanted), outer_(current), asked_at_(milliseconds()) {
  current = this;
}

Interruption::~Interruption() { current = outer_; }

bool Interruption::ask() {
  const int64_t now = milliseconds();
  if (!happened_ && now >= asked_at_ + 100) {
    asked_at_ = now;
    happened_ = wanted_();
  }
  return happened_;
}

}  // namespace fastattn
