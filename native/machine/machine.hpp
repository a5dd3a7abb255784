// A whole machine: who owns what, and the orders that start and end it. The work is done elsewhere:
// the chips are in pc.hpp, the threads in vcpu_thread.hpp, whether they may run in run_control.hpp.
//
// Lock order: lifecycle_mutex_ is taken first and never inside a device; everything that a device
// may call (request_end, now, console) does without it.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/log.hpp"
#include "bus/event_loop.hpp"
#include "cpu/engine.hpp"
#include "machine/breakpoints.hpp"
#include "machine/halt_watch.hpp"
#include "machine/pc.hpp"
#include "machine/run_control.hpp"
#include "machine/statistics.hpp"
#include "machine/vcpu_thread.hpp"
#include "machine/virtio_slots.hpp"

namespace polyvisor {

struct MachineConfig {
    u64 memory = 512 << 20;  ///< bytes of RAM
    u32 cpus = 1;
    std::string engine = "auto";
    std::string cpu_model = "host";
    /// Features by name, on or off whatever the model has; see CpuidOptions.
    std::vector<std::pair<std::string, bool>> cpu_features = {};
    /// Only what all engines that work here offer: its State can go from one to the other.
    bool portable = false;
    bool deterministic = false;
    u64 tsc_khz = 0;  ///< 0: what the engine has without effort, or else 1 GHz
    /// Who plays the interrupt chips: "auto" (the engine if it can), "user", "split", "kernel".
    std::string irqchip = "auto";
    /// What the host backs the RAM with: "none", "transparent", "2M", "1G", see HugePages; "auto":
    /// transparent on engines with nested paging, which is spared most of its faults, none on
    /// others, for which clearing whole huge pages costs more than it saves.
    std::string hugepages = "auto";
    u32 dirty_ring = 0;  ///< see EngineConfig
    u64 ns_per_1000_instructions = 1000;
    unsigned serial_ports = 2;
    std::string name = "machine";
    Log::Sink log;
    /// Run first and last on every vCPU thread.
    VcpuThread::Hooks thread_hooks;
    /// Takes the place of the engine that `engine` names (tests).
    std::function<std::unique_ptr<Engine>(const EngineConfig&)> make_engine;
};

class Machine {
  public:
    using Duration = RunControl::Duration;
    static constexpr Duration kForever = RunControl::kForever;
    /// How long pause() and stop() wait for the vCPUs to leave the guest. Engines need about a
    /// millisecond; only a device that does not return can take longer.
    static constexpr Duration kStopLimit = std::chrono::milliseconds(900);

    /// Builds it, not running. Throws ConfigError, EngineUnavailable, HostError.
    explicit Machine(MachineConfig config);
    /// Ends it and waits for its threads, however long a device takes to return.
    ~Machine();

    const MachineConfig& config() const { return config_; }
    const std::shared_ptr<GuestMemory>& memory() const { return memory_; }
    Bus& pio() { return pio_; }
    Bus& mmio() { return mmio_; }
    Clock& clock() { return clock_; }
    EventLoop& loop() { return loop_; }
    Log& log() { return log_; }
    Pc& pc() { return *pc_; }
    VirtioSlots& virtio() { return virtio_; }
    virtio::Environment virtio_environment() { return {*memory_, loop_, &log_}; }
    Engine& engine() { return *engine_; }
    /// What the CPUs have, as CPUID tells the guest.
    const FeatureSet& cpu_features() const { return cpu_features_; }
    u8 physical_bits() const { return physical_bits_; }
    const char* engine_name() const { return engine_->name(); }
    RunControl::Phase phase() const { return control_.phase(); }

    /// Throws StateMismatch when it was started before, HostError when threads cannot be made.
    void start();
    /// Returns when all vCPUs stand still and time with them. On a thread of the machine itself it
    /// only asks. Throws StateMismatch when not running, or when a device does not return.
    void pause();
    void resume();
    /// Ends it, and returns within a second with all vCPUs stopped; on a thread of the machine
    /// itself it only asks. Throws StateMismatch when a device does not return in time.
    void stop();
    /// Ends it with the given reason unless it has ended before. Returns at once; any thread.
    void request_end(StopInfo info);
    /// Waits for the end. True when it came; then stop_info() says how. Throws StateMismatch when
    /// the machine was never started, or on a thread of the machine itself.
    bool wait(Duration timeout = kForever);
    /// Waits until it stands still, paused (by a breakpoint or pause()) or at its end: phase() says
    /// which. False when it did not within `timeout`. Throws as wait() does.
    bool wait_stopped(Duration timeout = kForever);
    StopInfo stop_info() const { return control_.stop_info(); }

    /// A vCPU to look into. Throws StateMismatch unless it stands still, ConfigError for a bad
    /// index.
    Vcpu& vcpu(u32 index);
    const Vcpu& look(u32 index) const;
    /// Grows whenever registers of some vCPU may have changed: by running, by vcpu(). What was
    /// derived from them is good as long as this stays what it was before look() was called.
    u64 generation() const { return generation_.load(std::memory_order_acquire); }
    void note_registers() { generation_.fetch_add(1, std::memory_order_acq_rel); }
    /// Runs `instructions` of one vCPU on the calling thread (fewer if the machine ends), past
    /// breakpoints. On an engine without an instruction budget interrupts wait meanwhile. Throws
    /// StateMismatch unless created or paused.
    void step(u32 index, u64 instructions);
    void nmi(u32 index);
    /// See Breakpoints::add(): the page tables of CPU `index` count. Throws StateMismatch unless
    /// created or paused; so does removing one.
    u64 add_breakpoint(u32 index, u64 address, Breakpoint::Kind kind, u8 size);
    void remove_breakpoint(u64 id);
    const Breakpoints& breakpoints() const { return breakpoints_; }
    /// The calling thread is one of this machine's own.
    bool on_own_thread() const;

    struct Counter {
        std::string name;
        u64 value;
    };
    /// Exits and unclaimed accesses; the engine's own too while the vCPUs stand still.
    std::vector<Counter> counters();
    /// All that is counted anywhere. Any thread, in any phase.
    Statistics statistics();

  private:
    void kick();
    void settle();
    void check_standing(u32 index) const;
    bool serve_step(u32 index, Exit& exit);
    void arm_breakpoints();
    void start_loop();
    void note_views();
    void finish();
    void close_consoles();
    void check_index(u32 index) const;
    [[noreturn]] void wrong_phase(const char* wanted) const;

    MachineConfig config_;
    Log log_;
    std::shared_ptr<GuestMemory> memory_;
    Clock clock_;
    EventLoop loop_;
    Bus pio_{"pio", 0x10000};
    Bus mmio_{"mmio", bit(52)};
    Breakpoints breakpoints_;
    RunControl control_;
    FeatureSet cpu_features_;
    u8 physical_bits_ = 40;
    std::atomic<u64> generation_{1};
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<Pc> pc_;
    VirtioSlots virtio_{*this};
    std::vector<std::unique_ptr<Vcpu>> vcpus_;
    std::vector<std::unique_ptr<VcpuThread>> threads_;
    std::unique_ptr<HaltWatch> halt_watch_;  // with an engine's own local APICs
    std::mutex lifecycle_mutex_;
    std::atomic<u32> unfinished_{0};  // vCPU threads
    bool loop_started_ = false;
    bool finished_ = false;
};

}  // namespace polyvisor
