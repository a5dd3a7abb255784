// What the rest of polyvisor knows of an engine.
//
// To add an engine: derive Engine and Vcpu in a folder of layer 5, map CpuState to what the engine
// keeps (round trips must be exact), serve claimed port and memory accesses through the two buses
// inside run(), and return from run() only for the reasons in cpu/exit.hpp. machine/ picks engines
// by name; tests/guests run against each.
//
//     auto engine = soft::create_engine({memory, pio, mmio, clock, cpuid});
//     auto vcpu = engine->create_vcpu(0, lapic);
//     vcpu->restore(reset_state(true));
//     Exit exit = vcpu->run();
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/log.hpp"
#include "bus/bus.hpp"
#include "bus/clock.hpp"
#include "bus/interrupt_chips.hpp"
#include "bus/interrupts.hpp"
#include "cpu/cpuid.hpp"
#include "cpu/exit.hpp"
#include "cpu/state.hpp"
#include "cpu/statistic.hpp"
#include "memory/dirty_log.hpp"
#include "memory/guest_memory.hpp"

namespace polyvisor {

/// What the host wants to be told of, whatever the guest has set up for itself.
/// run() then returns kDebug: `address` is the linear address of the next instruction, `dr6` says
/// why (0: INT3).
struct GuestDebug {
    struct Breakpoint {
        enum class Kind : u8 { kExecute, kWrite, kReadWrite };
        u64 address = 0;  ///< linear
        Kind kind = Kind::kExecute;
        u8 size = 1;  ///< 1, 2, 4 or 8 bytes, aligned; 1 for kExecute
        bool operator==(const Breakpoint&) const = default;
    };
    /// run() executes one instruction (of a repeated one, an iteration); interrupts and NMIs wait.
    bool single_step = false;
    /// The debug registers' worth: at most 4. Code breakpoints end run() before the instruction,
    /// and the next run() goes on past it; data breakpoints end it after the instruction.
    std::vector<Breakpoint> hardware;
    /// INT3 (0xcc) in the guest ends run() with kDebug, RIP at it, instead of raising #BP.
    bool int3_exits = false;
    bool operator==(const GuestDebug&) const = default;
};

/// One virtual CPU. run(), save() and restore() belong to one thread at a time; the CpuSignals
/// calls and request_stop() are safe from any thread.
class Vcpu : public CpuSignals {
  public:
    /// Runs until an exit. Guest faults are delivered inside; host errors throw.
    virtual Exit run() = 0;
    /// Makes run() return kInterrupted soon (within a millisecond, whatever the guest does), also
    /// the next run() if none is in progress.
    virtual void request_stop() = 0;
    /// run() returns kInterrupted after exactly this many more instructions; ~0 for no limit.
    /// Only where caps().instruction_budget; otherwise throws StateMismatch.
    virtual void set_instruction_budget(u64 instructions) = 0;

    /// What ends run() with kDebug; replaces what was set before. Throws ConfigError for more
    /// breakpoints than the CPU has or impossible ones. Not while run() is in progress.
    virtual void set_debug(const GuestDebug& debug) = 0;
    /// The INT3 that ended the last run() with kDebug is the guest's own: the next run() begins by
    /// raising its #BP.
    virtual void raise_int3() = 0;

    virtual CpuState save() const = 0;
    /// Validates first: throws StateError and changes nothing when the state is impossible.
    virtual void restore(const CpuState& state) = 0;
    /// These registers alone, for those who need no more, and need it often. Not validated: what
    /// the CPU cannot have (reserved bits of RFLAGS) is the caller's mistake.
    virtual GeneralRegisters general() const = 0;
    virtual void set_general(const GeneralRegisters& registers) = 0;
    /// The FPU's registers alone, likewise; set_fpu() is not for reserved bits of MXCSR either.
    virtual FpuState fpu() const { return save().fpu; }
    virtual void set_fpu(const FpuState& fpu) {
        CpuState state = save();
        state.fpu = fpu;
        restore(state);
    }
    virtual u32 id() const = 0;

    /// Translates a guest-virtual address with the present CR3 and mode, without side effects.
    /// False when it is not mapped.
    virtual bool translate(u64 gva, u64& gpa) const = 0;

    /// Counters by name ("instructions", "blocks translated", "tlb fills", ...), for profiles.
    struct Counter {
        std::string name;
        u64 value;
    };
    virtual std::vector<Counter> counters() const = 0;
    /// How often the CPU left the guest, by reason, where the guest runs on hardware: also for what
    /// the engine served itself. Any thread, at any time.
    virtual std::vector<Counter> exits() const { return {}; }
    /// What the host counts of this CPU. Any thread, at any time.
    virtual std::vector<Statistic> host_statistics() const { return {}; }
};

struct Caps {
    bool instruction_budget = false;
    bool deterministic = false;
    bool nested_paging = false;
    bool tsc_scaling = false;  ///< any tsc_khz; otherwise only the host's
    u32 max_cpus = 254;
};

/// What an engine offers on this host, known before one is made.
struct EngineOffer {
    FeatureSet features;     ///< for the CPUID policy
    u64 native_tsc_khz = 0;  ///< the TSC frequency it has without effort; 0: any
    bool tsc_scaling = true;
    bool irqchip = false;  ///< it can run interrupt chips itself (kSplit, kKernel)
    bool nested_paging = false;
    /// More features, when the engine plays the local APICs.
    FeatureSet irqchip_features = FeatureSet{};
    u8 physical_bits = 40;      ///< of guest-physical addresses
    u64 arch_capabilities = 0;  ///< see CpuidOptions
};

/// Everything an engine is given. The references outlive it.
struct EngineConfig {
    GuestMemory& memory;
    Bus& pio;
    Bus& mmio;
    Clock& clock;
    CpuidPolicy cpuid;
    IrqchipMode irqchip = IrqchipMode::kUser;
    u32 cpus = 1;  ///< how many vCPUs will be made
    /// kvm: entries of each vCPU's dirty ring, a power of two; 0: the dirty log keeps bitmaps.
    u32 dirty_ring = 0;
    Log* log = nullptr;
    bool hypercall_exits = false;
    /// kvm: every port access ends run() with kIo at once, asked of no bus, and whether its
    /// instruction is behind RIP or at it is not said: the caller sets RIP. For guests that use
    /// ports to call the host and nothing else, and execute nothing of their own above CPL 3: there
    /// are no interrupts, MSRs are not watched, restore() sets only those that SYSCALL and SYSENTER
    /// go by, and when it throws the CPU's state is undefined.
    bool port_exits = false;
    bool deterministic = false;
    /// Only the engine's reference implementation, without its shortcuts: slow, for tests.
    bool reference = false;
    /// Virtual nanoseconds per thousand instructions in deterministic mode.
    u64 ns_per_1000_instructions = 1000;
};

class Engine {
  public:
    virtual ~Engine() = default;
    virtual Caps caps() const = 0;
    virtual const char* name() const = 0;
    /// The interrupt chips it runs itself; nullptr when all are the machine's (kUser).
    virtual InterruptChips* chips() { return nullptr; }
    /// The caller has put other page tables where the CPUs' were: whatever the engine itself keeps
    /// of them is forgotten. While no CPU runs; each is to be given its state anew before it does.
    virtual void forget_tables() {}
    /// Memory was added behind what there was, and CPUs that run may be about to use it. They see
    /// it anyway when they run next. Any thread. Throws HostError.
    virtual void sync_memory() {}
    /// Writes to guest memory, page by page. The engine owns it.
    virtual DirtyLog& dirty_log() = 0;
    /// Counters of the whole machine, like Vcpu::counters(), but any thread may ask at any time.
    virtual std::vector<Vcpu::Counter> counters() const { return {}; }
    /// What the host counts of the whole machine. Any thread, at any time.
    virtual std::vector<Statistic> host_statistics() const { return {}; }
    /// `lapic` outlives the vCPU. It is nullptr when chips() has the local APICs, but for CPU 0 in
    /// mode kSplit, where it stands for the 8259 pair alone (only pending() and acknowledge()).
    virtual std::unique_ptr<Vcpu> create_vcpu(u32 id, LocalInterrupts* lapic) = 0;
};

}  // namespace polyvisor
