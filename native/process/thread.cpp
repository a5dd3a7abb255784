#include "process/thread.hpp"

#include <signal.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "process/loader.hpp"
#include "process/vm_pool.hpp"

namespace polyvisor::process {

namespace {

constexpr s64 kSecond = 1'000'000'000;
constexpr u64 kBudget = 20'000'000;  // instructions that a CPU takes of the kernel's at a time

}  // namespace

Thread::Thread(Kernel& kernel, Process& process, int tid, u32 number)
    : cpu(number),
      kernel_(kernel),
      process_(process),
      tid_(tid),
      event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!event_) throw_errno("cannot make an eventfd");
}

// --- The host's thread ---------------------------------------------------------------------------

Worker::Rest Thread::main(const std::string& failure) {
    lock_ = std::unique_lock(kernel_.mutex());
    begin_instructions();
    try {
        if (!failure.empty()) process_.exit({.reason = End::Reason::kFailed, .text = failure});
        while (true) {
            between_calls = true;
            if (!ending) kernel_.park(*this);
            deliver(*this);
            between_calls = false;
            if (ending) break;
            run_program();
        }
    } catch (const std::exception& error) {
        // The host's: no memory, no descriptors, an engine that fails.
        process_.exit({.reason = End::Reason::kFailed, .text = error.what()});
    }
    // The last one of a process gives its machine up, which takes long, and nobody is to wait for.
    std::shared_ptr<Vm> machine = process_.vm;
    if (machine == kernel_.machine_) machine.reset();  // that one is kept
    finish();
    lock_.unlock();
    return machine;
}

void Thread::run_program() {
    Vm& machine = vm();
    const u64 generation = machine.generation();
    const bool flush = std::exchange(generation_, generation) != generation;
    const bool counted = machine.counts_instructions() && kernel_.config().instructions != ~u64{0};
    if (counted && !take_budget()) return;
    machine.clock_page().show_calls(kernel_.observer.watches_time());
    lock_.unlock();
    const Trap trap = machine.supervisor().run(machine.vcpu(cpu), registers, flush);
    lock_.lock();
    if (ending) return;  // it has no more calls to make: a clone() would live on
    if (auto stop = kernel_.stops.take(*this, trap)) return kernel_.stop_at(*stop);
    if (machine.counts_instructions() && space().recover_lost_pages()) {
        force(*this, signal_info(SIGBUS, BUS_ADRERR));  // where, nobody knows
    }
    switch (trap.kind) {
        case Trap::Kind::kSystemCall:
            serve();
            break;
        case Trap::Kind::kException:
            take_exception(trap);
            break;
        case Trap::Kind::kInterrupted:
            if (counted && vcpu().save().instructions >= budget_end_) budget_end_ = 0;
            break;
        case Trap::Kind::kFailure:
            if (space().lost_file()) {
                force(*this, signal_info(SIGBUS, BUS_ADRERR));  // where, nobody knows
                break;
            }
            process_.exit({.reason = End::Reason::kFailed, .text = trap.text});
            break;
    }
}

// Its CPU may execute some of the instructions that are left; false: none are.
bool Thread::take_budget() {
    if (budget_end_ != 0) return true;
    const u64 budget = std::min(kBudget, kernel_.instructions_left);
    if (budget == 0) {
        kernel_.meet(Limit::kInstructions);
        kernel_.find_process(Kernel::kFirstPid)->exit({.reason = End::Reason::kInstructions});
        process_.exit({.reason = End::Reason::kInstructions});
        return false;
    }
    kernel_.instructions_left -= budget;
    budget_end_ = vcpu().save().instructions + budget;
    vcpu().set_instruction_budget(budget);
    return true;
}

void Thread::begin_instructions() {
    instructions_before_ = vm().counts_instructions() ? vcpu().save().instructions : 0;
}

// What its CPU has executed for it is told, and what it has not is the others'.
void Thread::settle_instructions() {
    if (!vm().counts_instructions()) return;
    const u64 executed = vcpu().save().instructions;
    kernel_.usage_.instructions += executed - instructions_before_;
    instructions_before_ = executed;
    if (budget_end_ != 0)
        kernel_.instructions_left += budget_end_ - std::min(budget_end_, executed);
    budget_end_ = 0;
}

void Thread::serve() {
    auto& r = registers.gpr;
    const u32 number = static_cast<u32>(r[kRax]);
    begin_call(*this, number);
    const Arguments arguments{r[kRdi], r[kRsi], r[kRdx], r[10], r[8], r[9]};
    const s64 result = kernel_.observer.looks_at(number)
                           ? kernel_.observer.serve(*this, number, arguments)
                           : serve_system_call(*this, number, arguments);
    if (result == -EMFILE) kernel_.meet(Limit::kFiles);
    if (result == -ENOMEM || space().exhausted()) kernel_.meet(Limit::kMemory);
    if (space().exhausted()) process_.exit({.reason = End::Reason::kMemory});
    if (result == -kRefused) {
        process_.exit(
            {.reason = End::Reason::kFailed,
             .text = "the filter around the monitor does not let it do what " +
                     system_call_name(number) +
                     "() takes, which is a mistake in polyvisor; pass confine=False to do "
                     "without the filter"});
    }
    CallCount& count = kernel_.call_counts[number];
    ++count.calls;
    if (result < 0 && result > -4096) ++count.errors;
    if (process_.vm) process_.vm->clock_page().refresh();
    end_call(*this, number, result);
    // (After an execve() that worked the registers are a new program's.)
    if (number != SYS_execve || result < 0) r[kRax] = static_cast<u64>(result);
}

void Thread::take_exception(const Trap& trap) {
    constexpr u8 kPageFault = 14;
    siginfo_t info = exception_signal(trap, registers.rip, space(), vcpu());
    if (trap.vector == kPageFault) {
        using Fault = AddressSpace::Fault;
        const Fault fault = space().fault(trap.address, trap.error);
        if (fault == Fault::kServed) return;  // memory is given when it is touched
        if (fault == Fault::kNoMemory) {
            kernel_.meet(Limit::kMemory);
            return process_.exit({.reason = End::Reason::kMemory});
        }
        if (fault == Fault::kBeyondFile) info.si_signo = SIGBUS, info.si_code = BUS_ADRERR;
        signals.fault.address = trap.address;
    }
    signals.fault.vector = trap.vector;
    signals.fault.error = trap.error;
    force(*this, info);
}

// The thread's end, seen from the program; the lock is held.
void Thread::finish() {
    settle_instructions();
    if (clear_child_tid != 0 && !process_.exiting) {
        const u32 zero = 0;
        space().store(clear_child_tid, zero);
        kernel_.futexes.wake(futex_key(clear_child_tid), 1);
    }
    kernel_.retire(*this);
}

u64 Thread::cpu_time() const {
    return host_.cpu_time();
}

// --- Strings that somebody was shown -------------------------------------------------------------

std::optional<std::string> Thread::string(u64 address, std::size_t most) const {
    auto shown = shown_.find(address);
    if (shown == shown_.end()) return space().string(address, most);
    return shown->second && shown->second->size() < most ? shown->second : std::nullopt;
}

std::optional<std::string> Thread::show_string(u64 address) {
    auto [shown, added] = shown_.try_emplace(address);
    if (added) shown->second = space().string(address);
    return shown->second;
}

// --- Programs ------------------------------------------------------------------------------------

int Thread::execute(const std::string& program, std::vector<std::string> arguments,
                    std::vector<std::string> environment) {
    LoadRequest request{program, process_.directory, std::move(arguments), std::move(environment)};
    if (int error = check_program(kernel_.tree(), request)) return error;
    // Nobody else is left of the old program.
    for (Thread* other : process_.threads) {
        if (other == this) continue;
        other->ending = true;
        other->interrupt();
    }
    wait_until([this] { return process_.threads.size() == 1; });
    if (ending) return EINTR;
    process_.descriptors.close_for_exec();
    process_.signals.reset_handlers();
    process_.timers.remove_made();
    signals.stack = {};
    clear_child_tid = robust_list = 0;
    if (kernel_.shares_machine(process_)) {  // vfork()'s
        std::shared_ptr<Vm> made;
        try {
            made = make_vm(kernel_.config().vm);
            made->space().share(space().budget());
            const u32 first = made->take_cpu();
            settle_instructions();
            vm().give_back(std::exchange(cpu, first));
        } catch (const Error&) {
            process_.exit({.reason = End::Reason::kSignal, .signal = SIGKILL});
            return 0;
        }
        process_.vm = std::move(made);
        begin_instructions();
        process_.in_vfork = false;
        if (Process* parent = kernel_.find_process(process_.parent)) {
            for (Thread* thread : parent->threads) thread->notify();
        }
    } else {
        space().clear();
    }
    vm().begin(cpu);
    title = program.substr(program.rfind('/') + 1);
    if (process_.load(request, registers) != 0) {
        process_.exit({.reason = End::Reason::kSignal, .signal = SIGKILL});
    }
    return 0;
}

// --- Waiting -------------------------------------------------------------------------------------

void Thread::leave() {
    --kernel_.running_;
    kernel_.changed_.notify_all();
    lock_.unlock();
}

void Thread::enter() {
    lock_.lock();
    ++kernel_.running_;
    if (!ending) kernel_.park(*this);
}

void Thread::interrupt() {
    const u64 one = 1;
    (void)!::write(event_.get(), &one, sizeof one);
    wake_.notify_all();
    if (process_.vm) vcpu().request_stop();
}

Futexes::Key Thread::futex_key(u64 address) const {
    // Of memory that processes share, the file is what they agree about.
    const auto& areas = space().areas();
    auto area = areas.upper_bound(address);
    if (area != areas.begin() && (--area)->second.end > address &&
        area->second.kind != AddressSpace::Kind::kPrivate && area->second.file) {
        struct stat about{};
        if (::fstat(area->second.file->get(), &about) == 0) {
            return {nullptr, about.st_ino, area->second.offset + (address - area->first)};
        }
    }
    return {&vm(), 0, address};
}

bool Thread::interrupted() const {
    return ending || has_signals(*this);
}

bool Thread::block(const std::function<bool()>& done, std::optional<TimePoint> until) {
    while (true) {
        if (done()) return true;
        if (interrupted()) {
            signals.left_wait = true;
            return false;
        }
        if (until && std::chrono::steady_clock::now() >= *until) return false;
        --kernel_.running_;
        kernel_.changed_.notify_all();
        if (until) {
            wake_.wait_until(lock_, *until);
        } else {
            wake_.wait(lock_);
        }
        ++kernel_.running_;
        if (!ending) kernel_.park(*this);
    }
}

void Thread::wait_until(const std::function<bool()>& done) {
    if (done() || ending) return;
    --kernel_.running_;
    kernel_.changed_.notify_all();
    wake_.wait(lock_, [&] { return done() || ending; });
    ++kernel_.running_;
    if (!ending) kernel_.park(*this);
}

bool Thread::wait(int fd, short events, s64 timeout) {
    pollfd wanted{fd, events, 0};
    return wait_for({&wanted, fd < 0 ? 0u : 1u}, timeout) != -EINTR;
}

s64 Thread::poll(std::span<pollfd> wanted, s64 timeout) {
    std::vector<pollfd> host(wanted.begin(), wanted.end());
    std::vector<std::shared_ptr<OpenFile>> held;  // another thread may close them meanwhile
    s64 bad = 0;
    for (pollfd& one : host) {
        auto* entry = one.fd < 0 ? nullptr : descriptors().find(static_cast<u64>(one.fd));
        bad += one.fd >= 0 && entry == nullptr;
        one.fd = entry == nullptr ? -1 : entry->file->fd.get();
        if (entry != nullptr) held.push_back(entry->file);
    }
    const s64 ready = wait_for(host, bad != 0 ? 0 : timeout);
    if (ready < 0) return ready;
    for (std::size_t n = 0; n < host.size(); ++n) {
        wanted[n].revents = wanted[n].fd >= 0 && host[n].fd < 0 ? POLLNVAL : host[n].revents;
    }
    return ready + bad;
}

// ppoll() on the host's descriptors; -EINTR: interrupted().
s64 Thread::wait_for(std::span<pollfd> wanted, s64 timeout) {
    std::vector<pollfd> all(wanted.begin(), wanted.end());
    all.push_back({event_.get(), POLLIN, 0});
    const bool limited = timeout >= 0;
    // (A call that begins again does not wait any longer for that.)
    const s64 deadline = limited ? signals.waits_until.value_or(now(CLOCK_MONOTONIC) + timeout) : 0;
    if (limited) signals.waits_until = deadline;
    while (true) {
        u64 count;
        (void)!::read(event_.get(), &count, sizeof count);  // of before: looked at here
        const bool leaving = interrupted();                 // but not empty-handed, if that can be
        s64 left = limited ? std::max<s64>(0, deadline - now(CLOCK_MONOTONIC)) : 0;
        if (leaving) left = 0;
        const timespec limit{left / kSecond, left % kSecond};
        int ready, error;
        {
            Unlocked unlocked(*this);
            ready = ::ppoll(all.data(), all.size(), limited || leaving ? &limit : nullptr, nullptr);
            error = errno;
        }
        if (ready < 0 && error != EINTR) return -error;
        if (ready > 0 && (all.back().revents & POLLIN)) --ready;
        if (ready > 0 || (ready == 0 && !leaving && !(all.back().revents & POLLIN))) {
            std::copy_n(all.begin(), wanted.size(), wanted.begin());
            return ready;
        }
        if (leaving || interrupted()) {
            signals.left_wait = true;
            return -EINTR;
        }
    }
}

}  // namespace polyvisor::process
