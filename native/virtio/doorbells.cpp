#include "virtio/doorbells.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/error.hpp"

namespace polyvisor::virtio {

Doorbells::~Doorbells() {
    for (OwnedFd& fd : fds_) loop_.unwatch(fd.get());
}

bool Doorbells::make() {
    if (!fds_.empty()) return true;
    std::vector<OwnedFd> fds;
    for (unsigned i = 0; i < device_.queues(); ++i) {
        fds.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!fds.back()) return false;
    }
    for (unsigned i = 0; i < fds.size(); ++i) {
        const int fd = fds[i].get();
        try {
            loop_.watch(fd, EPOLLIN, [this, i, fd](u32) {
                u64 rings;
                if (::read(fd, &rings, sizeof rings) == sizeof rings) device_.kick(i);
            });
        } catch (const HostError&) {
            while (i-- > 0) loop_.unwatch(fds[i].get());
            return false;
        }
    }
    fds_ = std::move(fds);
    return true;
}

}  // namespace polyvisor::virtio
