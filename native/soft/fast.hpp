// Building blocks of the specialised handlers (fast_*.cpp): the forms that make up nearly all of
// what compiled code executes, in flat modes. Everything else, and every access that misses the
// soft TLB for good, goes through the generic Operation of the row.
//
// A handler keeps to two arguments and makes no call on its hot path, so that the compiler needs no
// stack frame for it: what is not hot is a tail call to run_slowly().
#pragma once

#include "soft/leave.hpp"
#include "soft/translate.hpp"

namespace polyvisor::soft {

/// How a memory operand's linear address is computed.
enum AddressKind : u8 {
    kAddressBase,   ///< 64-bit: base + disp
    kAddressIndex,  ///< 64-bit: base + (index << scale) + disp
    kAddressSeg,    ///< the same + FS or GS base
    kAddress32,     ///< flat 32-bit: the same, wrapped to 32 bits
    kAddressKinds
};

/// The access of `size` bytes at `linear` missed the TLB: fill it and run the uop again, or do the
/// whole instruction generically (MMIO, page crossing, code pages), or deliver the fault.
[[gnu::noinline, gnu::cold]] const Uop* run_slowly(const Uop* u, VcpuFrame* f, u64 linear,
                                                   bool write);
/// Just the generic operation.
[[gnu::noinline, gnu::cold]] const Uop* run_generic(const Uop* u, VcpuFrame* f);

#define PV_INLINE [[gnu::always_inline]] inline

template <AddressKind K>
PV_INLINE u64 address_of(const Uop* u, VcpuFrame* f) {
    u64 address = gpr_at<u64>(f, u->base) + u->disp;
    if constexpr (K != kAddressBase) address += gpr_at<u64>(f, u->index) << u->scale;
    if constexpr (K == kAddressSeg) address += f->seg[u->seg].base;
    if constexpr (K == kAddress32) address = static_cast<u32>(address);
    return address;
}

/// Sets `at` to the host address of a T at `linear`; false when the TLB does not have it.
template <class T>
PV_INLINE bool readable(VcpuFrame* f, u64 linear, T*& at) {
    const Tlb* tlb = f->tlb_now;
    u64 n = (linear >> 12) & 255;
    if (PV_UNLIKELY(linear + tlb->neg_r[n] > 4096 - sizeof(T))) return false;
    at = reinterpret_cast<T*>(linear + tlb->addend[n]);
    return true;
}
template <class T>
PV_INLINE bool writable(VcpuFrame* f, u64 linear, T*& at) {
    const Tlb* tlb = f->tlb_now;
    u64 n = (linear >> 12) & 255;
    if (PV_UNLIKELY(linear + tlb->neg_w[n] > 4096 - sizeof(T))) return false;
    at = reinterpret_cast<T*>(linear + tlb->addend[n]);
    return true;
}

/// Writes a register as instructions do: 32-bit results clear the upper half.
template <class T>
PV_INLINE void set_gpr(VcpuFrame* f, u8 offset, T value) {
    if constexpr (sizeof(T) == 4) {
        gpr_at<u64>(f, offset) = value;
    } else {
        gpr_at<T>(f, offset) = value;
    }
}

/// The immediate as a T: sign-extended from 32 bits.
template <class T>
PV_INLINE T immediate(const Uop* u) {
    return static_cast<T>(static_cast<s64>(static_cast<s32>(u->imm)));
}

enum AluOp : u8 { kAdd, kOr, kAdc, kSbb, kAnd, kSub, kXor, kCmp, kAluOps };

#define PV_ALU_ASM(text) \
    asm(text " %[b], %[a]\n\tlahf\n\tseto %%al" : [a] "+&r"(a), "=&a"(flags) : [b] "r"(b) : "cc")
#define PV_ALU_CARRY_ASM(text)                                        \
    asm("btl $8, %k[old]\n\t" text " %[b], %[a]\n\tlahf\n\tseto %%al" \
        : [a] "+&r"(a), "=&a"(flags)                                  \
        : [b] "r"(b), [old] "r"(u32{f->oszapc})                       \
        : "cc")

/// a op b on the host, with its flags in f->oszapc when `Live`. kCmp returns a.
template <AluOp O, class T, bool Live>
PV_INLINE T alu(VcpuFrame* f, T a, T b) {
    if constexpr (!Live && O != kAdc && O != kSbb) {
        if constexpr (O == kAdd) return static_cast<T>(a + b);
        if constexpr (O == kOr) return static_cast<T>(a | b);
        if constexpr (O == kAnd) return static_cast<T>(a & b);
        if constexpr (O == kSub) return static_cast<T>(a - b);
        if constexpr (O == kXor) return static_cast<T>(a ^ b);
        return a;
    } else {
        u32 flags;
        T before = a;
        if constexpr (O == kAdd) PV_ALU_ASM("add");
        if constexpr (O == kOr) PV_ALU_ASM("or");
        if constexpr (O == kAdc) PV_ALU_CARRY_ASM("adc");
        if constexpr (O == kSbb) PV_ALU_CARRY_ASM("sbb");
        if constexpr (O == kAnd) PV_ALU_ASM("and");
        if constexpr (O == kSub || O == kCmp) PV_ALU_ASM("sub");
        if constexpr (O == kXor) PV_ALU_ASM("xor");
        f->oszapc = static_cast<u16>(flags);
        return O == kCmp ? before : a;
    }
}

/// Whether condition code `C` holds for flags as LAHF and SETO leave them.
template <unsigned C>
PV_INLINE bool condition(u16 flags) {
    bool result;
    constexpr unsigned kind = C >> 1;
    if constexpr (kind == 0) result = flags & 1;                                         // O
    if constexpr (kind == 1) result = flags & 0x0100;                                    // B
    if constexpr (kind == 2) result = flags & 0x4000;                                    // Z
    if constexpr (kind == 3) result = flags & 0x4100;                                    // BE
    if constexpr (kind == 4) result = flags & 0x8000;                                    // S
    if constexpr (kind == 5) result = flags & 0x0400;                                    // P
    if constexpr (kind == 6) result = ((flags >> 15) ^ flags) & 1;                       // L
    if constexpr (kind == 7) result = (flags & 0x4000) | (((flags >> 15) ^ flags) & 1);  // LE
    return (C & 1) ? !result : result;
}

template <class T>
inline constexpr unsigned kLogSize = sizeof(T) == 1   ? 0
                                     : sizeof(T) == 2 ? 1
                                     : sizeof(T) == 4 ? 2
                                                      : 3;

constexpr unsigned log_size(unsigned size) {
    return size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3;
}

/// Calls `visit` with a value of the unsigned type of that many bytes.
template <class F>
constexpr auto with_size(unsigned size, F visit) {
    switch (size) {
        case 1:
            return visit(u8{});
        case 2:
            return visit(u16{});
        case 4:
            return visit(u32{});
        default:
            return visit(u64{});
    }
}

// The selectors of the fast_*.cpp files: a handler for this form, or nullptr.
Handler alu_register_handler(AluOp op, unsigned size, bool immediate, bool live);
Handler alu_load_handler(AluOp op, unsigned size, AddressKind kind, bool live);  // reg op= mem
Handler alu_store_handler(AluOp op, unsigned size, AddressKind kind,
                          bool immediate);  // mem op= reg/imm
Handler test_handler(unsigned size, bool immediate);
Handler test_memory_handler(unsigned size, AddressKind kind, bool immediate);
Handler fused_handler(bool test, unsigned size, bool immediate, unsigned cc);
/// F6/F7 group 2 and 3 (not, neg), FE/FF 0 and 1 (inc, dec), on registers.
Handler unary_handler(unsigned which, unsigned size, bool live);
enum UnaryOp : u8 { kNot, kNeg, kInc, kDec };
Handler unary_memory_handler(unsigned which, unsigned size, AddressKind kind);  // inc, dec
Handler shift_handler(unsigned group, unsigned size, bool by_cl, bool live);
Handler imul_handler(unsigned size, bool immediate, bool live);
Handler imul_load_handler(unsigned size, AddressKind kind, bool live);
Handler mul_handler(unsigned size, bool is_signed, bool live);
Handler move_register_handler(unsigned size, bool immediate);
Handler load_handler(unsigned size, AddressKind kind);
Handler store_handler(unsigned size, AddressKind kind, bool immediate);
Handler extend_handler(unsigned to, unsigned from, bool sign);
Handler extend_load_handler(unsigned to, unsigned from, bool sign, AddressKind kind);
Handler lea_handler(unsigned size, AddressKind kind);
Handler push_handler(bool immediate);
Handler pop_handler();
Handler cmov_handler(unsigned size, unsigned cc);
Handler setcc_handler(unsigned cc);
Handler exchange_handler(unsigned size);
Handler convert_handler(unsigned opcode, unsigned size);  // 98, 99
Handler bit_test_handler(unsigned size, bool immediate);
Handler byte_swap_handler(unsigned size);

/// MOVUPS and its kin: what a row moves.
struct VectorMove {
    u8 bytes;      ///< 16, 32
    bool clear;    ///< VEX.128: bits 255:128 of the destination are cleared
    bool aligned;  ///< memory must be aligned
    bool store;
};
bool vector_move(Op op, VectorMove& move);
Handler vector_copy_handler(const VectorMove& move);
Handler vector_memory_handler(const VectorMove& move, AddressKind kind);

Handler jcc_handler(unsigned cc);
Handler jump_handler();
Handler call_handler();
Handler return_handler();
Handler indirect_handler(bool call);
Handler indirect_load_handler(bool call, AddressKind kind);

}  // namespace polyvisor::soft
