// The machine of a process: an engine, memory, the supervisor's pages, and as many CPUs as the
// process has had threads at a time. A process that made itself with vfork() shares its parent's
// until it executes a program.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "bus/bus.hpp"
#include "bus/clock.hpp"
#include "cpu/engine.hpp"
#include "process/address_space.hpp"
#include "process/clock_page.hpp"
#include "process/supervisor.hpp"

namespace polyvisor::process {

class VmPool;

struct VmConfig {
    u64 memory = 256 << 20;  ///< bytes that the program may map to write to
    std::function<std::unique_ptr<Engine>(const EngineConfig&)> make_engine;
    EngineOffer offer;
    std::shared_ptr<VmPool> pool;  ///< where make_vm() has it from; null: it makes one
};

/// The memory of a Vm as it was, and what is known of it: a value.
struct VmImage {
    std::shared_ptr<const ArenaImage> memory;
    PageTables::State tables;
    Supervisor::State supervisor;
    AddressSpace::State space;
};

/// Used under the kernel's lock, but for vcpu() and supervisor(), which belong to the CPU's thread
/// while it runs.
class Vm {
  public:
    static constexpr u32 kMostCpus = Supervisor::kMostCpus;

    /// Throws HostError, ConfigError.
    explicit Vm(const VmConfig& config);
    /// A copy of what `image` was taken of, copy on write; its CPUs are idle. Throws HostError.
    Vm(const VmConfig& config, std::shared_ptr<const VmImage> image);
    ~Vm();
    Vm(const Vm&) = delete;

    /// An idle CPU's number; throws HostError when the host has none to give, and returns kMostCpus
    /// when there are as many as can be.
    u32 take_cpu();
    void give_back(u32 cpu);
    Vcpu& vcpu(u32 cpu) { return *cpus_[cpu]; }
    /// The state of a CPU that is about to enter a program that begins.
    const CpuState& fresh(u32 cpu) const { return fresh_[cpu]; }

    /// The CPU is about to enter a program that begins.
    void begin(u32 cpu);
    /// The CPU is about to enter a program that goes on, with this FPU and these bases.
    void prepare(u32 cpu, const FpuState& fpu, u64 fs, u64 gs);
    /// For any number of copies. Its CPUs stand still. Throws HostError.
    std::shared_ptr<const VmImage> freeze() const;
    /// One copy, as fork() makes it. `alone`: no other CPU, and no system call, is at work on this
    /// memory. Throws HostError.
    std::shared_ptr<Vm> fork(bool alone);
    /// Back to the image that it was made of. Its CPUs stand still, and are to be prepare()d.
    void reset();

    /// Puts a byte into the program's memory, whatever it may do there itself: the one that was
    /// there; nothing: there is no memory.
    std::optional<u8> exchange_byte(u64 address, u8 byte);

    /// As new, for another program, if nobody uses it any more. False: it is to be closed. Throws
    /// HostError, and then it is to be closed, too.
    bool recycle();
    /// Does ahead of time what begin() would do for the CPU that take_cpu() gives next. Throws
    /// HostError.
    void make_ready();

    AddressSpace& space() { return space_; }
    Supervisor& supervisor() { return supervisor_; }
    /// What the vDSO tells the time by.
    ClockPage& clock_page() { return clock_page_; }
    /// Grows whenever translations that CPUs may have kept are out of date.
    u64 generation() const { return space_.generation(); }
    /// It executes instructions that are counted, and programs' memory itself.
    bool counts_instructions() const { return engine_->caps().instruction_budget; }

  private:
    struct Origin;
    void refresh(u32 cpu);
    Vm(const VmConfig& config, const Origin& origin);

    VmConfig config_;
    std::shared_ptr<const VmImage> image_;  // that it was made of
    GuestMemory memory_;
    Bus pio_{"pio", 0x10000}, mmio_{"mmio", bit(52)};
    Clock clock_;
    Arena arena_;
    PageTables tables_;
    std::unique_ptr<Engine> engine_;
    u64 xcr0_ = 1;
    Supervisor supervisor_;
    ClockPage clock_page_;
    AddressSpace space_;
    std::unique_ptr<LocalInterrupts> interrupts_;
    std::vector<std::unique_ptr<Vcpu>> cpus_;  // these three have room for kMostCpus: nothing moves
    std::vector<CpuState> fresh_;              // before a program begins
    std::vector<u8> is_fresh_;                 // in that state
    std::vector<u32> idle_;
};

}  // namespace polyvisor::process
