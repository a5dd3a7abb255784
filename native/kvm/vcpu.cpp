#include "kvm/vcpu.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kvm/bus_hooks.hpp"
#include "kvm/chips.hpp"
#include "kvm/convert.hpp"
#include "kvm/cpu_state.hpp"
#include "kvm/exit_names.hpp"
#include "kvm/ioctl.hpp"
#include "kvm/kick.hpp"
#include "mmu/walker.hpp"

namespace polyvisor::kvm {

namespace {

constexpr u64 kInterruptFlag = bit(9);
// What both engines' guests see of machine checks: ten banks that never report any.
constexpr u64 kMceBanks = 10;
constexpr u32 kArchCapabilitiesMsr = 0x10a;

void set_immediate_exit(kvm_run& run, u8 on) {
    std::atomic_ref<u8>(run.immediate_exit).store(on, std::memory_order_seq_cst);
}

thread_local int known_thread = 0;

// gettid(), without a system call at every exit.
int this_thread() {
    static const int forks = ::pthread_atfork(nullptr, nullptr, [] { known_thread = 0; });
    if (PV_UNLIKELY(known_thread == 0)) known_thread = ::gettid();
    return forks == 0 ? known_thread : ::gettid();
}

// The thread that is about to enter the guest, so that requests find it.
class Entered {
  public:
    /// Throws StateMismatch when another thread is in there: KVM would make this one wait.
    Entered(std::atomic<int>& thread, u32 cpu) : thread_(thread) {
        accept_kicks();
        int nobody = 0;
        if (thread_.compare_exchange_strong(nobody, this_thread())) return;
        throw StateMismatch("CPU " + std::to_string(cpu) + " is running on another thread already");
    }
    ~Entered() { thread_ = 0; }

  private:
    std::atomic<int>& thread_;
};

}  // namespace

KvmVcpu::KvmVcpu(Vm& vm, u32 id, LocalInterrupts* lapic)
    : vm_(vm),
      id_(id),
      lapic_(lapic),
      fd_(vm.create_vcpu(id)),
      stats_(vm.bare() ? StatsFile(OwnedFd()) : StatsFile(fd_.get())),
      mapping_(fd_.get(), 0, vm.system().vcpu_mmap_size()),
      run_(reinterpret_cast<kvm_run*>(mapping_.data())),
      cpuid_(make_cpuid(vm.config().cpuid, vm.system(), id)) {
    WithEntries<kvm_cpuid2> cpuid(cpuid_.size());
    cpuid->nent = static_cast<u32>(cpuid_.size());
    std::copy(cpuid_.begin(), cpuid_.end(), cpuid->entries);
    call_ioctl(fd(), KVM_SET_CPUID2, cpuid.head());
    // What a program at CPL 3 never sees.
    const bool whole = !vm.bare();
    if (whole && vm.config().cpuid.features.has(Feature::kArchCapabilities)) {
        WithEntries<kvm_msrs> msrs(1);
        msrs->nmsrs = 1;
        msrs->entries[0].index = kArchCapabilitiesMsr;
        msrs->entries[0].data = vm.config().cpuid.arch_capabilities;
        call_ioctl(fd(), KVM_SET_MSRS, msrs.head());
    }

    u64 host_khz = vm.system().tsc_khz();
    u64 khz = vm_.config().clock.tsc_khz();
    if (khz != host_khz) {
        call_ioctl(fd(), KVM_SET_TSC_KHZ, khz);
        host_khz = static_cast<u64>(call_ioctl(fd(), KVM_GET_TSC_KHZ, 0L)) == khz ? host_khz : khz;
    }
    vm_.clock().set_host_khz(host_khz);
    tsc_attribute_ = vm_.system().tsc_offset_works(fd());
    if (whole && vm_.config().cpuid.features.has(Feature::kMca)) {
        u64 banks = kMceBanks;
        try_ioctl(fd(), KVM_X86_SETUP_MCE, &banks);
    }
    if (vm_.bare() && (vm_.check(KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_REGS)) {
        run_->kvm_valid_regs = KVM_SYNC_X86_REGS;
    }
    vm_.register_vcpu(id_, this);
    if (id_ == 0) vm_.bus_hooks().set_ring(run_);
}

KvmVcpu::~KvmVcpu() {
    if (id_ == 0) vm_.bus_hooks().set_ring(nullptr);
    vm_.register_vcpu(id_, nullptr);
}

void KvmVcpu::set_instruction_budget(u64 instructions) {
    if (instructions == ~u64{0}) return;
    throw StateMismatch("engine kvm cannot count instructions; single-step instead");
}

// --- Requests from other threads -----------------------------------------------------------------

// The order matters: whoever clears immediate_exit looks at requests_ afterwards, so a request is
// either seen there or makes KVM_RUN return.
void KvmVcpu::request(u32 bits) {
    u32 before = requests_.fetch_or(bits);
    if ((before & bits) == bits) return;
    set_immediate_exit(*run_, 1);
    int thread = thread_.load();
    if (thread != 0 && thread != this_thread()) kick(thread);
    if (user_lapic()) {
        std::lock_guard lock(halt_mutex_);
        halt_wake_.notify_all();
    }
}

void KvmVcpu::sipi(u8 vector) {
    sipi_vector_ = vector;
    request(kSipi);
}

// Takes up what others asked for. True: run() must return `exit`.
bool KvmVcpu::take_requests(Exit& exit) {
    set_immediate_exit(*run_, 0);
    u32 bits = requests_.exchange(0);
    if (bits & (kStop | kInit | kSipi)) complete();
    if (bits & kInit) enter_init();
    if ((bits & kSipi) && activity_ == Activity::kWaitForSipi) enter_sipi(sipi_vector_);
    if (bits & kNmi) {
        call_ioctl(fd(), KVM_NMI, 0L);
        if (activity_ == Activity::kHalted) activity_ = Activity::kRunning;
    }
    if (bits & kInterrupt) interrupt_waiting_ = true;
    if (bits & kStop) {
        debug_.leave();
        exit = {};
        return true;
    }
    return false;
}

// INIT and start-up IPI of our own local APIC (SDM 3A, table 9-1 and 8.4); KVM's does without us.
void KvmVcpu::enter_init() {
    CpuState before = save();
    CpuState state = reset_state(id_ == 0);
    state.cr0 = (before.cr0 & (bit(29) | bit(30))) | bit(4);
    state.xcr0 = before.xcr0;
    state.fpu = before.fpu;
    u64 efer = state.msr.efer;
    state.msr = before.msr;
    state.msr.efer = efer;
    if (lapic_ != nullptr) lapic_->reset(true);
    restore(state);
}

void KvmVcpu::enter_sipi(u8 vector) {
    CpuState state = save();
    state.segments[kCs].selector = static_cast<u16>(vector << 8);
    state.segments[kCs].base = u64{vector} << 12;
    state.rip = 0;
    state.activity = Activity::kRunning;
    restore(state);
}

// kUser: HLT and wait-for-SIPI. True: run() must return `exit`; false: look at the requests again.
bool KvmVcpu::wait_while_halted(Exit& exit) {
    if (activity_ == Activity::kHalted) {
        if (run_->if_flag != 0 && lapic_ != nullptr && lapic_->pending()) {
            activity_ = Activity::kRunning;
            interrupt_waiting_ = true;
            return false;
        }
        if (run_->if_flag == 0 && !halt_reported_) {
            halt_reported_ = true;
            exit = {};
            exit.reason = ExitReason::kHalt;
            return true;
        }
    }
    std::unique_lock lock(halt_mutex_);
    halt_wake_.wait(lock, [this] { return requests_.load() != 0; });
    return false;
}

// Hands KVM the next interrupt of our own local APIC or 8259s, or asks for an exit when the guest
// can take it.
void KvmVcpu::inject() {
    if (user_lapic()) run_->cr8 = cr8_ = lapic_->cr8();
    if (PV_UNLIKELY(debug_.stepping())) {  // interrupts wait
        run_->request_interrupt_window = 0;
        return;
    }
    if (!interrupt_waiting_) return;
    if (!lapic_->pending()) {
        interrupt_waiting_ = false;
        run_->request_interrupt_window = 0;
        return;
    }
    if (run_->ready_for_interrupt_injection) {
        int vector = lapic_->acknowledge();
        if (vector >= 0) {
            kvm_interrupt interrupt{static_cast<u32>(vector)};
            call_ioctl(fd(), KVM_INTERRUPT, &interrupt);
            run_->ready_for_interrupt_injection = 0;
        }
        interrupt_waiting_ = lapic_->pending();
    }
    run_->request_interrupt_window = interrupt_waiting_;
}

// --- The loop ------------------------------------------------------------------------------------

Exit KvmVcpu::run() {
    vm_.check_process();
    Entered entered(thread_, id_);
    vm_.memslots().sync();
    sync_tsc(false);
    Exit exit;
    constexpr int kMostFaults = 100, kFaultMicroseconds = 100;
    int faults = 0;
    for (;;) {
        if (PV_UNLIKELY(requests_.load(std::memory_order_relaxed) != 0)) {
            if (take_requests(exit)) return exit;
            continue;
        }
        if (PV_UNLIKELY(held_exit_.has_value())) {
            exit = *std::exchange(held_exit_, std::nullopt);
            return exit;
        }
        if (PV_UNLIKELY(activity_ != Activity::kRunning)) {
            if (activity_ == Activity::kShutdown) {
                exit.reason = ExitReason::kShutdown;
                exit.text = "triple fault";
                return exit;
            }
            if (wait_while_halted(exit)) return exit;
            continue;
        }
        if (PV_UNLIKELY(debug_.active())) debug_.before_entry();
        if (lapic_ != nullptr) inject();
        int error = ::ioctl(fd(), KVM_RUN, 0) < 0 ? errno : 0;
        vm_.bus_hooks().drain();
        incomplete_ = false;
        registers_here_ = run_->kvm_valid_regs != 0 && error == 0;
        u32 reason = run_->exit_reason;
        if (PV_UNLIKELY(error != 0)) {
            if (error == EINTR || error == EAGAIN) {
                set_immediate_exit(*run_, 0);
                reason = KVM_EXIT_INTR;
            } else if (error == EFAULT && vm_.config().port_exits && ++faults < kMostFaults) {
                // Another thread is about to change the rights of that memory, and back (as process
                // VMs do, to make KVM forget what it knew).
                ::usleep(kFaultMicroseconds);
                continue;
            } else {
                fail(exit, "KVM_RUN failed: " + std::string(std::strerror(error)));
                return exit;
            }
        }
        auto& count = exits_[std::min<std::size_t>(reason, exits_.size() - 1)];
        count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        if (user_lapic() && static_cast<u8>(run_->cr8) != cr8_) {
            cr8_ = static_cast<u8>(run_->cr8);
            lapic_->set_cr8(cr8_);
            interrupt_waiting_ = true;
        }
        if (reason == KVM_EXIT_INTR) continue;
        Then then = handle(exit);
        if (PV_UNLIKELY(debug_.stepping())) then = end_step(then, exit);
        if (then == Then::kReturn) {
            complete();
            return exit;
        }
    }
}

// Lets KVM finish the instruction whose access was served, so that the state is that of an
// instruction boundary (virt/kvm/api, "KVM_RUN": pending operations). String instructions and wide
// accesses may exit again for their next part.
void KvmVcpu::complete() {
    constexpr int kMostParts = 4096;
    for (int part = 0; incomplete_ && part < kMostParts; ++part) {
        set_immediate_exit(*run_, 1);
        int result = ::ioctl(fd(), KVM_RUN, 0);
        vm_.bus_hooks().drain();
        incomplete_ = false;
        if (result < 0) break;
        Exit later;  // an unclaimed access was noted already
        if (handle(later) == Then::kReturn && later.reason == ExitReason::kDebug) {
            held_exit_ = std::move(later);
        }
    }
    if (requests_.load() == 0) set_immediate_exit(*run_, 0);
}

// While single-stepping: an access that was served is completed at once, which may end the step.
KvmVcpu::Then KvmVcpu::end_step(Then then, Exit& exit) {
    complete();
    Exit step;
    if (debug_.step_finished(step)) held_exit_ = std::move(step);
    if (then == Then::kReturn) {
        debug_.leave();
    } else if (held_exit_) {
        exit = *std::exchange(held_exit_, std::nullopt);
        then = Then::kReturn;
    }
    return then;
}

// --- Time ----------------------------------------------------------------------------------------

s64 KvmVcpu::kernel_tsc_offset() const {
    s64 offset = 0;
    kvm_device_attr attribute{};
    attribute.group = KVM_VCPU_TSC_CTRL;
    attribute.attr = KVM_VCPU_TSC_OFFSET;
    attribute.addr = reinterpret_cast<u64>(&offset);
    call_ioctl(fd(), KVM_GET_DEVICE_ATTR, &attribute);
    return offset;
}

// Writes of the guest to its TSC move KVM's offset; the difference to what KVM was given is exact.
u64 KvmVcpu::tsc_offset() const {
    if (!tsc_attribute_ || clock_generation_ == 0) return tsc_offset_;
    return tsc_offset_ + static_cast<u64>(kernel_tsc_offset() - kernel_offset_);
}

// `anew`: tsc_offset_ was set; otherwise only when the machine's time was moved.
void KvmVcpu::sync_tsc(bool anew) {
    u64 generation = vm_.clock().sync(fd());
    if (generation == clock_generation_ && !anew) return;
    if (!anew) tsc_offset_ = tsc_offset();
    clock_generation_ = generation;
    kernel_offset_ = vm_.clock().base_offset() + static_cast<s64>(tsc_offset_);
    if (tsc_attribute_) {
        kvm_device_attr attribute{};
        attribute.group = KVM_VCPU_TSC_CTRL;
        attribute.attr = KVM_VCPU_TSC_OFFSET;
        attribute.addr = reinterpret_cast<u64>(&kernel_offset_);
        call_ioctl(fd(), KVM_SET_DEVICE_ATTR, &attribute);
    } else {
        constexpr u32 kTscMsr = 0x10;
        WithEntries<kvm_msrs> msrs(1);
        msrs->nmsrs = 1;
        msrs->entries[0].index = kTscMsr;
        msrs->entries[0].data = vm_.config().clock.tsc() + tsc_offset_;
        call_ioctl(fd(), KVM_SET_MSRS, msrs.head());
    }
    if (vm_.chips() != nullptr) vm_.chips()->time_moved(id_);
}

// --- State ---------------------------------------------------------------------------------------

CpuState KvmVcpu::save() const {
    vm_.check_process();
    check_standing();
    flush_registers();
    CpuState state = read_cpu(*this);
    if (user_lapic() || activity_ == Activity::kShutdown) state.activity = activity_;
    state.msr.tsc_offset = tsc_offset();
    return state;
}

// KVM answers for a vCPU's state only between two KVM_RUNs, and makes the caller wait until then.
void KvmVcpu::check_standing() const {
    int thread = thread_.load();
    if (thread == 0 || thread == this_thread()) return;
    throw StateMismatch("CPU " + std::to_string(id_) +
                        " is running; its state can be had when it stands still");
}

// With KVM_CAP_SYNC_REGS the registers come with each exit, and go back with the next KVM_RUN.
GeneralRegisters KvmVcpu::general() const {
    check_standing();
    kvm_regs regs{};
    if (registers_here_) {
        regs = run_->s.regs.regs;
    } else {
        call_ioctl(fd(), KVM_GET_REGS, &regs);
    }
    GeneralRegisters registers;
    from_kvm(regs, registers);
    return registers;
}

void KvmVcpu::set_general(const GeneralRegisters& registers) {
    check_standing();
    kvm_regs regs{};
    to_kvm(registers, regs);
    if (run_->kvm_valid_regs & KVM_SYNC_X86_REGS) {
        run_->s.regs.regs = regs;
        run_->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
        registers_here_ = true;
    } else {
        call_ioctl(fd(), KVM_SET_REGS, &regs);
    }
}

std::size_t KvmVcpu::xsave_size() const {
    if (xsave_size_ == 0) {
        const int large = vm_.check(KVM_CAP_XSAVE2);
        xsave_size_ = std::max(sizeof(kvm_xsave), static_cast<std::size_t>(large));
    }
    return xsave_size_;
}

FpuState KvmVcpu::fpu() const {
    check_standing();
    return read_fpu(*this);
}

void KvmVcpu::set_fpu(const FpuState& fpu) {
    check_standing();
    write_fpu(*this, fpu);
}

// What lies in kvm_run for the next KVM_RUN, for those who ask KVM itself.
void KvmVcpu::flush_registers() const {
    if (!(run_->kvm_dirty_regs & KVM_SYNC_X86_REGS)) return;
    call_ioctl(fd(), KVM_SET_REGS, &run_->s.regs.regs);
    run_->kvm_dirty_regs = 0;
}

void KvmVcpu::restore(const CpuState& state) {
    vm_.check_process();
    check_standing();
    run_->kvm_dirty_regs = 0;
    registers_here_ = false;
    vm_.memslots().sync();
    write_cpu(*this, state);
    fresh_ = false;
    bool in_kernel = !user_lapic() && state.activity != Activity::kShutdown;
    activity_ = in_kernel ? Activity::kRunning : state.activity;
    tsc_offset_ = state.msr.tsc_offset;
    clock_generation_ = 0;  // KVM is told when the vCPU next runs
    run_->if_flag = (state.rflags & kInterruptFlag) != 0;
    run_->ready_for_interrupt_injection = 0;
    held_exit_.reset();
    interrupt_waiting_ = lapic_ != nullptr;  // look once
    run_->request_interrupt_window = interrupt_waiting_;
    halt_reported_ = false;
}

bool KvmVcpu::translate(u64 gva, u64& gpa) const {
    CpuState state = save();
    PagingRegisters registers;
    registers.cr0 = state.cr0;
    registers.cr3 = state.cr3;
    registers.cr4 = state.cr4;
    registers.efer = state.msr.efer;
    registers.physical_mask = bit(vm_.config().cpuid.physical_bits) - 1;
    TableReader tables(vm_.config().memory);
    u64 pdpte[4]{};
    if (state.cr4 & bit(5)) {
        for (unsigned n = 0; n < 4; ++n) {
            u8* entry = tables.entry((state.cr3 & ~u64{31}) + 8 * n);
            if (entry != nullptr) std::memcpy(&pdpte[n], entry, 8);
        }
        registers.pdpte = pdpte;
    }
    WalkResult result = walk_pure(tables, make_paging_state(registers), gva, {});
    if (result.fault) return false;
    gpa = result.page.gpa;
    return true;
}

std::vector<Vcpu::Counter> KvmVcpu::exits() const {
    std::vector<Counter> result;
    for (u32 reason = 0; reason < exits_.size(); ++reason) {
        u64 count = exits_[reason].load(std::memory_order_relaxed);
        if (count != 0) result.push_back({exit_name(reason), count});
    }
    return result;
}

}  // namespace polyvisor::kvm
