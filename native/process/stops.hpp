// Where a program is to stand still, for whoever started it: before a system call, at an address,
// or when a function that was called from outside returns.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <vector>

#include "cpu/state.hpp"

namespace polyvisor::process {

class Process;
class Thread;
struct Trap;

struct Stop {
    enum class Kind : u8 { kSystemCall, kAddress, kReturned };
    Kind kind = Kind::kAddress;
    int pid = 0, tid = 0;
    u32 number = 0;   ///< kSystemCall
    u64 address = 0;  ///< kAddress; kSystemCall: of the SYSCALL instruction
    u64 value = 0;    ///< kReturned: RAX
};

/// Of one process VM; used under the kernel's lock.
class Stops {
  public:
    /// An address that no program has anything at: where a function called from outside returns to.
    static constexpr u64 kReturn = 0x7fff'ffff'f000;

    void at_call(u32 number) { calls_.insert(number); }
    /// An INT3 goes there (SDM 2A, INT3), until it was reached or clear(). False: nothing is mapped
    /// there.
    bool at_address(Process& process, u64 address);
    void clear(Process& process);
    /// The thread is to execute a function at `address`, with its stack below `top`; its registers
    /// come back with the Stop. False: nothing is mapped there.
    bool call(Thread& thread, u64 address, const std::vector<u64>& arguments, u64 top);
    /// A copy of the first process has none of the INT3s.
    void forget(Process& copy) const;

    /// What this trap means here; nothing: it is not ours.
    std::optional<Stop> take(Thread& thread, const Trap& trap);

  private:
    std::set<u32> calls_;
    std::map<u64, u8> replaced_;  // bytes that were where an INT3 is
    std::optional<u64> passing_;  // a SYSCALL at which it stopped, and that is now let through
    std::map<int, GeneralRegisters> called_;  // what they were, by thread
};

}  // namespace polyvisor::process
