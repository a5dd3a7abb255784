// What a host's hypervisor counts of a guest, as it describes it itself.
#pragma once

#include <string>
#include <vector>

#include "base/types.hpp"

namespace polyvisor {

/// One statistic. A value v means v * base^exponent units.
struct Statistic {
    enum class Kind : u8 { kCumulative, kInstant, kPeak, kLinearHistogram, kLogHistogram, kOther };
    enum class Unit : u8 { kNone, kBytes, kSeconds, kCycles, kBoolean, kOther };

    std::string name;
    Kind kind = Kind::kCumulative;
    Unit unit = Unit::kNone;
    u8 base = 10;  ///< 10 or 2
    s16 exponent = 0;
    /// kLinearHistogram: width of a bucket; the last bucket has everything beyond.
    u32 bucket_size = 0;
    /// One value, or one per bucket. Bucket n of kLogHistogram: [2^(n-1), 2^n), bucket 0: [0, 1);
    /// the last has everything beyond.
    std::vector<u64> values;

    bool histogram() const { return kind == Kind::kLinearHistogram || kind == Kind::kLogHistogram; }
};

/// "cumulative", "linear_histogram", ...; "other" for a kind that this version does not know.
const char* to_string(Statistic::Kind kind);
/// "none", "bytes", "seconds", ...
const char* to_string(Statistic::Unit unit);

}  // namespace polyvisor
