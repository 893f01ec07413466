// What every instruction set's translation unit offers to the rest of the module.
#pragma once

#include "../append_params.h"
#include "../dense_params.h"
#include "../linear_params.h"

namespace fastattn {

constexpr int kMaxHeadDim = 256;

struct Kernels {
  const char* isa;
  void (*dense_forward)(const DenseParams&);
  void (*dense_backward)(const DenseParams&);
  // Bytes of working memory that the kernels need at DenseParams::scratch.
  int64_t (*dense_forward_scratch)(const DenseParams&);
  int64_t (*dense_backward_scratch)(const DenseParams&);

  void (*append)(const AppendParams&);

  void (*linear_forward)(const LinearParams&);
  void (*linear_backward)(const LinearParams&);
  // Bytes of working memory that the kernels need at LinearParams::scratch.
  int64_t (*linear_forward_scratch)(const LinearParams&);
  int64_t (*linear_backward_scratch)(const LinearParams&);

  // Does `steps` steps of one register tile on operands that stay in L1; returns the floating-point operations done,
  // 0 if this unit has no arithmetic of that dtype.
  double (*multiply_add_steps)(Dtype, int64_t steps);
  // Reads every byte once, at full vector width.
  uint64_t (*read_memory)(const void* memory, int64_t bytes);
};

}  // namespace fastattn
