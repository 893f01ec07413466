// Dividing a problem: scratch memory carved from one buffer, loops over threads, and waves of heads.
//
// A wave is a few (batch, kv head) pairs whose packed operands exist at one time. The threads take the wave's work from
// one list, packing first and tiles after it, so memory is bounded however many heads there are, and one head alone
// still keeps every thread busy. Work that needs other work waits for its counter, not for all threads. What a tile
// computes never depends on the wave or on the thread, so results repeat bit for bit on any number of threads.
#pragma once

#include "kernel.h"
#include "simd.h"
#include "threads.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Hands out 64-byte aligned pieces. Run the same calls with a null base first to learn the size.
class Carver {
 public:
  explicit Carver(void* base = nullptr) : address_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(address_);
    address_ += uintptr_t(round_up(count * int64_t(sizeof(T)), 64));
    return piece;
  }
  uintptr_t address() const { return address_; }

 private:
  uintptr_t address_;
};

template <class Body>
inline void for_each(int threads, int64_t count, Body body) {
  parallel_for(
      threads, count, [](void* context, int64_t i, int rank) { (*static_cast<Body*>(context))(i, rank); }, &body);
}

inline void add_one(int32_t* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }

// A thread is worth starting for about this many multiply-adds (some ten microseconds).
constexpr double kWorkPerThread = 1 << 19;

inline int useful_threads(const DenseParams& p) {
  const double work = double(p.batch) * double(p.heads_q) * double(p.seqlen_q) * double(p.seqlen_k) *
                      double(p.head_dim + p.head_dim_v);
  return int(max64(1, min64(p.threads, int64_t(work < 1e18 ? work / kWorkPerThread : 1e18 / kWorkPerThread))));
}

// Heads whose packed operands may exist at one time: one per thread, more while they are small together.
inline int64_t wave_size(int64_t heads, int threads, int64_t bytes_per_head) {
  constexpr int64_t small = 4 << 20;
  return max64(1, min64(heads, max64(threads, small / max64(1, bytes_per_head))));
}

// Where a pass keeps what in DenseParams::scratch: a Head for each head of a wave, then an Own for each thread.
class Layout {
 public:
  // Measures the structs by carving them out of nothing. `alone`: waves of one head.
  template <class Head, class Own, class Pass>
  static Layout of(const Pass& pass, int64_t heads, int threads, bool alone) {
    Layout layout;
    Carver head, own;
    Head(head, pass);
    Own(own, pass);
    layout.head_bytes_ = int64_t(head.address());
    layout.own_bytes_ = int64_t(own.address());
    layout.wave_ = alone ? 1 : wave_size(heads, threads, layout.head_bytes_);
    layout.threads_ = threads;
    return layout;
  }

  int64_t wave() const { return wave_; }
  int64_t bytes() const { return wave_ * head_bytes_ + threads_ * own_bytes_; }
  Carver head(void* scratch, int64_t unit) const { return at(scratch, unit * head_bytes_); }
  Carver own(void* scratch, int rank) const { return at(scratch, wave_ * head_bytes_ + rank * own_bytes_); }

 private:
  static Carver at(void* scratch, int64_t offset) { return Carver(static_cast<char*>(scratch) + offset); }

  int64_t head_bytes_ = 0, own_bytes_ = 0, wave_ = 0, threads_ = 0;
};

// Query heads per kv head.
inline int64_t group_size(const DenseParams& p) { return p.heads_kv > 0 ? p.heads_q / p.heads_kv : 0; }

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
