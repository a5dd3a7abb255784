// The signal that makes a thread leave KVM_RUN (virt/kvm/api, "KVM_RUN": EINTR).
#pragma once

namespace polyvisor::kvm {

/// Opens the present thread for the signal. The first call in the process takes a real-time signal
/// that nobody handles, the highest first, for a handler that does nothing. Throws HostError when
/// all are taken.
void accept_kicks();
/// Interrupts a system call of `thread` (a gettid()) of this process.
void kick(int thread);

}  // namespace polyvisor::kvm
