// Shared by the three files that make up the local APIC; not for others.
#pragma once

#include <bit>

#include "irqchip/lapic.hpp"

namespace polyvisor::irqchip {

// IA32_APIC_BASE.
inline constexpr u64 kBaseBsp = bit(8), kBaseX2apic = bit(10), kBaseEnable = bit(11);
// Local vector table entries.
inline constexpr u32 kLvtDelivStatus = 1u << 12, kLvtPolarity = 1u << 13, kLvtRemoteIrr = 1u << 14,
                     kLvtLevel = 1u << 15, kLvtMasked = 1u << 16;
// Spurious vector register: vector, enable, focus checking (no effect), suppress EOI broadcasts.
inline constexpr u32 kSvrSuppressEoi = 1u << 12, kSvrWritable = 0x13ff;
// Error status register (SDM 3A 11.5.3).
inline constexpr u32 kErrorSendVector = 1u << 5, kErrorReceiveVector = 1u << 6,
                     kErrorRegister = 1u << 7;
// Lapic::deliverable_.
inline constexpr u32 kDeliverFixed = 0x100, kDeliverExtInt = 0x200;

enum class Shorthand : u8 { kNone, kSelf, kAll, kOthers };

struct Lapic::Outcome {
    bool interrupt = false, nmi = false, smi = false, init = false;
    int sipi = -1;
    int eoi = -1;
    u32 errors = 0;
    bool send = false;  // an IPI: `message` to `shorthand`
    Shorthand shorthand = Shorthand::kNone;
    ApicMessage message;
    u32 broadcast = 0xff;
};

inline void set_bit(u32 (&bits)[8], u8 n) {
    bits[n / 32] |= 1u << (n % 32);
}
inline void clear_bit(u32 (&bits)[8], u8 n) {
    bits[n / 32] &= ~(1u << (n % 32));
}
inline bool test_bit(const u32 (&bits)[8], u8 n) {
    return bits[n / 32] >> (n % 32) & 1;
}
inline int highest_bit(const u32 (&bits)[8]) {
    for (int word = 7; word >= 0; --word) {
        if (bits[word] != 0) return word * 32 + 31 - std::countl_zero(bits[word]);
    }
    return -1;
}

inline DeliveryMode mode_of(u32 lvt) {
    return static_cast<DeliveryMode>(lvt >> 8 & 7);
}

inline u64 base_address_mask(u8 physical_bits) {
    return (bit(physical_bits) - 1) & ~kPageMask;
}

}  // namespace polyvisor::irqchip
