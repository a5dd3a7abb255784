// VcpuFrame: everything one soft vCPU's execution touches, as plain data in one place. The
// interpreter keeps guest registers here; translated code will pin most of them in host registers
// and use the frame as its base pointer, which is why the hot fields come first and the layout is
// asserted.
//
// Status flags (OSZAPC) live apart from the rest of RFLAGS, as the host's LAHF+SETO leave them:
// `oszapc` is AH = SF ZF . AF . PF . CF, AL = OF. rflags() and set_rflags() convert.
#pragma once

#include <atomic>

#include "base/types.hpp"
#include "cpu/state.hpp"
#include "soft/insn.hpp"

namespace polyvisor::soft {

class SoftVcpu;
struct Block;
struct Uop;
struct JumpCache;

enum Rflags : u64 {
    kFlagC = 1,
    kFlagP = 4,
    kFlagA = 16,
    kFlagZ = 64,
    kFlagS = 128,
    kFlagT = 256,
    kFlagI = 512,
    kFlagD = 1024,
    kFlagO = 2048,
    kFlagIopl = 3 << 12,
    kFlagNt = 1 << 14,
    kFlagRf = 1 << 16,
    kFlagVm = 1 << 17,
    kFlagAc = 1 << 18,
    kFlagVif = 1 << 19,
    kFlagVip = 1 << 20,
    kFlagId = 1 << 21,
    kFlagStatus = kFlagC | kFlagP | kFlagA | kFlagZ | kFlagS | kFlagO,
};

enum Vector : u8 {
    kDe = 0,
    kDb = 1,
    kNmi = 2,
    kBp = 3,
    kOf = 4,
    kBr = 5,
    kUd = 6,
    kNm = 7,
    kDf = 8,
    kTs = 10,
    kNp = 11,
    kSsFault = 12,
    kGp = 13,
    kPf = 14,
    kMf = 16,
    kAcFault = 17,
    kMcFault = 18,
    kXm = 19,
};

/// What an operation that returned false wants.
enum class Pending : u8 {
    kNone,
    kException,  ///< deliver `vector`; RIP stays at the instruction (faults) or after it (traps)
    kExit,       ///< leave run(): `exit` says why, RIP is where to go on
    kRestart,  ///< a repeated instruction that is not finished: run it again at the same RIP, after
               ///< a look at interrupts (and, with TF set, after the trap of this iteration)
};

struct Fault {
    Pending pending = Pending::kNone;
    u8 vector = 0;
    bool has_error = false;
    bool trap = false;  ///< RIP pushed is the next instruction's (already in frame.rip)
    u32 error = 0;
    u64 cr2 = 0;  ///< #PF
    u64 dr6 = 0;  ///< #DB: bits to set
};

/// Why other threads (or the vCPU itself) want the run loop's attention: bits of irq_req.
enum Request : u32 {
    kRequestInterrupt = 1,  ///< the local APIC's pending() may have changed
    kRequestNmi = 2,
    kRequestSmi = 4,
    kRequestInit = 8,
    kRequestSipi = 16,
    kRequestStop = 32,
    kRequestInvalidate = 64,  ///< code pages written by somebody else are queued
    kRequestTimer = 128,      ///< deterministic mode: a timer's deadline changed
    kRequestRearm = 256,      ///< the dirty log has set kPageDirtyTrack somewhere
};

/// One 256-entry direct-mapped translation cache for one access context. For the page at entry
/// n = (va >> 12) & 255: neg_x[n] = -(page address), so va + neg_x is the offset in the page, and
/// one unsigned compare with 4096 - size checks tag, permission and page crossing at once; the host
/// address is va + addend[n]. An entry that must not match holds the negated address of a page that
/// belongs to another entry (never probed here).
struct Tlb {
    u64 neg_r[256];
    u64 neg_w[256];
    u64 addend[256];
};

/// Which Tlb an access uses. Explicit accesses at CPL 0-2 with SMAP on and AC clear see kSupervisor
/// (user pages never match); with AC set, or SMAP off, kSupervisorAc.
/// kTlbNone is never filled: with alignment checks on, every access takes the slow path.
enum TlbContext : u8 { kTlbUser, kTlbSupervisor, kTlbSupervisorAc, kTlbNone, kTlbCount };

/// Bits of VcpuFrame::mode: what decoding and the choice of handlers depend on. A block is only
/// entered in the mode it was made for.
enum ModeBits : u32 {
    kModeCodeSize = 3,      ///< CodeSize
    kModeStack32 = 1 << 2,  ///< SS.B (outside 64-bit mode)
    kModeCplMask = 3 << 3,
    kModeProtected = 1 << 5,  ///< CR0.PE and not virtual-8086
    kModeVm86 = 1 << 6,
    kModeSegCheck =
        1 << 7,  ///< some data segment or stack is not flat: bases and limits are checked
    kModeFpuTrap = 1 << 8,  ///< CR0.EM or CR0.TS: x87 gives #NM
    kModeSseUd = 1 << 9,    ///< CR0.EM, or CR4.OSFXSR clear: SSE gives #UD
    kModeTs = 1 << 10,      ///< CR0.TS: SSE, AVX and MMX give #NM
    kModeAvxUd = 1 << 11,  ///< AVX gives #UD: CR4.OSXSAVE clear or XCR0[2:1] != 3, or not protected
    kModeEm = 1 << 12,     ///< CR0.EM: MMX gives #UD
    kModeFpException =
        1 << 13,  ///< MXCSR unmasks something: handlers of kFpExcept rows check before commit
    kModeAlignCheck = 1 << 14,  ///< CR0.AM, EFLAGS.AC and CPL 3
    kModeStep =
        1 << 15,  ///< TF, a debug-register breakpoint, or the host steps: single instructions
    kModeLongActive = 1 << 16,  ///< EFER.LMA
};

/// x87/MMX registers: physical registers R0..R7 as 10-byte extended values (MMX: the low 8 bytes).
struct X87State {
    alignas(16) u8 reg[8][16];
    u16 control = 0x37f;
    u16 status = 0;  ///< TOP in bits 11..13
    u8 tags = 0;     ///< abridged: bit n set = physical register n is not empty (FXSAVE's FTW)
    u16 opcode = 0;  ///< FOP
    u64 ip = 0, dp = 0;
    u16 cs = 0, ds = 0;
};

struct alignas(64) VcpuFrame {
    // Hot: reachable with an 8-bit displacement by translated code.
    std::atomic<u32> irq_req{0};
    u32 mode = 0;
    s64 budget = 0;  ///< instructions that may still run before the run loop looks up
    u64 gpr[17]{};   ///< [16] is always 0: "no register" in address arithmetic
    u64 rip = 0;     ///< IP within CS; exact only outside handlers (see soft/ops.hpp)
    u16 oszapc = 0x0200;
    bool shadow = false;     ///< interrupt shadow: STI, MOV SS, POP SS
    bool shadow_ss = false;  ///< ... of the kind that also holds back #DB
    bool no_step_trap =
        false;  ///< the instruction took TF away itself (INT n, SYSCALL): no #DB after it
    u8 reserved[3]{};
    u64 rflags_rest = 2;       ///< RFLAGS without OSZAPC
    Tlb* tlb_now = nullptr;    ///< &tlb[context of explicit data accesses now]
    Block* block = nullptr;    ///< being executed
    u64 host_rsp = 0;          ///< for translated code
    const Uop* uop = nullptr;  ///< inside a generic operation: its uop (for the exact RIP)
    JumpCache* jump_cache = nullptr;
    u64 code_base = 0;  ///< CS.base and limit that blocks stamped with `epoch` were checked against
    u32 code_limit = 0;
    u64 epoch = 1;  ///< blocks stamped with it are known to be mapped where they were made
    bool block_dead =
        false;  ///< the block being executed was overwritten: leave it after this insn
    bool link_slot_valid =
        false;  ///< the block was left by edge `link_slot`, which is not linked yet
    u8 link_slot = 0;

    // Segments and control state.
    Segment seg[6];
    Segment ldtr, tr;
    DescriptorTable gdtr, idtr;
    u64 cr0 = 0, cr2 = 0, cr3 = 0, cr4 = 0, xcr0 = 1;
    u64 pdpte[4]{};  ///< PAE: loaded by MOV CR3 and by changes of CR0/CR4
    u64 dr[4]{}, dr6 = 0xffff0ff0, dr7 = 0x400;
    u32 pkru = 0;
    MsrState msr;
    u8 cpl = 0;
    Activity activity = Activity::kRunning;
    bool nmi_blocked = false;
    bool nmi_pending = false;
    InFlightEvent event;     ///< restored, to be delivered before the next instruction
    u64 a20_mask = ~u64{0};  ///< and'ed to physical addresses
    u64 physical_mask = 0;   ///< bits below MAXPHYADDR
    u64 retired = 0;         ///< instructions retired before the current slice
    u64 time_base = 0;       ///< deterministic mode: virtual time was this ...
    u64 count_base = 0;      ///< ... when `retired` was this

    Fault fault;
    u64 debug_hits = 0;  ///< DR6 bits of data breakpoints met by the present instruction; those of
                         ///< the host's from bit 16
    // What the host debugs (GuestDebug), apart from the guest's own debug registers.
    u64 host_dr[4]{};
    u32 host_dr7 = 0;  ///< 0: no breakpoints
    bool host_step = false;
    enum class Int3 : u8 { kRaise, kExit, kRaiseOnce } host_int3 = Int3::kRaise;

    /// The guest or the host has breakpoints.
    bool breakpoints() const { return ((dr7 & 0xff) | host_dr7) != 0; }
    SoftVcpu* vcpu = nullptr;

    // SIMD. MXCSR is in the host's own register while the interpreter runs, with all exceptions
    // masked; `mxcsr` here is authoritative only for the mask bits and outside run().
    u32 mxcsr = 0x1f80;
    alignas(64) u8 ymm[16][32]{};
    X87State x87{};

    Tlb tlb[kTlbCount];

    u64 rflags() const {
        u64 ah = oszapc >> 8;
        return rflags_rest | (ah & (kFlagStatus & 0xff)) | (u64{oszapc & 1u} << 11);
    }
    /// Replaces everything, also OSZAPC. Callers that change VM, TF, AC or IOPL call update_mode().
    void set_rflags(u64 value) {
        rflags_rest = (value & ~u64{kFlagStatus}) | 2;
        set_status(value);
    }
    void set_status(u64 value) {
        oszapc = static_cast<u16>(((value & 0xd5) | 2) << 8 | ((value >> 11) & 1));
    }
    CodeSize code_size() const { return static_cast<CodeSize>(mode & kModeCodeSize); }
    bool long64() const { return code_size() == CodeSize::k64; }
    bool protected_mode() const { return mode & kModeProtected; }
    bool vm86() const { return mode & kModeVm86; }
};

}  // namespace polyvisor::soft
