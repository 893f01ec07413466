#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "dispatch.h"
#include "threads.h"

namespace fastattn {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The shortest of a few runs of body(i), i in [0, threads), all at once.
template <class Body>
double best_time(int threads, Body body) {
  double best = 1e300;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double start = seconds();
    parallel_for(
        threads, threads, [](void* context, int64_t i, int) { (*static_cast<Body*>(context))(i); }, &body);
    best = std::min(best, seconds() - start);
  }
  return best;
}

}  // namespace

double fma_peak(int threads, Dtype dtype) {
  constexpr int64_t steps = 2'000'000;  // some ten milliseconds
  const Kernels& kernels = kernels_in_use();
  const double operations = kernels.multiply_add_steps(dtype, 1);
  if (operations == 0) return 0;
  const double time = best_time(threads, [&](int64_t) { kernels.multiply_add_steps(dtype, steps); });
  return operations * double(steps) * threads / time * 1e-9;
}

double read_bandwidth(const void* memory, int64_t bytes, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t share = bytes / threads / 64 * 64;
  static std::atomic<uint64_t> sink;  // the sum must be used, or the reading may be dropped
  const double time = best_time(
      threads, [&](int64_t i) { sink = kernels.read_memory(static_cast<const char*>(memory) + i * share, share); });
  return double(share) * threads / time * 1e-9;
}

}  // namespace fastattn
