// ioctl() on KVM's file descriptors, with errors that name the request.
#pragma once

#include <sys/ioctl.h>
#include "kvm/abi.hpp"

#include <cerrno>
#include <vector>

#include "base/error.hpp"
#include "base/types.hpp"

namespace polyvisor::kvm {

/// "KVM_CREATE_VM" and so on; the number in hex for one that this version never makes.
std::string request_name(unsigned long request);

/// The kernel's answer, or -errno. Repeats a call that a signal interrupted (never use it for
/// KVM_RUN).
template <class Argument = long>
int try_ioctl(int fd, unsigned long request, Argument argument = {}) {
    int result;
    do {
        result = ::ioctl(fd, request, argument);
    } while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

/// Throws HostError: "KVM_SET_SREGS failed: Invalid argument".
[[noreturn]] void throw_ioctl(unsigned long request, int error);

/// A struct of KVM's that ends in an array: kvm_msrs, kvm_cpuid2, kvm_irq_routing, ... All zero.
template <class Head>
class WithEntries {
  public:
    explicit WithEntries(std::size_t count)
        : words_((sizeof(Head) + count * sizeof(Head{}.entries[0]) + 7) / 8) {}
    Head* operator->() { return head(); }
    Head* head() { return reinterpret_cast<Head*>(words_.data()); }

  private:
    std::vector<u64> words_;
};

template <class Argument = long>
int call_ioctl(int fd, unsigned long request, Argument argument = {}) {
    int result = try_ioctl(fd, request, argument);
    if (result < 0) throw_ioctl(request, -result);
    return result;
}

}  // namespace polyvisor::kvm
