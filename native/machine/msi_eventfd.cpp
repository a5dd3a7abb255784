#include "machine/msi_eventfd.hpp"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/error.hpp"

namespace polyvisor {

MsiEventfd::MsiEventfd(MsiSink& sink, InterruptChips* chips, EventLoop& loop)
    : sink_(sink), chips_(chips), loop_(loop), fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!fd_) throw_errno("cannot make an event file descriptor for an interrupt");
}

MsiEventfd::~MsiEventfd() {
    try {
        disconnect();
    } catch (const Error&) {
        // The kernel lets go of the descriptor when it is closed.
    }
}

void MsiEventfd::connect(u64 address, u32 data) {
    {
        std::lock_guard lock(mutex_);
        address_ = address;
        data_ = data;
    }
    if (chips_ != nullptr) {
        chips_->connect_msi(fd(), address, data);
    } else if (!connected_) {
        loop_.watch(fd(), EPOLLIN, [this](u32) { rung(); });
    }
    connected_ = true;
}

void MsiEventfd::disconnect() {
    if (!connected_) return;
    connected_ = false;
    if (chips_ != nullptr) {
        chips_->disconnect_msi(fd());
    } else {
        loop_.unwatch(fd());
    }
}

bool MsiEventfd::pending() const {
    pollfd poll{fd(), POLLIN, 0};
    return ::poll(&poll, 1, 0) == 1;
}

void MsiEventfd::rung() {
    u64 rings;
    if (::read(fd(), &rings, sizeof rings) != sizeof rings) return;
    u64 address;
    u32 data;
    {
        std::lock_guard lock(mutex_);
        address = address_;
        data = data_;
    }
    sink_.send(address, data);
}

}  // namespace polyvisor
