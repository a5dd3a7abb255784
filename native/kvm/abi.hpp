// <linux/kvm.h> as C++ may use it. Some versions of the kernel's headers (Linux 6.1.y and 6.2 to
// 6.5) declare the array at the end of kvm_cpuid2, kvm_msrs and others next to an empty struct.
// That has no size in C, but one byte in C++: the array is then elsewhere than the kernel has it,
// and even the requests' numbers are others. So include this file, not the kernel's.
#pragma once

#include <linux/stddef.h>

#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[0]

#include <linux/kvm.h>

#include <cstddef>

static_assert(sizeof(kvm_cpuid2) == 8 && offsetof(kvm_cpuid2, entries) == 8 &&
                  offsetof(kvm_coalesced_mmio_ring, coalesced_mmio) == 8,
              "something included <linux/kvm.h> before kvm/abi.hpp");
