// Guest addresses as types: a virtual (linear) address cannot be passed where a physical one is
// meant.
#pragma once

#include <compare>

#include "base/types.hpp"

namespace polyvisor {

/// A guest-physical address.
struct Gpa {
    u64 value = 0;
    constexpr Gpa() = default;
    constexpr explicit Gpa(u64 value) : value(value) {}
    constexpr auto operator<=>(const Gpa&) const = default;
    constexpr Gpa operator+(u64 offset) const { return Gpa(value + offset); }
    constexpr u64 page() const { return value >> kPageShift; }
};

/// A guest-virtual, that is linear, address.
struct Gva {
    u64 value = 0;
    constexpr Gva() = default;
    constexpr explicit Gva(u64 value) : value(value) {}
    constexpr auto operator<=>(const Gva&) const = default;
    constexpr Gva operator+(u64 offset) const { return Gva(value + offset); }
};

}  // namespace polyvisor
