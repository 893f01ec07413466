// What every instruction set's translation unit offers to the rest of the module.
#pragma once

#include "../dense_params.h"

namespace fastattn {

constexpr int kMaxHeadDim = 256;

enum class Status { kOk, kNoMemory };

struct Kernels {
  const char* isa;
  Status (*dense_forward)(const DenseParams&);
  Status (*dense_backward)(const DenseParams&);

  // Does `steps` steps of one register tile on operands that stay in L1; returns the floating-point operations done,
  // 0 if this unit has no arithmetic of that dtype.
  double (*multiply_add_steps)(Dtype, int64_t steps);
  // Reads every byte once, at full vector width.
  uint64_t (*read_memory)(const void* memory, int64_t bytes);
};

}  // namespace fastattn
