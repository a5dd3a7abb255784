// Guest code that is assembled into a test.
#pragma once

#include <cstddef>
#include <string_view>

// PV_GUEST(name, "assembly") defines std::string_view name() with the machine code. GNU syntax,
// position-independent, 64-bit.
#define PV_GUEST(name, text)                                                              \
    asm(".pushsection .rodata\n" #name "_start:\n" text "\n" #name "_end:\n.popsection"); \
    extern "C" const char name##_start[], name##_end[];                                   \
    static std::string_view name() {                                                      \
        return {name##_start, static_cast<std::size_t>(name##_end - name##_start)};       \
    }
