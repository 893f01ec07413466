// The parts of the core's tests; main.cpp runs them. units.cpp has one more, once per instruction set.
#pragma once

#include <cstdint>

namespace fastattn {
namespace tests {

void test_threads();

// `problems` random problems on each of the instruction sets that run here.
void test_append(uint64_t seed, int problems);
void test_linear(uint64_t seed, int problems);
void test_sweep(uint64_t seed, int problems);

}  // namespace tests
}  // namespace fastattn
