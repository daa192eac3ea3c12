// Which instruction set's kernels are in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace gptfast {

const Kernels& kernels();                                       // those in use
const std::string& isa();                                       // its name
std::vector<std::string> isas();                                // those this machine can run, the narrowest first
std::vector<std::string> own_kernels(const std::string& name);  // those that the next narrower one hasn't
void use_isa(const std::string& name);                          // throws std::invalid_argument if this machine can't

}  // namespace gptfast
