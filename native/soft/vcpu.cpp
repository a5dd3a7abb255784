// The run loop of a soft vCPU: requests, interrupts, blocks, faults, halting and virtual time.
#include "soft/vcpu.hpp"

#include <algorithm>
#include <chrono>

#include "soft/host_mxcsr.hpp"
#include "soft/soft_tlb.hpp"
#include "soft/system.hpp"
#include "soft/translate.hpp"

namespace polyvisor::soft {

namespace {

// Instructions between two looks at the clock when nothing else asks for attention. In
// deterministic mode timers cut it short.
constexpr s64 kSlice = 1 << 20;

// The host's MXCSR holds the guest's while guest code runs, exceptions masked (soft/frame.hpp).
class GuestMxcsr {
  public:
    explicit GuestMxcsr(VcpuFrame& f) : f_(f) {
        asm volatile("stmxcsr %0" : "=m"(host_));
        u32 guest = (f.mxcsr | 0x1f80) & 0xffff;
        asm volatile("ldmxcsr %0" ::"m"(guest));
    }
    ~GuestMxcsr() {
        u32 guest;
        asm volatile("stmxcsr %0" : "=m"(guest));
        f_.mxcsr = (f_.mxcsr & 0x1f80) | (guest & ~0x1f80u);
        asm volatile("ldmxcsr %0" ::"m"(host_));
    }

  private:
    VcpuFrame& f_;
    u32 host_;
};

Exit stop_exit(ExitReason reason, const char* text = "") {
    Exit exit;
    exit.reason = reason;
    exit.text = text;
    return exit;
}

}  // namespace

Environment& environment(VcpuFrame& f) {
    return f.vcpu->env;
}
const Environment& environment(const VcpuFrame& f) {
    return f.vcpu->env;
}

u64 read_tsc(VcpuFrame& f) {
    SoftVcpu& vcpu = *f.vcpu;
    Clock& clock = vcpu.env.clock;
    if (vcpu.env.deterministic) vcpu.advance_clock();
    return clock.tsc() + f.msr.tsc_offset;
}

SoftVcpu::SoftVcpu(const EngineConfig& config, CodePages& pages, SoftDirtyLog& dirty_log, u32 id,
                   LocalInterrupts* lapic)
    : env{config.memory,
          config.pio,
          config.mmio,
          config.clock,
          config.cpuid,
          lapic,
          config.log,
          id,
          config.deterministic,
          config.hypercall_exits,
          {}},
      tables(config.memory),
      blocks(frame, config.memory, pages),
      dirty_log_(dirty_log),
      ns_per_1000_(config.ns_per_1000_instructions),
      generic_only_(config.reference) {
    frame.vcpu = this;
    frame.jump_cache = &jump_cache_;
    frame.physical_mask = bit(env.cpuid.physical_bits) - 1;
    frame.tlb_now = &frame.tlb[kTlbSupervisorAc];
    clear_tlbs(frame);
    restore(reset_state(id == 0));
    dirty_log_.add(this);
}

SoftVcpu::~SoftVcpu() {
    dirty_log_.remove(this);
}

// --- Requests from other threads -----------------------------------------------------------------

void SoftVcpu::request(u32 bits) {
    u32 before = frame.irq_req.fetch_or(bits);
    if ((before & bits) != bits) {
        std::lock_guard lock(halt_mutex_);
        halt_wake_.notify_all();
    }
}

void SoftVcpu::request_stop() {
    request(kRequestStop);
}

void SoftVcpu::sipi(u8 vector) {
    sipi_vector_.store(vector);
    request(kRequestSipi);
}

// The store to passage_ and the look at irq_req stand in this order, those of post_rearm() in the
// other: at least one of the two threads sees what the other did.
void SoftVcpu::enter_guest() {
    passage_.store(passage_.load(std::memory_order_relaxed) + 1);
    if (PV_UNLIKELY(frame.irq_req.load() & kRequestRearm)) drop_writable(frame);
}

void SoftVcpu::rearm() {
    drop_writable(frame);
    passage_.store(passage_.load(std::memory_order_relaxed) + 2);
}

// Takes up what others asked for. True: run() must return `exit`.
bool SoftVcpu::take_requests(Exit& exit) {
    u32 bits = frame.irq_req.exchange(0);
    if (bits & kRequestRearm) rearm();
    if (bits & kRequestInvalidate) blocks.process_posted();
    if (bits & kRequestInit) {
        init_reset(frame, id() == 0);
        if (env.lapic != nullptr) env.lapic->reset(true);
        halt_reported_ = false;
    }
    if ((bits & kRequestSipi) && frame.activity == Activity::kWaitForSipi) {
        start_up(frame, sipi_vector_.load());
    }
    if (bits & kRequestNmi) frame.nmi_pending = true;
    if (bits & kRequestInterrupt) interrupt_waiting_ = true;
    if (bits & kRequestStop) {
        exit = stop_exit(ExitReason::kInterrupted);
        return true;
    }
    return false;
}

// Delivers an NMI or an interrupt when one can be taken now. True: run() must return `exit`.
bool SoftVcpu::deliver_pending(Exit& exit) {
    if (frame.shadow || frame.activity == Activity::kWaitForSipi ||
        frame.activity == Activity::kShutdown) {
        return false;
    }
    bool ok = true;
    if (frame.nmi_pending && !frame.nmi_blocked) {
        frame.nmi_pending = false;
        frame.nmi_blocked = true;
        frame.activity = Activity::kRunning;
        ok = deliver_event(frame, kNmi, EventType::kNmi);
    } else if (interrupt_waiting_ && (frame.rflags_rest & kFlagI)) {
        interrupt_waiting_ = env.lapic != nullptr && env.lapic->pending();
        if (!interrupt_waiting_) return false;
        int vector = env.lapic->acknowledge();
        if (vector < 0) return false;
        ++stats.interrupts;
        frame.activity = Activity::kRunning;
        ok = deliver_event(frame, static_cast<u8>(vector), EventType::kExternal);
    }
    if (!ok) exit = stop_exit(ExitReason::kShutdown, "triple fault");
    return !ok;
}

// --- Time ----------------------------------------------------------------------------------------

u64 SoftVcpu::instructions_now() const {
    u64 done = frame.retired + static_cast<u64>(slice_ - frame.budget);
    if (frame.block != nullptr && frame.uop != nullptr) {
        done -= frame.block->instructions - frame.uop->number;
    }
    return done;
}

// Deterministic mode: virtual time follows the instruction count.
void SoftVcpu::advance_clock() {
    u64 count = instructions_now();
    env.clock.advance_to(
        frame.time_base +
        static_cast<u64>(static_cast<u128>(count - frame.count_base) * ns_per_1000_ / 1000));
}

void SoftVcpu::run_timers() {
    OutsideGuest outside(*this);
    HostMxcsr usual_mxcsr;
    env.clock.run_expired();
}

s64 SoftVcpu::slice_length() {
    u64 length = kSlice;
    if (env.deterministic) {
        Nanoseconds next = env.clock.next_deadline();
        if (next != kNever) {
            Nanoseconds now = env.clock.now();
            u64 ns = next > now ? next - now : 0;
            u128 until = static_cast<u128>(ns) * 1000 / std::max<u64>(ns_per_1000_, 1) + 1;
            if (until < length) length = std::max<u64>(static_cast<u64>(until), kMaxBlock);
        }
    }
    return static_cast<s64>(std::min(length, remaining_));
}

// HLT and wait-for-SIPI. True: run() must return `exit`; false: look at the requests again.
bool SoftVcpu::wait_while_halted(Exit& exit) {
    if (frame.activity == Activity::kHalted && !(frame.rflags_rest & kFlagI) && !halt_reported_) {
        halt_reported_ = true;
        exit = stop_exit(ExitReason::kHalt);
        return true;
    }
    if (env.deterministic) {
        Nanoseconds next = env.clock.next_deadline();
        if (next != kNever) {
            // Virtual time jumps to what the CPU waits for.
            env.clock.advance_to(next);
            frame.time_base = env.clock.now();
            frame.count_base = frame.retired;
            run_timers();
            return false;
        }
    }
    OutsideGuest outside(*this);
    std::unique_lock lock(halt_mutex_);
    halt_wake_.wait(lock, [&] { return frame.irq_req.load() != 0; });
    return false;
}

// --- The loop ------------------------------------------------------------------------------------

Exit SoftVcpu::run() {
    GuestMxcsr mxcsr(frame);
    InGuest inside(*this);
    Exit exit;
    for (;;) {
        if (frame.irq_req.load(std::memory_order_relaxed) != 0 && take_requests(exit)) return exit;
        if (PV_UNLIKELY(frame.event.kind != InFlightEvent::Kind::kNone) &&
            frame.activity <= Activity::kHalted && !deliver_in_flight(frame)) {
            return stop_exit(ExitReason::kShutdown, "triple fault");
        }
        if (PV_UNLIKELY(host_hits_ != 0) && host_step_done(exit)) return exit;
        if (PV_UNLIKELY(frame.mode & kModeStep) && holds_events()) {
            wake_without_event();
        } else if (deliver_pending(exit)) {
            return exit;
        }
        if (remaining_ == 0) return stop_exit(ExitReason::kInterrupted);
        if (frame.activity == Activity::kShutdown) {
            return stop_exit(ExitReason::kShutdown, "triple fault");
        }
        if (frame.activity != Activity::kRunning) {
            if (wait_while_halted(exit)) return exit;
            continue;
        }
        halt_reported_ = false;  // it runs: a further HLT is another one
        slice_ = frame.budget = slice_length();
        dispatch();
        u64 ran = static_cast<u64>(slice_ - frame.budget);
        frame.retired += ran;
        if (remaining_ != ~u64{0}) remaining_ -= std::min(ran, remaining_);
        slice_ = frame.budget = 0;
        frame.uop = nullptr;
        if (env.deterministic) {
            advance_clock();
            run_timers();
        }
        if (frame.fault.pending == Pending::kExit) {
            frame.fault = {};
            return std::exchange(env.exit, {});
        }
        if (frame.fault.pending == Pending::kRestart) {
            frame.fault = {};
        } else if (frame.fault.pending == Pending::kException) {
            ++stats.faults;
            if (!deliver_fault(frame)) {
                return stop_exit(ExitReason::kShutdown, "triple fault");
            }
        }
    }
}

// Runs blocks until something needs run()'s attention: a request, a fault, the end of the slice, a
// halt, or an interrupt that can be taken now.
void SoftVcpu::dispatch() {
    frame.link_slot_valid = false;  // an event may have moved RIP since the last block was left
    while (frame.irq_req.load(std::memory_order_relaxed) == 0) {
        // Without breakpoints RF has nothing to hold back (SDM 3B, 17.3.1.1).
        if (!(frame.dr7 & 0xff)) frame.rflags_rest &= ~u64{kFlagRf};
        bool single = frame.shadow || (frame.mode & kModeStep);
        u32 mode = frame.mode | (single ? kModeStep : 0u);
        Block* from = frame.link_slot_valid && !single ? frame.block : nullptr;
        frame.link_slot_valid = false;
        frame.uop = nullptr;
        if (frame.budget <= 0) return;  // before the next fetch can fault
        Block* block = find_block(mode);
        if (block == nullptr) return;
        if (block->instructions > frame.budget) {
            // The slice is over, unless it is the caller's budget that must be met exactly.
            if (frame.budget <= 0 || remaining_ > static_cast<u64>(slice_)) return;
            single = true;
            block = find_block(mode | kModeStep);
            if (block == nullptr) return;
        }
        ++stats.dispatches;
        if (from != nullptr && !single && from->mode == block->mode && from->epoch != kDeadEpoch) {
            from->next[frame.link_slot] = block;
        }
        bool trap = frame.rflags_rest & kFlagT;
        bool shadow = frame.shadow;
        if (PV_UNLIKELY(frame.mode & kModeStep) && !before_step()) return;
        if (single && shadow) frame.shadow = frame.shadow_ss = false;
        frame.budget -= block->instructions;
        frame.block = block;
        frame.block_dead = false;
        for (const Uop* u = block->uops; u != nullptr;) u = u->run(u, &frame);
        if (single && frame.link_slot_valid) frame.link_slot_valid = false;
        if (PV_UNLIKELY(trap || (frame.mode & kModeStep) || frame.debug_hits)) after_step(trap);
        if (frame.fault.pending != Pending::kNone) return;
        if (frame.activity != Activity::kRunning) return;
        if (PV_UNLIKELY(host_hits_ != 0)) return;
        if (interrupt_waiting_ && (frame.rflags_rest & kFlagI) && !frame.shadow) return;
        if (frame.nmi_pending && !frame.nmi_blocked) return;
        if (PV_UNLIKELY(blocks.full())) blocks.flush();
    }
}

CpuState SoftVcpu::save() const {
    CpuState state;
    save_state(frame, state);
    state.instructions = frame.retired;
    return state;
}

GeneralRegisters SoftVcpu::general() const {
    GeneralRegisters registers;
    std::copy_n(frame.gpr, 16, registers.gpr.begin());
    registers.rip = frame.rip;
    registers.rflags = frame.rflags();
    return registers;
}

void SoftVcpu::set_general(const GeneralRegisters& registers) {
    std::copy_n(registers.gpr.begin(), 16, frame.gpr);
    frame.rip = registers.rip;
    frame.set_rflags(registers.rflags);
}

void SoftVcpu::restore(const CpuState& state) {
    validate(state);
    load_state(frame, state);
    frame.retired = state.instructions;
    frame.time_base = env.clock.now();
    frame.count_base = frame.retired;
    frame.fault = {};
    frame.link_slot_valid = false;
    interrupt_waiting_ = true;  // look once
    halt_reported_ = false;
    host_hits_ = 0;
}

bool SoftVcpu::translate(u64 gva, u64& gpa) const {
    TableReader reader(env.memory);
    WalkResult result = walk_pure(reader, paging, gva, {});
    if (result.fault) return false;
    gpa = result.page.gpa;
    return true;
}

std::vector<Vcpu::Counter> SoftVcpu::counters() const {
    return {{"instructions", frame.retired},
            {"blocks_made", blocks.blocks_made()},
            {"blocks_dropped", blocks.blocks_dropped()},
            {"dispatches", stats.dispatches},
            {"revalidations", stats.revalidations},
            {"tlb_fills", stats.tlb_fills},
            {"tlb_flushes", stats.tlb_flushes},
            {"slow_accesses", stats.slow_accesses},
            {"code_stores", stats.code_stores},
            {"mmio", stats.mmio},
            {"faults", stats.faults},
            {"interrupts", stats.interrupts}};
}

}  // namespace polyvisor::soft
