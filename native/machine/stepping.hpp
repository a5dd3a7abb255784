// Steps of one vCPU by way of its single step (GuestDebug), which every engine has.
#pragma once

#include <functional>

#include "cpu/engine.hpp"

namespace polyvisor {

/// Executes `instructions` of `vcpu`, on the calling thread; a repeated string instruction counts
/// once, when it is done. Interrupts and NMIs wait meanwhile. Exits that are no steps go to
/// `serve`, which returns false to give up. Gives up too on a CPU that is halted with interrupts
/// off. Uses set_debug(), and leaves nothing set.
void single_step(Vcpu& vcpu, GuestMemory& memory, u64 instructions,
                 const std::function<bool(Exit&)>& serve);

}  // namespace polyvisor
