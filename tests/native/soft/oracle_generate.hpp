// Random Cases for a row of the instruction table.
#pragma once

#include "oracle_case.hpp"
#include "random.hpp"

namespace pvtest {

/// Makes one case; false when no encoding of the row could be found in this code size.
bool make_case(polyvisor::soft::Op op, polyvisor::soft::CodeSize size,
               const polyvisor::FeatureSet& features, u64 code_address, Random& random, Case& c);

}  // namespace pvtest
