// The kernel that a process VM does not have: a handful of pages that turn system calls and
// exceptions of the program into port writes (on KVM) or hypercalls (on our own CPU), which the
// monitor serves, and an IRET that goes back.
//
// It lies in the upper half of the address space, where no program has anything, and of it a
// program can reach two pages: the clock, which it may read, and SYSCALL's entry. On hardware
// SYSCALL arrives there at CPL 0. There are KVMs that execute only CPL 3 natively, on which it
// arrives still at CPL 3; there the port write is a general protection fault, whose gate tells
// where it came from. Either way the monitor sees a Trap.
//
// What a program can do with that page is what SYSCALL does: jump to it, and be served.
#pragma once

#include <array>
#include <memory>

#include "cpu/engine.hpp"
#include "process/arena.hpp"

namespace polyvisor::process {

class PageTables;

/// Why a program left its code.
struct Trap {
    enum class Kind : u8 {
        kSystemCall,
        kException,
        kInterrupted,  ///< request_stop() or the instruction budget
        kFailure,      ///< the engine cannot go on: `text`
    };
    Kind kind = Kind::kInterrupted;
    u8 vector = 0;    ///< kException
    u32 error = 0;    ///< kException
    u64 address = 0;  ///< kException: CR2 of a page fault
    std::string text;
};

/// The supervisor's pages, which all CPUs of a process VM share.
class Supervisor {
  public:
    static constexpr u64 kBase = 0xffff'ffff'8000'0000;
    static constexpr u64 kGdt = kBase, kIdt = kBase + 0x1000, kGates = kBase + 0x2000,
                         kEntry = kBase + 0x3000, kClock = kBase + 0x4000, kCpus = kBase + 0x5000;
    static constexpr u32 kMostCpus = 254;
    static constexpr u64 kCpuPages = 2;  ///< of each: task state, and a stack
    static constexpr u16 kKernelCode = 0x08, kKernelData = 0x10, kUserData = 0x20 | 3,
                         kUserCode = 0x28 | 3, kTask = 0x30;

    /// Allocates and maps them. `hypercalls`: VMCALL instead of port writes. Throws ConfigError
    /// when the arena is too small.
    Supervisor(Arena& arena, PageTables& tables, bool hypercalls);
    /// Where the pages lie that an arena holds: goes with an image of it.
    struct State {
        Gpa clock;
        std::vector<Gpa> cpus;
    };
    /// Those that `arena` holds already, as a copy of another. It has no CPU yet.
    Supervisor(Arena& arena, PageTables& tables, bool hypercalls, const State& state);
    const State& state() const { return state_; }
    /// The arena is what it was then; CPUs that came later get their pages again. All are to be
    /// restart()ed. Throws ConfigError.
    void restore(const State& state);

    /// Maps what the next CPU needs, and gives its state: at CPL 0, where run() goes on, with all
    /// registers 0.
    CpuState add_cpu(u64 xcr0);
    /// The CPU was put back to what add_cpu() gave, but for these bases.
    void restart(u32 cpu, u64 fs = 0, u64 gs = 0);

    /// The page at kClock, which the program may read.
    u8* clock_page() const { return arena_.host(state_.clock); }

    /// Enters the program with `registers` and returns at its next trap, with them as they are
    /// then. `flush`: its translations are to be forgotten.
    Trap run(Vcpu& vcpu, GeneralRegisters& registers, bool flush);

    /// FS's or GS's base, from the next run() on. After a trap.
    void set_base(u32 cpu, SegmentIndex segment, u64 base);
    u64 base(u32 cpu, SegmentIndex segment) const;

  private:
    struct Frame;
    struct Saved;
    struct Cpu {
        bool in_program = false;  ///< at CPL 3 of its own accord; else in one of our gates
        u64 fs = 0, gs = 0;
        SegmentIndex changed = kSegmentCount;  ///< kFs or kGs: the CPU has to be told of it
    };
    void map_cpu(std::size_t cpu);
    Frame& frame(u32 cpu) const;
    Trap leave(Vcpu& vcpu, const Exit& exit, GeneralRegisters& registers);

    Arena& arena_;
    PageTables& tables_;
    bool hypercalls_;
    State state_;  // also of CPUs that are not there yet
    std::vector<Cpu> cpus_;
};

}  // namespace polyvisor::process
