// Which instruction set's kernels run. The best that was compiled and that this CPU has, unless FASTATTN_CPU_ISA or
// set_isa() asks for a lower one; asking for one that cannot run here is an error, never a silent fallback.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace fastattn {

// Names of the compiled sets that this CPU can run, best first.
std::vector<std::string> runnable_isas();
// Names of all compiled sets, best first.
std::vector<std::string> compiled_isas();
// Throws std::invalid_argument for a name that is unknown, not compiled or not runnable here.
void set_isa(const std::string& name);
const Kernels& kernels_in_use();

}  // namespace fastattn
