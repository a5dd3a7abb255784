// The whole native test framework: CHECK(condition), CHECK_EQ(got, want), and PV_TEST_MAIN.
// A failure prints where, what was got and what was wanted, and the program exits with 1 at the
// end.
#pragma once

#include <atomic>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>

namespace pvtest {

inline std::atomic<int> failures = 0;  // threads check, too
inline std::atomic<int> checks = 0;

template <class T>
std::string show(const T& value) {
    std::ostringstream out;
    if constexpr (std::is_enum_v<T>) {
        out << static_cast<long long>(value);
    } else if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
        out << std::hex << std::showbase << +value;
    } else {
        out << value;
    }
    return out.str();
}

inline void fail(const char* file, int line, const std::string& what) {
    if (++failures <= 50) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

inline int finish(const char* name) {
    std::fprintf(stderr, "%s: %d checks, %d failed\n", name, checks.load(), failures.load());
    return failures == 0 ? 0 : 1;
}

}  // namespace pvtest

#define CHECK(condition)                                                             \
    do {                                                                             \
        ++pvtest::checks;                                                            \
        if (!(condition)) pvtest::fail(__FILE__, __LINE__, "CHECK(" #condition ")"); \
    } while (0)

#define CHECK_EQ(got, want)                                                                       \
    do {                                                                                          \
        ++pvtest::checks;                                                                         \
        auto got_ = (got);                                                                        \
        auto want_ = (want);                                                                      \
        if (!(got_ == want_))                                                                     \
            pvtest::fail(                                                                         \
                __FILE__, __LINE__,                                                               \
                std::string(#got " is ") + pvtest::show(got_) + ", want " + pvtest::show(want_)); \
    } while (0)

#define CHECK_THROWS(expression, Type)                                                       \
    do {                                                                                     \
        ++pvtest::checks;                                                                    \
        bool thrown_ = false;                                                                \
        try {                                                                                \
            (void)(expression);                                                              \
        } catch (const Type&) {                                                              \
            thrown_ = true;                                                                  \
        }                                                                                    \
        if (!thrown_) pvtest::fail(__FILE__, __LINE__, #expression " did not throw " #Type); \
    } while (0)
