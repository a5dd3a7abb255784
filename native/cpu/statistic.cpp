#include "cpu/statistic.hpp"

namespace polyvisor {

const char* to_string(Statistic::Kind kind) {
    switch (kind) {
        case Statistic::Kind::kCumulative:
            return "cumulative";
        case Statistic::Kind::kInstant:
            return "instant";
        case Statistic::Kind::kPeak:
            return "peak";
        case Statistic::Kind::kLinearHistogram:
            return "linear_histogram";
        case Statistic::Kind::kLogHistogram:
            return "log_histogram";
        case Statistic::Kind::kOther:
            break;
    }
    return "other";
}

const char* to_string(Statistic::Unit unit) {
    switch (unit) {
        case Statistic::Unit::kNone:
            return "none";
        case Statistic::Unit::kBytes:
            return "bytes";
        case Statistic::Unit::kSeconds:
            return "seconds";
        case Statistic::Unit::kCycles:
            return "cycles";
        case Statistic::Unit::kBoolean:
            return "boolean";
        case Statistic::Unit::kOther:
            break;
    }
    return "other";
}

}  // namespace polyvisor
