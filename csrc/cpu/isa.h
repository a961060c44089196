// Which instruction-set level serves, and how it is lowered.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace ppok {

std::vector<std::string> supported_isas();  // built in and runnable on this processor, lowest first
const KernelTable& active();
void set_isa(
    const std::string& name);  // throws std::invalid_argument for a level that cannot run here
bool is_intel();               // the maker of the processor

}  // namespace ppok
