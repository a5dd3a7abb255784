#include "kvm/kick.hpp"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

#include "base/error.hpp"

namespace polyvisor::kvm {

namespace {

void no_op(int) {}

// Signal handlers belong to the process, so this is the one thing here that cannot belong to a
// machine. It is never given back: a late kick must find the handler.
int take_signal() {
    for (int number = SIGRTMAX; number >= SIGRTMIN; --number) {
        struct sigaction before{};
        if (::sigaction(number, nullptr, &before) != 0) continue;
        if ((before.sa_flags & SA_SIGINFO) || before.sa_handler != SIG_DFL) continue;
        struct sigaction action{};
        action.sa_handler = no_op;  // without SA_RESTART: ioctl() must return
        ::sigfillset(&action.sa_mask);
        if (::sigaction(number, &action, nullptr) == 0) return number;
    }
    throw HostError(EBUSY, "",
                    "every real-time signal of this process has a handler; the kvm "
                    "engine needs one to interrupt its vCPUs");
}

int kick_signal() {
    static const int number = take_signal();
    return number;
}

}  // namespace

void accept_kicks() {
    thread_local bool open = false;
    if (open) return;
    sigset_t set;
    ::sigemptyset(&set);
    ::sigaddset(&set, kick_signal());
    ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    open = true;
}

void kick(int thread) {
    ::syscall(SYS_tgkill, ::getpid(), thread, kick_signal());
}

}  // namespace polyvisor::kvm
