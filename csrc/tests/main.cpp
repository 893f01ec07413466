// The core's own tests, without Python and torch:  core_tests [problems] [seed]
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <stdexcept>

#include "../cpu/dispatch.h"
#include "check.h"
#include "tests.h"

namespace fastattn {

#define FASTATTN_ISA(name)        \
  namespace name {                \
  void test_units(uint64_t seed); \
  }
FASTATTN_FOR_EACH_ISA
#undef FASTATTN_ISA

namespace tests {
namespace {

std::atomic<int> failures{0};

void test_units(uint64_t seed) {
  for (const std::string& isa : runnable_isas()) {
#define FASTATTN_ISA(name) \
  if (isa == #name) name::test_units(seed);
    FASTATTN_FOR_EACH_ISA
#undef FASTATTN_ISA
  }
}

void test_dispatch() {
  for (const char* name : {"", "v9"}) {
    bool refused = false;
    try {
      set_isa(name);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, "'%s' must be refused", name);
  }
  for (const std::string& isa : runnable_isas()) {
    set_isa(isa);
    CHECK(isa == kernels_in_use().isa, "%s", isa.c_str());
  }
}

}  // namespace

void fail(const char* file, int line, const char* condition, const char* format, ...) {
  if (++failures > 20) return;
  std::fprintf(stderr, "%s:%d: not true: %s\n    ", file, line, condition);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
}

uint64_t Random::bits() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int64_t Random::integer(int64_t low, int64_t high) { return low + int64_t(bits() % uint64_t(high - low + 1)); }

double Random::uniform() { return double(bits() >> 11) / 9007199254740992.0; }

double Random::normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

}  // namespace tests
}  // namespace fastattn

int main(int count, char** arguments) {
  using namespace fastattn::tests;
  const int problems = count > 1 ? std::atoi(arguments[1]) : 200;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : uint64_t(std::time(nullptr));
  std::printf("seed %llu\n", (unsigned long long)seed);
  test_dispatch();
  test_units(seed);
  test_threads();
  test_append(seed, problems);
  test_linear(seed, problems);
  test_sweep(seed, problems);
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", int(failures));
  return failures > 0;
}
