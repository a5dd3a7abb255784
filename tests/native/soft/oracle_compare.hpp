// What must be equal between the host's CPU and the interpreter, and the few things that need not
// be.
#pragma once

#include <string>
#include <vector>

#include "oracle_case.hpp"

namespace pvtest {

/// Empty when the outcomes agree, else one line for each difference ("rax: 1, host 2").
std::vector<std::string> compare(const Case& c, const Outcome& ours, const Outcome& host);

/// The registers and memory that a case starts with, for failure messages.
std::string describe(const Case& c);

}  // namespace pvtest
