// Port input and output: permission by IOPL or the TSS's bitmap (SDM 1, 19.5), the string forms
// with REP, and the bus.
#include "soft/bindings.hpp"
#include "soft/descriptors.hpp"
#include "soft/host_mxcsr.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {
namespace {

// A repeated instruction looks up for interrupts and requests after this many elements: a device
// may take a microsecond for each.
constexpr unsigned kElementsPerTurn = 64;

bool port_allowed(VcpuFrame& f, u16 port, u32 size) {
    if (PV_LIKELY(f.cpl <= iopl(f)) && !f.vm86()) return true;
    if (!(f.cr0 & 1)) return true;
    return io_bitmap_allows(f, port, size);
}

void sync_time(VcpuFrame& f) {
    // Devices see the time of the instruction, not of the last time the run loop looked.
    if (environment(f).deterministic) read_tsc(f);
}

/// I/O breakpoints, with CR4.DE (SDM 3B, 17.2.4): they trap after the instruction.
[[gnu::cold]] void note_port_breakpoints(VcpuFrame& f, u16 port, u32 size) {
    static constexpr u8 kLength[4] = {1, 2, 8, 4};
    if (!(f.cr4 & bit(3))) return;
    for (unsigned n = 0; n < 4; ++n) {
        if (!(f.dr7 >> (2 * n) & 3) || (f.dr7 >> (16 + 4 * n) & 3) != 2) continue;
        u64 length = kLength[f.dr7 >> (18 + 4 * n) & 3];
        u64 start = f.dr[n] & ~(length - 1);
        if (port < start + length && start < u64{port} + size) f.debug_hits |= bit(n);
    }
}

u32 read_port(VcpuFrame& f, u16 port, u32 size) {
    sync_time(f);
    if (PV_UNLIKELY(f.dr7 & 0xff)) note_port_breakpoints(f, port, size);
    OutsideGuest outside(*f.vcpu);
    HostMxcsr usual_mxcsr;
    u32 value = 0;
    environment(f).pio.read(port, {reinterpret_cast<u8*>(&value), size});
    return value;
}

void write_port(VcpuFrame& f, u16 port, u32 size, u32 value) {
    sync_time(f);
    if (PV_UNLIKELY(f.dr7 & 0xff)) note_port_breakpoints(f, port, size);
    OutsideGuest outside(*f.vcpu);
    HostMxcsr usual_mxcsr;
    environment(f).pio.write(port, {reinterpret_cast<const u8*>(&value), size});
}

u32 port_size(const Insn& i, bool byte) {
    return byte ? 1 : i.opsize == 2 ? 2 : 4;
}

template <bool byte, bool immediate>
bool in(VcpuFrame& f, const Insn& i, u64) {
    const u32 size = port_size(i, byte);
    const u16 port = immediate ? static_cast<u8>(i.imm) : static_cast<u16>(f.gpr[kRdx]);
    if (!port_allowed(f, port, size)) return false;
    u32 value = read_port(f, port, size);
    if constexpr (byte) {
        std::memcpy(&f.gpr[kRax], &value, 1);
    } else {
        write_reg(f, kRax, size, value);
    }
    return true;
}

template <bool byte, bool immediate>
bool out(VcpuFrame& f, const Insn& i, u64) {
    const u32 size = port_size(i, byte);
    const u16 port = immediate ? static_cast<u8>(i.imm) : static_cast<u16>(f.gpr[kRdx]);
    if (!port_allowed(f, port, size)) return false;
    write_port(f, port, size, static_cast<u32>(f.gpr[kRax]));
    return true;
}

/// Adds to a string register within the address size.
void advance(VcpuFrame& f, u8 reg, u8 addrsize, u64 delta) {
    write_reg(f, reg, addrsize, f.gpr[reg] + delta);
}

/// Runs one element after the other. `element` does one and returns false when it raised.
template <class Element>
bool repeat(VcpuFrame& f, const Insn& i, u8 index, u32 size, Element element) {
    const u64 delta = f.rflags_rest & kFlagD ? -u64{size} : u64{size};
    if (!(i.prefixes & (kPrefixRep | kPrefixRepne))) {
        if (!element(read_reg(f, index, i.addrsize))) return false;
        advance(f, index, i.addrsize, delta);
        return true;
    }
    // Single stepping traps after each element.
    unsigned turn = f.rflags_rest & kFlagT ? 1 : kElementsPerTurn;
    while (u64 left = read_reg(f, kRcx, i.addrsize)) {
        if (turn-- == 0) return restart(f);
        if (!element(read_reg(f, index, i.addrsize))) return false;
        advance(f, index, i.addrsize, delta);
        write_reg(f, kRcx, i.addrsize, left - 1);
    }
    return true;
}

template <bool byte>
bool ins(VcpuFrame& f, const Insn& i, u64) {
    const u32 size = port_size(i, byte);
    const u16 port = static_cast<u16>(f.gpr[kRdx]);
    if (!port_allowed(f, port, size)) return false;
    return repeat(f, i, kRdi, size, [&](u64 ea) {
        u64 linear;
        // The store must be known to succeed before the device is read.
        if (!linear_address(f, kEs, ea, size, true, linear) ||
            !probe_write_linear(f, linear, size, Privilege::kCurrent, kEs)) {
            return false;
        }
        u32 value = read_port(f, port, size);
        return write_linear(f, linear, &value, size, Privilege::kCurrent, kEs);
    });
}

template <bool byte>
bool outs(VcpuFrame& f, const Insn& i, u64) {
    const u32 size = port_size(i, byte);
    const u16 port = static_cast<u16>(f.gpr[kRdx]);
    if (!port_allowed(f, port, size)) return false;
    return repeat(f, i, kRsi, size, [&](u64 ea) {
        u64 linear;
        u32 value = 0;
        if (!linear_address(f, i.segment, ea, size, false, linear) ||
            !read_linear(f, linear, &value, size, Privilege::kCurrent, i.segment)) {
            return false;
        }
        write_port(f, port, size, value);
        return true;
    });
}

const OpBinding kIoOps[] = {
    bind<Op::IN_AL_Ib, in<true, true>>(),    bind<Op::IN_eAX_Ib, in<false, true>>(),
    bind<Op::IN_AL_DX, in<true, false>>(),   bind<Op::IN_eAX_DX, in<false, false>>(),
    bind<Op::OUT_Ib_AL, out<true, true>>(),  bind<Op::OUT_Ib_eAX, out<false, true>>(),
    bind<Op::OUT_DX_AL, out<true, false>>(), bind<Op::OUT_DX_eAX, out<false, false>>(),
    bind<Op::INSB_Yb_DX, ins<true>>(),       bind<Op::INSV_Yv_DX, ins<false>>(),
    bind<Op::OUTSB_DX_Xb, outs<true>>(),     bind<Op::OUTSV_DX_Xv, outs<false>>(),
};

}  // namespace

std::span<const OpBinding> io_ops() {
    return kIoOps;
}

}  // namespace polyvisor::soft
