// What the core's tests share: checks that are counted, and random numbers. Defined in main.cpp, and free of standard
// C++ headers: units.cpp is compiled once per instruction set, and nothing of it may be shared between them.
#pragma once

#include <stdint.h>

namespace fastattn {
namespace tests {

// Prints the first failures; the program's exit status counts them all.
[[gnu::format(printf, 4, 5)]] void fail(const char* file, int line, const char* condition, const char* format, ...);

#define CHECK(condition, ...)                                                                     \
  do {                                                                                            \
    if (!(condition)) ::fastattn::tests::fail(__FILE__, __LINE__, #condition, __VA_ARGS__); \
  } while (0)

// splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits();
  int64_t integer(int64_t low, int64_t high);  // both ends included
  double uniform();                            // in [0, 1)
  double normal();                             // near enough: mean 0, variance 1
  bool chance(double probability) { return uniform() < probability; }

 private:
  uint64_t state_;
};

}  // namespace tests
}  // namespace fastattn
