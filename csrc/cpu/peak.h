// What this machine can do at best, to state the kernels' speed as a fraction of it.
#pragma once

#include <cstdint>

#include "../dense_params.h"

namespace fastattn {

// GFLOP/s of multiply-adds in the kernels' own register tile, fed from L1; 0 if the set in use has none.
double fma_peak(int threads, Dtype dtype);
// GB/s of reading `bytes` bytes once, divided among the threads.
double read_bandwidth(const void* memory, int64_t bytes, int threads);

}  // namespace fastattn
