// Operand access and status flags, as the integer operations share them.
//
// Flags: an operation is done by the host's own instruction between PV_FLAGS_IN and PV_FLAGS_OUT,
// with the frame's `oszapc` in AX. The incoming flags are loaded even where the manual calls the
// result undefined, so that what the guest sees is what this host's CPU does.
#pragma once

#include <mutex>

#include "soft/ops.hpp"

namespace polyvisor::soft {

// AL = 1 overflows when 127 is added, AL = 0 does not; SAHF leaves OF alone.
#define PV_FLAGS_IN "addb $127, %%al\n\tsahf\n\t"
#define PV_FLAGS_OUT "\n\tlahf\n\tseto %%al"

/// Calls function<T>(f, i, ea) for the operand size of the instruction. For v operands.
#define PV_BY_OPSIZE(call)                 \
    (i.opsize == 4   ? call<u32>(f, i, ea) \
     : i.opsize == 8 ? call<u64>(f, i, ea) \
                     : call<u16>(f, i, ea))

// Bits of VcpuFrame::oszapc.
enum StatusBits : u16 {
    kStatusO = 1,
    kStatusC = 0x100,
    kStatusP = 0x400,
    kStatusA = 0x1000,
    kStatusZ = 0x4000,
    kStatusS = 0x8000,
};

/// The condition with encoding `code` (0 = O .. 15 = G, SDM 2 appendix B.1.4.7).
inline bool condition(u16 flags, unsigned code) {
    bool result;
    bool sign_differs = ((flags >> 15) ^ flags) & 1;
    switch (code >> 1) {
        case 0:
            result = flags & kStatusO;
            break;
        case 1:
            result = flags & kStatusC;
            break;
        case 2:
            result = flags & kStatusZ;
            break;
        case 3:
            result = flags & (kStatusC | kStatusZ);
            break;
        case 4:
            result = flags & kStatusS;
            break;
        case 5:
            result = flags & kStatusP;
            break;
        case 6:
            result = sign_differs;
            break;
        default:
            result = sign_differs || (flags & kStatusZ);
            break;
    }
    return result != (code & 1);
}

// --- Addresses and the stack ---------------------------------------------------------------------

inline u64 address_mask(const Insn& i) {
    return i.addrsize == 8 ? ~u64{0} : i.addrsize == 4 ? u64{0xffffffff} : u64{0xffff};
}
/// Writes a count or index register (rCX, rSI, rDI) at the address size of the instruction.
inline void write_address_reg(VcpuFrame& f, const Insn& i, u8 n, u64 value) {
    write_reg(f, n, i.addrsize, value);
}
/// The bits of rSP in use: all in 64-bit mode, else by SS.B.
inline u64 stack_mask(const VcpuFrame& f) {
    return f.long64() ? ~u64{0} : (f.mode & kModeStack32) ? u64{0xffffffff} : u64{0xffff};
}
/// The stack pointer register after `delta` is added in the width of the stack.
inline u64 moved_stack_pointer(const VcpuFrame& f, u64 rsp, u64 delta) {
    u64 mask = stack_mask(f);
    return (rsp & ~mask) | ((rsp + delta) & mask);
}

// --- Operands ------------------------------------------------------------------------------------

template <class T>
inline T get_reg(VcpuFrame& f, const Insn& i, u8 n) {
    if constexpr (sizeof(T) == 1) {
        return *reg8(f, i, n);
    } else {
        return static_cast<T>(f.gpr[n]);
    }
}
template <class T>
inline void set_reg(VcpuFrame& f, const Insn& i, u8 n, T value) {
    if constexpr (sizeof(T) == 1) {
        *reg8(f, i, n) = value;
    } else {
        write_reg(f, n, sizeof(T), value);
    }
}
template <class T>
inline void set_accumulator(VcpuFrame& f, T value) {
    if constexpr (sizeof(T) == 1) {
        std::memcpy(&f.gpr[kRax], &value, 1);
    } else {
        write_reg(f, kRax, sizeof(T), value);
    }
}

/// The E operand: ModRM.rm as a register or memory.
template <class T>
inline bool read_e(VcpuFrame& f, const Insn& i, u64 ea, T& value) {
    if (i.has_mem) return load(f, i, ea, value);
    value = get_reg<T>(f, i, i.rm);
    return true;
}
template <class T>
inline bool write_e(VcpuFrame& f, const Insn& i, u64 ea, T value) {
    if (i.has_mem) return store(f, i, ea, value);
    set_reg<T>(f, i, i.rm, value);
    return true;
}

/// A memory operand that is going to be read and written, checked for both.
struct Target {
    u64 linear = 0;
    u8* host = nullptr;  ///< nullptr: MMIO or across pages, by read_linear and write_linear
    u8 segment = kDs;

    template <class T>
    bool read(VcpuFrame& f, T& value) const {
        if (PV_LIKELY(host != nullptr)) {
            std::memcpy(&value, host, sizeof(T));
            return true;
        }
        return read_linear(f, linear, &value, sizeof(T), Privilege::kCurrent, segment);
    }
    template <class T>
    bool write(VcpuFrame& f, const T& value) const {
        if (PV_LIKELY(host != nullptr)) {
            std::memcpy(host, &value, sizeof(T));
            return true;
        }
        return write_linear(f, linear, &value, sizeof(T), Privilege::kCurrent, segment);
    }
};

template <class T>
inline bool open_target(VcpuFrame& f, const Insn& i, u64 ea, Target& target) {
    target.segment = i.segment;
    if (!linear_address(f, i.segment, ea, sizeof(T), true, target.linear)) return false;
    u64 n = (target.linear >> 12) & 255;
    if (PV_LIKELY(target.linear + f.tlb_now->neg_w[n] <= 4096 - sizeof(T))) {
        target.host = reinterpret_cast<u8*>(target.linear + f.tlb_now->addend[n]);
        return true;
    }
    target.host = writable_host(f, target.linear, sizeof(T), Privilege::kCurrent, i.segment);
    if (target.host) return true;
    return f.fault.pending == Pending::kNone &&
           probe_write_linear(f, target.linear, sizeof(T), Privilege::kCurrent, i.segment);
}

/// Serializes, in the whole process, locked accesses that no single host instruction can make:
/// those across two guest pages and those to MMIO. They are atomic towards each other, not towards
/// locked accesses within one page; bus-locking guests are that rare, and real CPUs trap on them
/// too.
std::mutex& split_lock();

/// Read-modify-write of the E operand: `plain(T) -> T` computes; `atomic(T*)` does the same to
/// memory as one host atomic, for LOCK. Flags are put back when the write fails after all.
template <class T, class Plain, class Atomic>
inline bool modify(VcpuFrame& f, const Insn& i, u64 ea, Plain&& plain, Atomic&& atomic) {
    if (!i.has_mem) {
        set_reg<T>(f, i, i.rm, plain(get_reg<T>(f, i, i.rm)));
        return true;
    }
    Target target;
    if (!open_target<T>(f, i, ea, target)) return false;
    bool locked = i.prefixes & kPrefixLock;
    if (PV_UNLIKELY(locked) && target.host) {
        atomic(reinterpret_cast<T*>(target.host));
        return true;
    }
    std::unique_lock<std::mutex> guard;
    if (PV_UNLIKELY(locked)) guard = std::unique_lock(split_lock());
    T value;
    if (!target.read(f, value)) return false;
    u16 before = f.oszapc;
    value = plain(value);
    if (PV_LIKELY(target.write(f, value))) return true;
    f.oszapc = before;
    return false;
}

}  // namespace polyvisor::soft
