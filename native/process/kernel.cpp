#include "process/kernel.hpp"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "process/image.hpp"
#include "process/loader.hpp"
#include "process/thread.hpp"
#include "process/trace.hpp"
#include "process/vm_pool.hpp"

namespace polyvisor::process {

namespace {

constexpr int kInit = 1, kMostPids = 1 << 22;

// What clone() is served with, beside the signal in the low byte. Files, folder and signal actions
// are those of the process, whose threads share them.
constexpr u64 kThreadFlags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD |
                             CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID |
                             CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID | CLONE_DETACHED;
constexpr u64 kProcessFlags = CLONE_VM | CLONE_VFORK | CLONE_SETTLS | CLONE_PARENT_SETTID |
                              CLONE_CHILD_CLEARTID | CLONE_CHILD_SETTID | CSIGNAL;

}  // namespace

Kernel::Kernel(KernelConfig config, StandardFiles standard)
    : config_(std::move(config)), tree_(config_.mounts) {
    if (config_.arguments.empty()) {
        throw ConfigError("arguments", "a process needs a program to run");
    }
    const std::shared_ptr<Vm> machine = make_vm(config_.vm);
    const u32 cpu = machine->take_cpu();
    open_standard(std::move(standard));
    Process& process = begin(machine);
    process.directory = config_.directory;
    process.descriptors.most = config_.files;
    for (unsigned n = 0; n < standard_files.size(); ++n) {
        if (standard_files[n]) process.descriptors.place(n, standard_files[n], false);
    }
    LoadRequest request;
    request.program = config_.program.empty() ? config_.arguments.front() : config_.program;
    request.directory = config_.directory;
    request.arguments = config_.arguments;
    request.environment = config_.environment;
    GeneralRegisters registers;
    if (int error = process.load(request, registers)) {
        throw HostError(error, request.program,
                        "cannot run " + request.program + " in a process VM");
    }
    machine->begin(cpu);
    Thread& thread = add_thread(process, process.pid, cpu, registers);
    thread.title = request.program.substr(request.program.rfind('/') + 1);
}

Kernel::Kernel(std::shared_ptr<const KernelImage> image, const std::vector<Tree::Mount>& mounts,
               StandardFiles standard)
    : config_(image->config()), tree_(image->tree(), mounts), image_(std::move(image)) {
    machine_ = image_->take_machine();
    open_standard(std::move(standard));
    std::lock_guard lock(mutex_);  // its timers begin
    image_->restore(add_thread(begin(machine_), kFirstPid, machine_->take_cpu(), {}),
                    standard_files);
}

// Before a first process begins.
void Kernel::open_standard(StandardFiles standard) {
    const char* names[] = {"stdin", "stdout", "stderr"};
    for (unsigned n = 0; n < standard.size(); ++n) {
        if (!standard[n]) continue;
        standard_positions_[n] = ::lseek(standard[n].get(), 0, SEEK_CUR);
        auto file = adopt_file(std::move(standard[n]), names[n]);
        file->counted = n != 0;
        standard_files[n] = std::move(file);
    }
}

Process& Kernel::begin(std::shared_ptr<Vm> machine) {
    output_left = config_.output;
    writes_left = config_.writes;
    instructions_left = config_.instructions;
    last_pid_ = kFirstPid - 1;
    Process& process =
        *add_process(std::make_shared<Process>(*this, next_pid(), kInit, std::move(machine)));
    process.descriptors.most = config_.files;
    return process;
}

Kernel::~Kernel() {
    kill({.reason = End::Reason::kSignal, .signal = SIGKILL});
    {
        std::unique_lock lock(mutex_);
        end_all(lock);
    }
    ended_.clear();  // waits for them
    alarms_.stop();
    processes_.clear();
    const bool failed = end_ && end_->reason == End::Reason::kFailed;
    if (machine_.use_count() == 1 && !failed) image_->give_back(std::move(machine_));
}

// No process has a thread any more.
void Kernel::end_all(std::unique_lock<std::mutex>& lock) {
    for (auto& [pid, process] : processes_) {
        process->exit({.reason = End::Reason::kSignal, .signal = SIGKILL});
    }
    std::erase_if(threads_, [](const auto& entry) { return !entry.second->host_.begun(); });
    while (!threads_.empty()) {
        for (auto& [tid, thread] : threads_) thread->interrupt();
        changed_.notify_all();
        changed_.wait_for(lock, std::chrono::milliseconds(10));
    }
}

// --- From outside --------------------------------------------------------------------------------

void Kernel::resume() {
    std::lock_guard lock(mutex_);
    paused_ = false;
    stop_.reset();
    for (auto& [tid, thread] : threads_) {
        if (!thread->host_.begun()) start(*thread);
    }
    changed_.notify_all();
}

bool Kernel::wait(std::chrono::nanoseconds time) {
    constexpr std::chrono::nanoseconds kSlice = std::chrono::milliseconds(20);
    std::unique_lock lock(mutex_);
    const auto done = [this] { return stop_ || observer.next() || (end_ && threads_.empty()); };
    if (config_.cpu_time == ~u64{0}) return changed_.wait_for(lock, time, done);
    for (; time > kSlice; time -= kSlice) {
        if (changed_.wait_for(lock, kSlice, done)) return true;
        end_for_cpu_time();
    }
    if (changed_.wait_for(lock, time, done)) return true;
    end_for_cpu_time();
    return false;
}

void Kernel::end_for_cpu_time() {
    if (end_ || total_cpu_time() < config_.cpu_time) return;
    meet(Limit::kCpuTime);
    for (auto& [pid, process] : processes_) process->exit({.reason = End::Reason::kCpuTime});
}

std::optional<Stop> Kernel::stop() const {
    std::lock_guard lock(mutex_);
    return stop_;
}

void Kernel::stop_at(const Stop& stop) {
    if (!stop_) stop_ = stop;
    paused_ = true;
    changed_.notify_all();
}

Thread& Kernel::first_thread() const {
    std::lock_guard lock(mutex_);
    Thread* thread = find_thread(kFirstPid);
    if (thread == nullptr) throw StateMismatch("this process has ended");
    if (!thread->between_calls) {
        throw StateMismatch(
            "this process is in the middle of a system call; stop it at a place first (run_until)");
    }
    return *thread;
}

void Kernel::pause() {
    std::unique_lock lock(mutex_);
    paused_ = true;
    while (running_ != 0) {
        for (auto& [tid, thread] : threads_) thread->vcpu().request_stop();
        changed_.wait_for(lock, std::chrono::milliseconds(10));
    }
}

void Kernel::kill(End end) {
    std::lock_guard lock(mutex_);
    for (auto& [pid, process] : processes_) process->exit(end);
    changed_.notify_all();
}

std::optional<End> Kernel::end() const {
    std::lock_guard lock(mutex_);
    return end_;
}

u64 Kernel::cpu_time() const {
    std::lock_guard lock(mutex_);
    return total_cpu_time();
}

u64 Kernel::total_cpu_time() const {
    u64 total = ended_cpu_time_;
    for (auto& [tid, thread] : threads_) total += thread->cpu_time();
    return total - std::min(total, cpu_time_before_);
}

Usage Kernel::usage() const {
    std::lock_guard lock(mutex_);
    return usage_;
}

std::map<u32, CallCount> Kernel::counts() const {
    std::lock_guard lock(mutex_);
    return call_counts;
}

void Kernel::reset() {
    pause();
    std::unique_lock lock(mutex_);
    if (!image_) throw StateMismatch("this process is no copy that could be reset");
    Thread* thread = find_thread(kFirstPid);
    if (end_ || threads_.size() != 1 || processes_.size() != 1 || thread == nullptr ||
        !thread->between_calls) {
        end_all(lock);
        processes_.clear();
        thread = nullptr;
    }
    if (thread != nullptr) thread->settle_instructions();
    machine_->reset();
    cpu_time_before_ = 0;
    cpu_time_before_ = total_cpu_time();
    if (thread == nullptr) {
        thread = &add_thread(begin(machine_), kFirstPid, machine_->take_cpu(), {});
    }
    usage_ = {.processes = 1, .threads = 1};
    output_left = config_.output;
    writes_left = config_.writes;
    programs_ = 0;
    instructions_left = config_.instructions;
    call_counts.clear();
    end_.reset();
    stop_.reset();
    stops = {};
    image_->restore(*thread, standard_files);
    thread->begin_instructions();
    for (unsigned n = 0; n < standard_files.size(); ++n) {
        if (standard_files[n] && standard_positions_[n] >= 0) {
            ::lseek(standard_files[n]->fd.get(), standard_positions_[n], SEEK_SET);
        }
    }
}

u64 Kernel::next_seed() {
    u64 seed = 0;
    if (config_.seed) return *config_.seed ^ programs_++ * 0xd6e8'feb8'6659'fd93;
    if (::getrandom(&seed, sizeof seed, 0) != sizeof seed)
        throw_errno("cannot get a random number");
    return seed;
}

bool Kernel::take_writes(u64 bytes) {
    if (bytes > writes_left) {
        meet(Limit::kWrites);
        return false;
    }
    if (config_.writes != ~u64{0}) writes_left -= bytes;
    return true;
}

// --- Its memory and registers, from outside --------------------------------------------------

void Kernel::stop_before(u32 call) {
    std::lock_guard lock(mutex_);
    stops.at_call(call);
}

bool Kernel::stop_before_address(u64 address) {
    std::lock_guard lock(mutex_);
    Process* first = find_process(kFirstPid);
    return first->vm && stops.at_address(*first, address);
}

void Kernel::clear_stops() {
    std::lock_guard lock(mutex_);
    stops.clear(*find_process(kFirstPid));
}

void Kernel::call(u64 address, std::vector<u64> arguments, std::vector<Copy>& copies) {
    constexpr u64 kRedZone = 128, kAlignment = 16;
    Thread& thread = first_thread();
    std::lock_guard lock(mutex_);
    const u64 stack = thread.registers.gpr[kRsp];
    u64 top = stack - kRedZone;
    for (Copy& copy : copies) {
        top = align_down(top - copy.bytes.size(), kAlignment);
        copy.address = arguments.at(copy.argument) = top;
        if (top > stack || !thread.space().copy_out(top, copy.bytes)) {
            throw ConfigError("arguments",
                              "the program's stack has no room for arguments that large; write "
                              "them to its memory and pass their addresses");
        }
    }
    if (!stops.call(thread, address, arguments, top)) {
        throw ConfigError("arguments", "the program's stack has no room to call a function");
    }
}

std::optional<u64> Kernel::symbol(const std::string& name) {
    std::lock_guard lock(mutex_);
    const Process& first = *find_process(kFirstPid);
    auto known = symbols_.find(first.executable);
    if (known == symbols_.end()) {
        Tree::Place place;
        if (tree_.walk("/", first.executable, Tree::kFollow, place) != 0) return std::nullopt;
        const OwnedFd fd(tree_.open(place, O_RDONLY | O_CLOEXEC, 0));
        known = symbols_.try_emplace(first.executable, fd.get()).first;
    }
    const auto address = known->second.find(name);
    if (!address) return std::nullopt;
    return first.base + *address;
}

bool Kernel::read_memory(u64 address, std::span<u8> into) const {
    std::lock_guard lock(mutex_);
    Process* first = find_process(kFirstPid);
    return first->vm && first->space().copy_in(address, into);
}

bool Kernel::write_memory(u64 address, std::span<const u8> from) {
    std::lock_guard lock(mutex_);
    Process* first = find_process(kFirstPid);
    return first->vm && first->space().copy_out(address, from);
}

// --- The tables ----------------------------------------------------------------------------------

Process* Kernel::find_process(int pid) const {
    auto found = processes_.find(pid);
    return found == processes_.end() ? nullptr : found->second.get();
}

Thread* Kernel::find_thread(int tid) const {
    auto found = threads_.find(tid);
    return found == threads_.end() ? nullptr : found->second.get();
}

bool Kernel::shares_machine(const Process& process) const {
    return std::any_of(processes_.begin(), processes_.end(), [&](const auto& entry) {
        return entry.second.get() != &process && entry.second->vm == process.vm;
    });
}

int Kernel::next_pid() {
    do {
        last_pid_ = last_pid_ + 1 < kMostPids ? last_pid_ + 1 : kFirstPid;
    } while (processes_.count(last_pid_) != 0 || threads_.count(last_pid_) != 0);
    return last_pid_;
}

std::shared_ptr<Process> Kernel::add_process(std::shared_ptr<Process> process) {
    processes_[process->pid] = process;
    ++usage_.processes;
    return process;
}

Thread& Kernel::add_thread(Process& process, int tid, u32 cpu, const GeneralRegisters& registers) {
    auto& thread = threads_[tid] = std::make_unique<Thread>(*this, process, tid, cpu);
    thread->registers = registers;
    process.threads.push_back(thread.get());
    ++usage_.threads;
    return *thread;
}

void Kernel::start(Thread& thread) {
    std::optional<Confinement> confinement;
    if (config_.confine) {
        confinement = {.network = config_.network, .kvm = !thread.vm().counts_instructions()};
    }
    ++running_;
    try {
        thread.host_ = Worker(
            confinement, [&thread](const std::string& failure) { return thread.main(failure); });
    } catch (const Error&) {
        --running_;
        throw;
    }
}

void Kernel::park(Thread& thread) {
    const auto goes_on = [&] { return !paused_ || thread.ending; };
    if (goes_on()) return;
    --running_;
    changed_.notify_all();  // once: those who are parked hear it, too
    changed_.wait(thread.lock_, goes_on);
    ++running_;
}

// --- Beginnings ----------------------------------------------------------------------------------

s64 Kernel::clone(Thread& caller, const CloneRequest& request) {
    const u64 flags = request.flags;
    const bool same_process = flags & CLONE_THREAD;
    if (same_process && (flags & (CLONE_VM | CLONE_SIGHAND)) != (CLONE_VM | CLONE_SIGHAND)) {
        return -EINVAL;
    }
    if (flags & ~(same_process ? kThreadFlags | CSIGNAL : kProcessFlags)) return -EINVAL;
    if ((flags & CLONE_SETTLS) && request.tls >= AddressSpace::kEnd) return -EPERM;
    if (threads_.size() >= config_.threads || processes_.size() >= config_.threads) {
        meet(Limit::kThreads);
        return -EAGAIN;
    }
    bury();
    std::shared_ptr<Process> process = processes_[caller.process().pid];
    std::shared_ptr<Vm> machine = process->vm;
    u32 cpu = 0;
    try {
        if (!(flags & CLONE_VM)) {
            const bool alone = process->threads.size() == 1 && !shares_machine(*process);
            machine = machine->fork(alone);
        }
        cpu = machine->take_cpu();
    } catch (const Error&) {
        return -EAGAIN;
    }
    if (cpu == Vm::kMostCpus) return -EAGAIN;
    const int tid = next_pid();
    if (!same_process) {
        process = add_process(
            std::make_shared<Process>(*this, tid, caller.process().pid, std::move(machine)));
        process->inherit(caller.process());
        if (!(flags & CLONE_VM)) stops.forget(*process);
        process->in_vfork = flags & CLONE_VFORK;
    }
    GeneralRegisters registers = caller.registers;
    registers.gpr[kRax] = 0;
    if (request.stack != 0) registers.gpr[kRsp] = request.stack;
    Supervisor& from = caller.vm().supervisor();
    const u64 fs = flags & CLONE_SETTLS ? request.tls : from.base(caller.cpu, kFs);
    process->vm->prepare(cpu, caller.vcpu().save().fpu, fs, from.base(caller.cpu, kGs));
    try {
        Thread& thread = add_thread(*process, tid, cpu, registers);
        thread.title = caller.title;
        thread.signals.mask = caller.signals.mask;
        if (!(flags & CLONE_VM) || (flags & CLONE_VFORK)) {
            thread.signals.stack = caller.signals.stack;
        }
        const u32 number = static_cast<u32>(tid);
        if (flags & CLONE_PARENT_SETTID) caller.space().store(request.parent_tid, number);
        if (flags & CLONE_CHILD_SETTID) thread.space().store(request.child_tid, number);
        if (flags & CLONE_CHILD_CLEARTID) thread.clear_child_tid = request.child_tid;
        start(thread);
    } catch (const Error&) {
        process->vm->give_back(cpu);
        std::erase(process->threads, find_thread(tid));
        threads_.erase(tid);
        if (!same_process) processes_.erase(tid);
        return -EAGAIN;
    }
    // (A signal waits, as in Linux, but not the end.)
    caller.wait_until([&process] { return !process->in_vfork; });
    return tid;
}

// --- Ends ----------------------------------------------------------------------------------------

// The last that a thread does with the lock.
void Kernel::retire(Thread& thread) {
    std::shared_ptr<Process> process = processes_[thread.process().pid];
    const u64 used = thread.cpu_time();
    process->cpu_time += used;
    ended_cpu_time_ += used;
    process->vm->give_back(thread.cpu);
    leave_signals(thread);
    std::erase(process->threads, &thread);
    for (Thread* other : process->threads) other->notify();  // who executes waits to be alone
    auto entry = threads_.find(thread.tid());
    ended_.push_back(std::move(entry->second));
    threads_.erase(entry);
    if (process->threads.empty()) {
        if (Trace* trace = observer.trace()) trace->end(thread, *process);
        process_ended(*process);
    }
    --running_;
    changed_.notify_all();
}

void Kernel::process_ended(Process& process) {
    process.exiting = true;
    process.vm.reset();
    process.descriptors.clear();
    process.timers.stop();
    process.in_vfork = false;
    std::vector<Process*> orphans;
    for (auto& [pid, other] : processes_) {
        if (other->parent == process.pid) orphans.push_back(other.get());
    }
    for (Process* orphan : orphans) {
        orphan->parent = kInit;
        if (orphan->ended()) reap(*orphan);
    }
    Process* parent = find_process(process.parent);
    if (process.pid == kFirstPid) {
        // Everybody else's end, too.
        end_ = process.end;
        for (auto& [pid, other] : processes_) {
            other->exit({.reason = End::Reason::kSignal, .signal = SIGKILL});
        }
    } else if (parent == nullptr || parent->ended()) {
        reap(process);
    } else {
        tell_parent(process, process.end.reason == End::Reason::kExited ? CLD_EXITED : CLD_KILLED);
        if (parent->signals.leaves_children()) reap(process);
    }
}

void Kernel::reap(Process& process) {
    if (Process* parent = find_process(process.parent)) {
        parent->children_cpu_time += process.cpu_time + process.children_cpu_time;
    }
    processes_.erase(process.pid);
}

// Those that nobody works for any more.
void Kernel::bury() {
    std::erase_if(ended_, [](const auto& thread) { return thread->host_.over(); });
}

}  // namespace polyvisor::process
