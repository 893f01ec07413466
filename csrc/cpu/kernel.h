// What every instruction set's translation unit offers to the rest of the module.
#pragma once

#include "../dense_params.h"

namespace fastattn {

enum class Status { kOk, kNoMemory };

struct Kernels {
  const char* isa;
  Status (*dense_forward)(const DenseParams&);
  Status (*dense_backward)(const DenseParams&);

  // Does `steps` rounds of independent multiply-adds in registers only; returns the floating-point operations done,
  // 0 if this unit has no arithmetic of that dtype.
  double (*multiply_add_rounds)(Dtype, int64_t steps);
  // Reads every byte once, at full vector width.
  uint64_t (*read_memory)(const void* memory, int64_t bytes);
};

}  // namespace fastattn
