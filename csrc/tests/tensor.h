// Memory of the sweep's tensors: an allocation of its own each, that ends with the last element, so that a sanitizer sees
// any step outside, and full of NaN, so that reading what nobody wrote is seen.
#pragma once

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "check.h"
#include "oracle.h"

namespace fastattn {
namespace tests {

inline size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kBool ? 1 : 2;
}

struct Freeing {
  void operator()(void* memory) const { std::free(memory); }
};

// Bytes of 0xff: NaN in every floating-point dtype.
inline std::unique_ptr<void, Freeing> poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes > 0 ? bytes : 1) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  return std::unique_ptr<void, Freeing>(memory);
}

// A (batch, head, row, column) tensor in memory of some order, with gaps, that starts anywhere.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Random& random, Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
         const int32_t* first_row = nullptr)
      : dtype_(dtype), sizes_{batch, heads, rows, columns} {
    const int64_t gap = random.chance(0.5) ? random.integer(1, 5) : 0;
    const int64_t start = random.chance(0.5) ? random.integer(1, 9) : 0;
    const int64_t physical_batch = first_row ? 1 : batch, physical_rows = first_row ? first_row[batch] : rows;
    const bool heads_outside = random.chance(0.5);
    view.stride[3] = 1;
    view.stride[2] = heads_outside ? columns + gap : heads * (columns + gap);
    view.stride[1] = heads_outside ? physical_rows * (columns + gap) : columns + gap;
    view.stride[0] = first_row ? 0 : physical_rows * heads * (columns + gap);
    view.first_row = first_row;
    int64_t last = start - 1;
    if (physical_batch > 0 && heads > 0 && physical_rows > 0)
      last += (physical_batch - 1) * view.stride[0] + (heads - 1) * view.stride[1] +
              (physical_rows - 1) * view.stride[2] + columns;
    count_ = size_t(last + 1);
    memory_ = poisoned(count_ * bytes_of(dtype));
    view.data = static_cast<char*>(memory_.get()) + size_t(start) * bytes_of(dtype);
  }

  template <class Value>
  void fill(Value value) {
    for_each_element([&](int64_t b, int64_t h, int64_t i, int64_t j) { write(view, dtype_, b, h, i, j, value()); });
  }
  void poison_row(int64_t b, int64_t h, int64_t i) {
    for (int64_t j = 0; j < sizes_[3]; ++j) write(view, dtype_, b, h, i, j, std::nan(""));
  }
  template <class Use>
  void for_each_element(Use use) const {
    for (int64_t b = 0; b < sizes_[0]; ++b)
      for (int64_t h = 0; h < sizes_[1]; ++h)
        for (int64_t i = 0; i < rows_of(view, b, sizes_[2]); ++i)
          for (int64_t j = 0; j < sizes_[3]; ++j) use(b, h, i, j);
  }
  // Elements that still hold 0xff in every byte, and all of them.
  size_t untouched() const {
    size_t n = 0;
    const unsigned char* byte = static_cast<const unsigned char*>(memory_.get());
    for (size_t k = 0; k < count_; ++k) {
      bool all = true;
      for (size_t c = 0; c < bytes_of(dtype_); ++c) all &= byte[k * bytes_of(dtype_) + c] == 0xff;
      n += all;
    }
    return n;
  }
  // Strides of as many elements without gaps.
  std::array<int64_t, 4> dense() const {
    return {sizes_[1] * sizes_[2] * sizes_[3], sizes_[2] * sizes_[3], sizes_[3], 1};
  }
  size_t size() const { return count_; }
  size_t elements() const {
    size_t n = 0;
    for_each_element([&](int64_t, int64_t, int64_t, int64_t) { ++n; });
    return n;
  }
  std::string bits() const { return std::string(static_cast<const char*>(memory_.get()), count_ * bytes_of(dtype_)); }

  View view;

 private:
  Dtype dtype_ = Dtype::kFloat32;
  int64_t sizes_[4] = {0, 0, 0, 0};
  size_t count_ = 0;
  std::unique_ptr<void, Freeing> memory_;
};

}  // namespace tests
}  // namespace fastattn
