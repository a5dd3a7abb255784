#include "process/stops.hpp"

#include "process/thread.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kSyscallBytes = 2;
constexpr u8 kInt3 = 0xcc, kBreakpoint = 3, kPageFault = 14;

}  // namespace

bool Stops::at_address(Process& process, u64 address) {
    if (replaced_.count(address) != 0) return true;
    const auto before = process.vm->exchange_byte(address, kInt3);
    if (!before) return false;
    replaced_[address] = *before;
    return true;
}

void Stops::clear(Process& process) {
    calls_.clear();
    for (const auto& [address, byte] : replaced_) {
        if (process.vm) process.vm->exchange_byte(address, byte);
    }
    replaced_.clear();
}

void Stops::forget(Process& copy) const {
    for (const auto& [address, byte] : replaced_) copy.vm->exchange_byte(address, byte);
}

bool Stops::call(Thread& thread, u64 address, const std::vector<u64>& arguments, u64 top) {
    // System V ABI for AMD64, 3.2: six in registers; the stack is aligned before the call.
    static constexpr int kRegisters[] = {kRdi, kRsi, kRdx, kRcx, 8, 9};
    const u64 stack = align_down(top, 16) - 8;
    if (!thread.space().store(stack, kReturn)) return false;
    called_[thread.tid()] = thread.registers;
    GeneralRegisters& r = thread.registers;
    for (std::size_t n = 0; n < arguments.size() && n < std::size(kRegisters); ++n) {
        r.gpr[kRegisters[n]] = arguments[n];
    }
    r.gpr[kRax] = 0;  // no vector registers, for functions with variable arguments
    r.gpr[kRsp] = stack;
    r.rip = address;
    return true;
}

std::optional<Stop> Stops::take(Thread& thread, const Trap& trap) {
    GeneralRegisters& r = thread.registers;
    Stop stop{Stop::Kind::kAddress, thread.process().pid, thread.tid()};
    if (trap.kind == Trap::Kind::kSystemCall) {
        stop.number = static_cast<u32>(r.gpr[kRax]);
        if (calls_.count(stop.number) == 0) return std::nullopt;
        stop.kind = Stop::Kind::kSystemCall;
        stop.address = r.rip - kSyscallBytes;
        if (std::exchange(passing_, std::nullopt) == stop.address) return std::nullopt;
        // As if it had not been executed.
        passing_ = r.rip = stop.address;
        return stop;
    }
    if (trap.kind != Trap::Kind::kException) return std::nullopt;
    if (trap.vector == kBreakpoint) {
        auto found = replaced_.find(r.rip - 1);
        if (found == replaced_.end()) return std::nullopt;
        stop.address = found->first;
        thread.vm().exchange_byte(stop.address, found->second);
        replaced_.erase(found);
        r.rip = stop.address;
        return stop;
    }
    if (trap.vector == kPageFault && trap.address == kReturn && r.rip == kReturn) {
        auto found = called_.find(thread.tid());
        if (found == called_.end()) return std::nullopt;
        stop.kind = Stop::Kind::kReturned;
        stop.value = r.gpr[kRax];
        r = found->second;
        called_.erase(found);
        return stop;
    }
    return std::nullopt;
}

}  // namespace polyvisor::process
