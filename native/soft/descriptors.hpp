// Segment descriptors and what far transfers, interrupts and task switches share. Private to the
// system operations of this folder.
#pragma once

#include "soft/environment.hpp"
#include "soft/ops.hpp"
#include "soft/system.hpp"

namespace polyvisor::soft {

/// A segment or gate descriptor (SDM 3A, 3.4.5 and 5.8.3); `upper` is the second half of the
/// 16-byte ones in IA-32e mode.
struct Descriptor {
    u64 raw = 0;
    u64 upper = 0;

    u8 type() const { return bits(raw, 43, 40); }
    bool s() const { return raw & bit(44); }
    u8 dpl() const { return bits(raw, 46, 45); }
    bool present() const { return raw & bit(47); }
    bool l() const { return raw & bit(53); }
    bool db() const { return raw & bit(54); }
    bool code() const { return s() && (type() & 8); }
    bool conforming() const { return (type() & 0xc) == 0xc; }
    bool readable() const { return !(type() & 8) || (type() & 2); }
    bool writable_data() const { return s() && (type() & 0xa) == 2; }
    u32 base() const { return static_cast<u32>(bits(raw, 39, 16) | bits(raw, 63, 56) << 24); }
    u64 base64() const { return base() | upper << 32; }
    u32 limit() const {
        u32 limit = static_cast<u32>(bits(raw, 15, 0) | bits(raw, 51, 48) << 16);
        return raw & bit(55) ? limit << 12 | 0xfff : limit;
    }
    /// As in Segment::attributes.
    u32 attributes() const { return bits(raw, 55, 40) & 0xf0ff; }

    // Gates.
    u16 gate_selector() const { return static_cast<u16>(raw >> 16); }
    u32 gate_offset() const { return static_cast<u32>((raw & 0xffff) | (raw >> 32 & 0xffff0000)); }
    u64 gate_offset64() const { return gate_offset() | upper << 32; }
    u8 gate_ist() const { return bits(raw, 34, 32); }
    u8 gate_parameters() const { return bits(raw, 36, 32); }
};

/// Types of system descriptors.
enum SystemType : u8 {
    kTss16 = 1,
    kLdt = 2,
    kTss16Busy = 3,
    kCallGate16 = 4,
    kTaskGate = 5,
    kIntGate16 = 6,
    kTrapGate16 = 7,
    kTss = 9,
    kTssBusy = 11,
    kCallGate = 12,
    kIntGate = 14,
    kTrapGate = 15,
};

inline bool long_active(const VcpuFrame& f) {
    return f.mode & kModeLongActive;
}
inline u8 iopl(const VcpuFrame& f) {
    return bits(f.rflags_rest, 13, 12);
}

inline bool is_canonical(const VcpuFrame& f, u64 address) {
    unsigned width = f.cr4 & bit(12) ? 57 : 48;
    return static_cast<u64>(sign_extend(address, width)) == address;
}

// --- Implicit supervisor accesses, through the soft TLB
// ----------------------------------------------

inline Tlb& supervisor_tlb(VcpuFrame& f) {
    return f.tlb[f.cr4 & bit(21) ? kTlbSupervisor : kTlbSupervisorAc];
}

template <class T>
inline bool read_system(VcpuFrame& f, u64 linear, T& value) {
    Tlb& tlb = supervisor_tlb(f);
    u64 n = (linear >> 12) & 255;
    if (PV_LIKELY(linear + tlb.neg_r[n] <= 4096 - sizeof(T))) {
        std::memcpy(&value, reinterpret_cast<const u8*>(linear + tlb.addend[n]), sizeof(T));
        return true;
    }
    return read_linear(f, linear, &value, sizeof(T), Privilege::kSupervisor);
}

template <class T>
inline bool write_system(VcpuFrame& f, u64 linear, const T& value, u8 seg = kDs) {
    Tlb& tlb = supervisor_tlb(f);
    u64 n = (linear >> 12) & 255;
    if (PV_LIKELY(linear + tlb.neg_w[n] <= 4096 - sizeof(T))) {
        std::memcpy(reinterpret_cast<u8*>(linear + tlb.addend[n]), &value, sizeof(T));
        return true;
    }
    return write_linear(f, linear, &value, sizeof(T), Privilege::kSupervisor, seg);
}

// --- Descriptors and segment registers (ops_segment.cpp)
// ----------------------------------------------

constexpr bool null_selector(u16 selector) {
    return (selector & 0xfffc) == 0;
}
constexpr u32 selector_error(u16 selector, u32 ext = 0) {
    return (selector & 0xfffc) | ext;
}

/// Reads a descriptor from the GDT or LDT. Outside the table: raises `vector` with the selector.
bool fetch_descriptor(VcpuFrame& f, u16 selector, Descriptor& d, u8 vector = kGp, u32 ext = 0);
/// Reads the upper half of a 16-byte descriptor.
bool fetch_upper(VcpuFrame& f, u16 selector, Descriptor& d, u8 vector = kGp, u32 ext = 0);
/// Sets the accessed bit in memory, if it is clear, and in `d`.
bool mark_accessed(VcpuFrame& f, u16 selector, Descriptor& d);
/// Linear address of a selector's descriptor; the selector has been checked.
u64 descriptor_address(const VcpuFrame& f, u16 selector);

inline Segment make_segment(u16 selector, const Descriptor& d) {
    return {d.base(), d.limit(), d.attributes(), selector};
}
/// What loading a null selector leaves: unusable, base 0.
inline Segment null_segment(u16 selector, u8 dpl = 0) {
    return {0, 0, static_cast<u32>(bit(16)) | u32{dpl} << 5, selector};
}
/// A segment register as real (or, with `vm86`, virtual-8086) mode loads it.
void load_real_segment(VcpuFrame& f, u8 seg, u16 selector);
/// MOV/POP Sreg in any mode, CS excepted; does not call update_mode().
bool load_segment(VcpuFrame& f, u8 seg, u16 selector);
/// Checks a stack segment for privilege `cpl` (SDM 3A, 5.7), reading and marking its descriptor.
/// `vector` is #TS for stacks out of a TSS and #GP for those that returns and loads name.
bool check_stack_segment(VcpuFrame& f, u16 selector, u8 cpl, u8 vector, u32 ext, Segment& ss);
/// After a return to an outer level: data segments too privileged for the new CPL become null.
void drop_privileged_segments(VcpuFrame& f);

// --- Control transfers (ops_far.cpp, exceptions.cpp, task.cpp)
// -------------------------------------------

/// Loads CS (whose descriptor is checked), CPL and IP.
inline void enter_code(VcpuFrame& f, u16 selector, u8 cpl, const Descriptor& d, u64 ip) {
    f.seg[kCs] = make_segment(static_cast<u16>((selector & ~3) | cpl), d);
    f.cpl = cpl;
    f.rip = ip;
}
/// Whether `ip` may be executed in the code segment `d`; false: #GP(ext) raised.
bool check_target(VcpuFrame& f, const Descriptor& d, u64 ip, u32 ext = 0);

/// A stack that is not (yet) the current one, or whose pushes belong together.
class StackFrame {
  public:
    /// `cpl` is the privilege the accesses are made with; #SS reports `error`.
    StackFrame(VcpuFrame& f, const Segment& ss, u64 sp, bool long_stack, u8 cpl, u32 error)
        : f_(f),
          ss_(ss),
          sp_(sp),
          mask_(long_stack ? ~u64{0}
                : ss.db()  ? 0xffffffff
                           : 0xffff),
          long_(long_stack),
          privilege_(cpl == 3 ? Privilege::kUser : Privilege::kSupervisor),
          error_(error) {}
    /// The current stack.
    explicit StackFrame(VcpuFrame& f)
        : StackFrame(f, f.seg[kSs], f.gpr[kRsp], f.long64(), f.cpl, 0) {
        privilege_ = Privilege::kCurrent;
    }

    bool push(u64 value, u32 size);
    bool pop(u64& value, u32 size);
    /// Skips parameters.
    void skip(u64 bytes) { sp_ += bytes; }
    u64 sp() const { return sp_; }
    /// Makes the pointer the current one: only its width of RSP changes.
    void commit() {
        if (mask_ == 0xffff) {
            f_.gpr[kRsp] = (f_.gpr[kRsp] & ~u64{0xffff}) | (sp_ & 0xffff);
        } else {
            f_.gpr[kRsp] = sp_ & mask_;
        }
    }

  private:
    bool address(u64 sp, u32 size, u64& linear);

    VcpuFrame& f_;
    const Segment& ss_;
    u64 sp_;
    u64 mask_;
    bool long_;
    Privilege privilege_;
    u32 error_;
};

/// SS:ESP for an inner level from a 16- or 32-bit TSS.
bool inner_stack(VcpuFrame& f, u8 cpl, u32 ext, u16& ss, u32& esp);
/// RSPn (or with ist 1..7 ISTn) from a 64-bit TSS.
bool inner_stack64(VcpuFrame& f, u8 cpl, u8 ist, u32 ext, u64& rsp);

enum class TaskSwitch : u8 { kJump, kCall, kReturn, kEvent };
/// A hardware task switch (SDM 3A, 7.3) to the TSS `selector`, whose type and presence have been
/// checked by the caller except for kReturn. f.rip is the outgoing task's next instruction. With
/// `error`, pushes that error code on the new task's stack.
bool task_switch(VcpuFrame& f, u16 selector, const Descriptor& tss, TaskSwitch kind, u32 ext = 0,
                 const u32* error = nullptr);
/// Reads and checks the TSS a task gate, far JMP or far CALL names.
bool fetch_tss(VcpuFrame& f, u16 selector, Descriptor& tss, u32 ext = 0);
/// Whether the TSS's I/O bitmap allows `size` ports from `port`; raises #GP(0) when not.
bool io_bitmap_allows(VcpuFrame& f, u16 port, u32 size);
/// Whether VME redirects INT `vector` to the 8086 program itself; false with a fault pending on
/// error.
bool vme_redirects(VcpuFrame& f, u8 vector, bool& redirects);

/// Enters the handler of `vector` from the present CS:RIP. Nothing but memory below stack pointers
/// changes when it returns false (raised). `set_rf`: the pushed image has RF set.
bool enter_handler(VcpuFrame& f, u8 vector, EventType type, const u32* error, bool set_rf);

}  // namespace polyvisor::soft
