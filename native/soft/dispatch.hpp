#pragma once

#include <string_view>
#include <vector>

#include "soft/bindings.hpp"

namespace polyvisor::soft {

/// The generic operation of a row; nullptr when no file binds one (a test sees to it that none is).
Operation operation_of(Op op);

/// Rows bound more than once or not at all, for that test.
std::vector<std::string_view> wrongly_bound_rows();

}  // namespace polyvisor::soft
