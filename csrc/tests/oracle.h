// What the kernels should compute: the formulas of fastattn.attention's documentation, key by key in double,
// without any of the kernels' code but the reading of 16-bit numbers.
#pragma once

#include <vector>

#include "../dense_params.h"

namespace fastattn {
namespace tests {

double read(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t i, int64_t j);
void write(const View& view, Dtype dtype, int64_t b, int64_t h, int64_t i, int64_t j, double x);

// Whether query i of sequence b may see key j, by position; masks aside.
bool in_reach(const DenseParams& p, int64_t b, int64_t i, int64_t j);

// Row-major over the longest sequences. grad_mask is laid out as p.grad_mask is.
struct Answer {
  std::vector<double> out, lse, grad_query, grad_key, grad_value, grad_sinks, grad_mask;
};

// Gradients too if p.grad_out is there; `mask_size` elements of grad_mask.
Answer oracle(const DenseParams& p, int64_t mask_size);

}  // namespace tests
}  // namespace fastattn
