// The kernels' view of threads. The definitions are compiled once, for the baseline instruction set.
#pragma once

#include <stdint.h>

namespace fastattn {

// Calls body(context, index, rank) for every index in [0, count), on at most `threads` threads of ranks 0, 1, ...; rank
// 0 is the caller. Indices are handed out in ascending order, one at a time: whoever runs index i may wait for work on
// an index below i, because that has been started. In a child of fork(), whose OpenMP workers are gone, everything runs
// on one thread.
void parallel_for(int threads, int64_t count, void (*body)(void* context, int64_t index, int rank), void* context);

// Blocks until *counter has reached value.
void wait_until(const int32_t* counter, int32_t value);

// While one lives, each parallel_for of its thread asks `wanted` some ten times a second whether to give up. After a yes
// the indices not yet handed out are dropped, there and in every later parallel_for: what a kernel leaves is unfinished.
class Interruption {
 public:
  explicit Interruption(bool (*wanted)());
  ~Interruption();
  Interruption(const Interruption&) = delete;
  Interruption& operator=(const Interruption&) = delete;

  bool happened() const { return happened_; }
  bool ask();

 private:
  bool (*const wanted_)();
  Interruption* const outer_;
  int64_t asked_at_;
  bool happened_ = false;
};

}  // namespace fastattn
