// A small reproducible random source for tests.
#pragma once

#include <cstdlib>
#include <initializer_list>

#include "base/types.hpp"

namespace pvtest {

class Random {
  public:
    explicit Random(polyvisor::u64 seed) : state_((seed + 1) * 0x9e3779b97f4a7c15) {
        for (int n = 0; n < 4; ++n) next();
    }
    polyvisor::u64 next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_ * 0x2545f4914f6cdd1d;
    }
    /// 0 .. limit-1
    polyvisor::u32 below(polyvisor::u32 limit) {
        return static_cast<polyvisor::u32>((next() >> 32) * limit >> 32);
    }
    polyvisor::s32 between(polyvisor::s32 low, polyvisor::s32 high) {
        return low +
               static_cast<polyvisor::s32>(below(static_cast<polyvisor::u32>(high - low + 1)));
    }
    bool one_in(polyvisor::u32 n) { return below(n) == 0; }
    template <class T>
    T pick(std::initializer_list<T> list) {
        return list.begin()[below(static_cast<polyvisor::u32>(list.size()))];
    }

  private:
    polyvisor::u64 state_;
};

/// An environment variable as a number.
inline polyvisor::u64 environment_number(const char* name, polyvisor::u64 otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

}  // namespace pvtest
