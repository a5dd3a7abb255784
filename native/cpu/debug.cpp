#include "cpu/debug.hpp"

#include <cinttypes>
#include <cstdio>

#include "base/error.hpp"

namespace polyvisor {

void validate(const GuestDebug& debug) {
    using Kind = GuestDebug::Breakpoint::Kind;
    if (debug.hardware.size() > kDebugRegisters) {
        throw ConfigError("hardware", "a CPU has " + std::to_string(kDebugRegisters) +
                                          " hardware breakpoints, not " +
                                          std::to_string(debug.hardware.size()) +
                                          "; remove some, or take software breakpoints");
    }
    for (const auto& breakpoint : debug.hardware) {
        unsigned size = breakpoint.size;
        if (breakpoint.kind == Kind::kExecute ? size != 1
                                              : size != 1 && size != 2 && size != 4 && size != 8) {
            throw ConfigError("size", "a hardware breakpoint cannot watch " + std::to_string(size) +
                                          " bytes; choose 1, 2, 4 or 8 for data, 1 for code");
        }
        if (breakpoint.address & (size - 1)) {
            char text[96];
            std::snprintf(text, sizeof text,
                          "a watchpoint of %u bytes must be aligned to them; %#" PRIx64 " is not",
                          size, breakpoint.address);
            throw ConfigError("address", text);
        }
    }
}

u32 dr7_bits(unsigned n, const GuestDebug::Breakpoint& breakpoint) {
    using Kind = GuestDebug::Breakpoint::Kind;
    u32 condition = breakpoint.kind == Kind::kExecute ? 0 : breakpoint.kind == Kind::kWrite ? 1 : 3;
    // 1, 2, 4, 8 bytes are 0, 1, 3, 2.
    u32 length = breakpoint.size == 8 ? 2 : breakpoint.size - 1u;
    return 2u << (2 * n) | (condition | length << 2) << (16 + 4 * n);
}

}  // namespace polyvisor
