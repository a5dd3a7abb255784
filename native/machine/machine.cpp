#include "machine/machine.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "cpu/cpuid.hpp"
#include "machine/engines.hpp"
#include "machine/stepping.hpp"

namespace polyvisor {

namespace {

// The machine whose vCPU or event-loop thread this is.
thread_local const Machine* own_machine = nullptr;

const char* to_string(RunControl::Phase phase) {
    switch (phase) {
        case RunControl::Phase::kCreated:
            return "not started";
        case RunControl::Phase::kRunning:
            return "running";
        case RunControl::Phase::kPaused:
            return "paused";
        case RunControl::Phase::kEnded:
            return "at its end";
    }
    return "?";
}

// A frequency that is within what KVM itself tolerates counts as the host's own.
void choose_tsc(MachineConfig& config, const EngineOffer& offer) {
    constexpr u64 kTolerance = 250;  // parts per million
    if (config.tsc_khz == 0) {
        config.tsc_khz = offer.native_tsc_khz != 0 ? offer.native_tsc_khz : 1'000'000;
    }
    if (offer.tsc_scaling || offer.native_tsc_khz == 0) return;
    u64 off = std::max(config.tsc_khz, offer.native_tsc_khz) -
              std::min(config.tsc_khz, offer.native_tsc_khz);
    if (off * 1'000'000 <= offer.native_tsc_khz * kTolerance) return;
    std::string wanted = std::to_string(config.tsc_khz) + " kHz";
    std::string own = std::to_string(offer.native_tsc_khz) + " kHz";
    if (config.portable) {
        throw ConfigError("tsc_khz", "a portable machine's TSC runs at " + own + " here, as an " +
                                         "engine cannot scale it to " + wanted +
                                         "; leave tsc_khz out");
    }
    throw ConfigError("tsc_khz",
                      "engine " + config.engine + " cannot scale the TSC on this host: " + wanted +
                          " is not its own " + own + "; leave tsc_khz out, or take engine soft");
}

// Notes, at the end of what runs vCPUs, that their registers are no longer what they were. At its
// end and not before: who looks at them in between has seen a number that is out of date then.
class RegistersChange {
  public:
    explicit RegistersChange(Machine& machine) : machine_(machine) {}
    ~RegistersChange() { machine_.note_registers(); }
    RegistersChange(const RegistersChange&) = delete;
    RegistersChange& operator=(const RegistersChange&) = delete;

  private:
    Machine& machine_;
};

// All RAM has to have an address: above 3 GiB it goes on behind the hole for devices.
void check_memory(u64 size, u8 physical_bits) {
    u64 most = bit(physical_bits) - (PcLayout::kHoleEnd - PcLayout::kHoleStart);
    if (size <= PcLayout::kHoleStart || size <= most) return;
    throw ConfigError("memory", "a machine on this host can have at most " +
                                    std::to_string(most >> 30) + " GiB of memory, as its CPU has " +
                                    std::to_string(physical_bits) + " address bits");
}

IrqchipMode choose_irqchip(const MachineConfig& config, const EngineOffer& offer) {
    const std::string& name = config.irqchip;
    if (name == "user" || (name == "auto" && !offer.irqchip)) return IrqchipMode::kUser;
    if (name == "auto") return IrqchipMode::kKernel;
    bool split = name == "split";
    if (!split && name != "kernel") {
        throw ConfigError("irqchip", "there is no irqchip mode '" + name +
                                         "'; choose one of auto, user, split, kernel");
    }
    if (!offer.irqchip) {
        throw ConfigError("irqchip", "engine " + config.engine +
                                         " has no interrupt chips of its own; give irqchip user");
    }
    return split ? IrqchipMode::kSplit : IrqchipMode::kKernel;
}

}  // namespace

Machine::Machine(MachineConfig config)
    : config_(std::move(config)),
      log_(config_.log),
      memory_(std::make_shared<GuestMemory>()),
      clock_(config_.deterministic ? Clock::Mode::kDeterministic : Clock::Mode::kFreeRunning),
      loop_(clock_),
      breakpoints_(*memory_),
      control_(config_.cpus, [this] { kick(); }, [this] { settle(); }) {
    if (config_.cpus == 0) throw ConfigError("cpus", "a machine needs at least one CPU");
    if (config_.deterministic && config_.cpus != 1) {
        throw ConfigError("cpus",
                          "deterministic mode runs one CPU, not " + std::to_string(config_.cpus));
    }
    EngineOffer offer;
    if (!config_.make_engine) {
        EngineChoice choice = choose_engine(config_.engine, config_.deterministic);
        if (!choice.note.empty()) log_.note("engine", choice.note);
        config_.engine = choice.name;
        offer = engine_offer(config_.engine, config_.portable);
    }
    choose_tsc(config_, offer);
    clock_.set_tsc_khz(config_.tsc_khz);
    clock_.pause();  // until start()
    clock_.set(0);

    IrqchipMode irqchip = choose_irqchip(config_, offer);
    CpuidPolicy cpuid;
    if (config_.make_engine) {
        cpuid.cpus = config_.cpus;
        cpuid.tsc_khz = config_.tsc_khz;
    } else {
        FeatureSet features = offer.features;
        if (irqchip != IrqchipMode::kUser) features = features | offer.irqchip_features;
        CpuidOptions options{offer.physical_bits, offer.arch_capabilities, config_.cpu_features};
        cpuid =
            make_cpuid_policy(config_.cpu_model, features, config_.cpus, config_.tsc_khz, options);
    }
    if (config_.hugepages == "auto")
        config_.hugepages = offer.nested_paging ? "transparent" : "none";
    check_memory(config_.memory, cpuid.physical_bits);
    add_pc_memory(*memory_, config_.memory, parse_huge_pages(config_.hugepages));
    PcConfig pc;
    pc.cpus = config_.cpus;
    pc.serial_ports = config_.serial_ports;
    pc.physical_bits = cpuid.physical_bits;
    if (!config_.make_engine) {
        pc.x2apic = cpuid.features.has(Feature::kX2apic);
        pc.tsc_deadline = cpuid.features.has(Feature::kTscDeadline);
    }

    cpu_features_ = cpuid.features;
    physical_bits_ = cpuid.physical_bits;
    EngineConfig engine{*memory_, pio_, mmio_, clock_, std::move(cpuid)};
    engine.irqchip = irqchip;
    engine.cpus = config_.cpus;
    engine.dirty_ring = config_.dirty_ring;
    engine.log = &log_;
    engine.deterministic = config_.deterministic;
    engine.ns_per_1000_instructions = config_.ns_per_1000_instructions;
    engine_ =
        config_.make_engine ? config_.make_engine(engine) : create_engine(config_.engine, engine);
    pc.chips = engine_->chips();
    pc_ = std::make_unique<Pc>(pc, clock_, pio_, mmio_, log_,
                               [this](StopInfo info) { request_end(std::move(info)); });
    if (config_.deterministic && !engine_->caps().deterministic) {
        throw ConfigError("deterministic", std::string("engine ") + engine_->name() +
                                               " has no deterministic mode; take engine soft");
    }
    for (u32 cpu = 0; cpu < config_.cpus; ++cpu) {
        vcpus_.push_back(engine_->create_vcpu(cpu, pc_->interrupts(cpu)));
        pc_->connect(cpu, *vcpus_.back());
        vcpus_.back()->restore(reset_state(cpu == 0));
        threads_.push_back(
            std::make_unique<VcpuThread>(*vcpus_.back(), control_, breakpoints_, log_));
    }
    if (engine_->chips() != nullptr) {
        halt_watch_ = std::make_unique<HaltWatch>(clock_, control_, threads_);
    }
}

Machine::~Machine() {
    request_end({StopReason::kStopped, 0, "the machine was destroyed", 0});
    control_.wait_ended(kForever);
    finish();
    memory_->set_write_observer({});  // views of the memory may outlive the engine
}

void Machine::kick() {
    for (auto& vcpu : vcpus_) vcpu->request_stop();
}

// All vCPUs have left the guest, paused or at the end. On the thread of the last one.
void Machine::settle() {
    breakpoints_.withdraw();
    virtio_.pause();
    if (control_.phase() != RunControl::Phase::kPaused) return;
    clock_.pause();
    pc_->flush();
}

void Machine::start_loop() {
    if (loop_started_) return;
    loop_started_ = true;
    pc_->finish_wiring();
    loop_.post([this] { own_machine = this; });
    loop_.start();
}

// Stores through views of the memory are not seen as they happen; those that may have hit code are
// told to the engine before it runs on.
void Machine::note_views() {
    for (const auto& region : memory_->regions())
        memory_->recheck_code(region->start, region->size);
}

void Machine::start() {
    std::lock_guard lock(lifecycle_mutex_);
    if (control_.phase() != RunControl::Phase::kCreated) wrong_phase("not started before");
    RegistersChange change(*this);
    BlockedSignals blocked;
    start_loop();
    note_views();
    clock_.resume();
    virtio_.resume();
    arm_breakpoints();
    if (!control_.start()) {  // ended meanwhile
        breakpoints_.withdraw();
        wrong_phase("not started before");
    }
    VcpuThread::Hooks hooks;
    hooks.started = [this] {
        own_machine = this;
        if (config_.thread_hooks.started) config_.thread_hooks.started();
    };
    hooks.finished = [this] {
        if (config_.thread_hooks.finished) config_.thread_hooks.finished();
        if (--unfinished_ == 0) close_consoles();
    };
    unfinished_ = static_cast<u32>(threads_.size());
    try {
        for (auto& thread : threads_) thread->start(hooks);
        if (halt_watch_) halt_watch_->start();
    } catch (const Error& error) {
        request_end({StopReason::kEngineFailure, 0, error.what(), 0});
        control_.wait_ended(kStopLimit);
        breakpoints_.withdraw();
        throw;
    }
}

void Machine::pause() {
    if (on_own_thread()) {
        if (!control_.request_pause()) wrong_phase("running");
        return;
    }
    std::lock_guard lock(lifecycle_mutex_);
    if (!control_.request_pause() && control_.phase() != RunControl::Phase::kPaused) {
        wrong_phase("running");
    }
    if (!control_.wait_quiet(kStopLimit)) {
        throw StateMismatch("machine '" + config_.name +
                            "' cannot pause: a device does not return from a guest's access");
    }
    clock_.pause();
    pc_->flush();
}

void Machine::resume() {
    std::lock_guard lock(lifecycle_mutex_);
    if (control_.phase() != RunControl::Phase::kPaused) wrong_phase("paused");
    if (!control_.wait_quiet(kStopLimit)) wrong_phase("paused");
    RegistersChange change(*this);
    note_views();
    clock_.resume();
    virtio_.resume();
    arm_breakpoints();
    if (control_.resume()) return;
    breakpoints_.withdraw();
    // It may have ended while a CPU was led past a breakpoint; then wait() tells how.
    if (control_.phase() != RunControl::Phase::kEnded) wrong_phase("paused");
}

void Machine::arm_breakpoints() {
    breakpoints_.arm(vcpus_, [this](Vcpu& vcpu) {
        breakpoints_.forget_armed();
        single_step(vcpu, *memory_, 1, [&](Exit& exit) { return serve_step(vcpu.id(), exit); });
    });
}

void Machine::request_end(StopInfo info) {
    control_.end(std::move(info));
}

void Machine::stop() {
    request_end({StopReason::kStopped, 0, "", 0});
    if (on_own_thread()) return;
    if (!control_.wait_ended(kStopLimit)) {
        throw StateMismatch("machine '" + config_.name +
                            "' cannot stop: a device does not return from a guest's access");
    }
    finish();
}

bool Machine::wait(Duration timeout) {
    if (on_own_thread()) {
        throw StateMismatch("a device or timer cannot wait for the end of its own machine");
    }
    if (control_.phase() == RunControl::Phase::kCreated) wrong_phase("started");
    if (!control_.wait_ended(timeout)) return false;
    finish();
    return true;
}

bool Machine::wait_stopped(Duration timeout) {
    if (on_own_thread()) {
        throw StateMismatch("a device or timer cannot wait for its own machine");
    }
    if (control_.phase() == RunControl::Phase::kCreated) wrong_phase("started");
    if (!control_.wait_stopped(timeout)) return false;
    if (control_.phase() == RunControl::Phase::kEnded) wait();
    return true;
}

// After the end, with all vCPU threads out of the guest: nothing of the machine runs any more.
void Machine::finish() {
    std::lock_guard lock(lifecycle_mutex_);
    if (finished_) return;
    finished_ = true;
    for (auto& thread : threads_) thread->join();
    clock_.pause();
    loop_.stop();
    close_consoles();
}

// The guest says no more: what it said last reaches the readers, and they stop waiting.
void Machine::close_consoles() {
    pc_->flush();
    for (unsigned port = 0; port < pc_->serial_ports(); ++port) pc_->console(port)->close();
    pc_->debug_console()->close();
    for (const auto& place : virtio_.places()) place.device->machine_ended();
}

Vcpu& Machine::vcpu(u32 index) {
    look(index);
    note_registers();
    return *vcpus_[index];
}

const Vcpu& Machine::look(u32 index) const {
    check_index(index);
    if (!control_.quiet()) wrong_phase("paused");
    return *vcpus_[index];
}

void Machine::check_standing(u32 index) const {
    check_index(index);
    RunControl::Phase phase = control_.phase();
    if ((phase != RunControl::Phase::kCreated && phase != RunControl::Phase::kPaused) ||
        !control_.quiet()) {
        wrong_phase("paused");
    }
}

// What to do with an exit of a vCPU that is stepped. False: no further.
bool Machine::serve_step(u32 index, Exit& exit) {
    StopInfo stop;
    Next next = handle_exit(exit, index, log_, stop);
    if (next == Next::kEnd) control_.end(std::move(stop));
    return next != Next::kHalted && control_.phase() != RunControl::Phase::kEnded;
}

void Machine::step(u32 index, u64 instructions) {
    std::lock_guard lock(lifecycle_mutex_);
    check_standing(index);
    RegistersChange change(*this);
    {
        BlockedSignals blocked;
        start_loop();
    }
    note_views();
    Vcpu& vcpu = *vcpus_[index];
    clock_.resume();
    virtio_.resume();
    breakpoints_.forget_armed();
    if (!engine_->caps().instruction_budget) {
        single_step(vcpu, *memory_, instructions,
                    [&](Exit& exit) { return serve_step(index, exit); });
        virtio_.pause();
        clock_.pause();
        return;
    }
    vcpu.set_debug({});
    u64 last = vcpu.save().instructions + instructions;
    for (u64 now = last - instructions; now < last; now = vcpu.save().instructions) {
        vcpu.set_instruction_budget(last - now);
        Exit exit = vcpu.run();
        if (!serve_step(index, exit)) break;
    }
    vcpu.set_instruction_budget(~u64{0});
    virtio_.pause();
    clock_.pause();
}

void Machine::nmi(u32 index) {
    check_index(index);
    vcpus_[index]->nmi();
}

u64 Machine::add_breakpoint(u32 index, u64 address, Breakpoint::Kind kind, u8 size) {
    std::lock_guard lock(lifecycle_mutex_);
    check_standing(index);
    return breakpoints_.add(vcpus_, index, address, kind, size);
}

void Machine::remove_breakpoint(u64 id) {
    std::lock_guard lock(lifecycle_mutex_);
    check_standing(0);
    breakpoints_.remove(id);
}

bool Machine::on_own_thread() const {
    return own_machine == this;
}

void Machine::check_index(u32 index) const {
    if (index >= vcpus_.size()) {
        throw ConfigError("index", "there is no CPU " + std::to_string(index) + "; machine '" +
                                       config_.name + "' has " + std::to_string(vcpus_.size()));
    }
}

void Machine::wrong_phase(const char* wanted) const {
    throw StateMismatch("machine '" + config_.name + "' is " + to_string(control_.phase()) +
                        ", but must be " + wanted + " for this");
}

std::vector<Machine::Counter> Machine::counters() {
    std::vector<Counter> result;
    result.push_back({"unclaimed port accesses", pio_.unclaimed()});
    result.push_back({"unclaimed memory accesses", mmio_.unclaimed()});
    for (const Log::Count& count : log_.counts()) {
        result.push_back({"log: " + count.topic, count.count});
    }
    bool quiet = control_.quiet();
    for (u32 cpu = 0; cpu < vcpus_.size(); ++cpu) {
        std::string prefix = "cpu" + std::to_string(cpu) + ": ";
        for (unsigned n = 0; n < ExitCounters::kReasons; ++n) {
            auto reason = static_cast<ExitReason>(n);
            if (u64 count = threads_[cpu]->counters().of(reason); count != 0) {
                result.push_back({prefix + "exits " + polyvisor::to_string(reason), count});
            }
        }
        for (const Vcpu::Counter& counter : vcpus_[cpu]->exits()) {
            result.push_back({prefix + engine_name() + " exits " + counter.name, counter.value});
        }
        if (!quiet) continue;
        for (const Vcpu::Counter& counter : vcpus_[cpu]->counters()) {
            result.push_back({prefix + counter.name, counter.value});
        }
    }
    return result;
}

}  // namespace polyvisor
