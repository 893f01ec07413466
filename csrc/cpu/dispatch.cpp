#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastattn {

#define FASTATTN_ISA(name) \
  namespace name {         \
  extern const Kernels kernels; \
  }
FASTATTN_FOR_EACH_ISA
#undef FASTATTN_ISA

namespace {

// Best first, the order of CMake's list.
const Kernels* const compiled[] = {
#define FASTATTN_ISA(name) &name::kernels,
    FASTATTN_FOR_EACH_ISA
#undef FASTATTN_ISA
};

bool runs_here([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (isa == "v3") return v3;
  if (isa == "v4") return v4;
#if defined(FASTATTN_EMULATE_BF16_DOT)
  if (isa == "v4_bf16") return v4;
#else
  if (isa == "v4_bf16") return v4 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return true;  // baseline, neon: what the compiler targets anyway
}

std::string join(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

const Kernels& find(const std::string& name, const std::string& who) {
  for (const Kernels* k : compiled) {
    if (name != k->isa) continue;
    if (runs_here(name)) return *k;
    throw std::invalid_argument(who + ": this CPU cannot run '" + name + "'; it can run: " + join(runnable_isas()));
  }
  throw std::invalid_argument(who + ": no instruction set called '" + name +
                              "' in this build; compiled are: " + join(compiled_isas()));
}

const Kernels& choose() {
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  if (wanted && *wanted) return find(wanted, "FASTATTN_CPU_ISA");
  return find(runnable_isas().front(), "cpu kernels");
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : compiled) names.push_back(k->isa);
  return names;
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : compiled)
    if (runs_here(k->isa)) names.push_back(k->isa);
  return names;
}

void set_isa(const std::string& name) { in_use = &find(name, "set_cpu_isa"); }

const Kernels& kernels_in_use() {
  const Kernels* k = in_use.load(std::memory_order_relaxed);
  if (!k) in_use = k = &choose();
  return *k;
}

}  // namespace fastattn
