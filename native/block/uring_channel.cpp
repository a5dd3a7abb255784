#include "block/uring_channel.hpp"

#include <cerrno>

#include "base/error.hpp"

namespace polyvisor::block {

UringChannel::UringChannel(FileStore& store, std::shared_ptr<Wakeup> wakeup)
    : store_(store), wakeup_(std::move(wakeup)), threads_(store, wakeup_) {
    int error = -io_uring_queue_init(kEntries, &ring_, IORING_SETUP_CLAMP);
    if (error != 0) throw HostError(error, {}, "cannot use io_uring for '" + store.name() + "'");
    error = -io_uring_register_eventfd(&ring_, wakeup_->fd());
    if (error == 0) return;
    io_uring_queue_exit(&ring_);
    throw HostError(error, {}, "io_uring takes no eventfd");
}

UringChannel::~UringChannel() {
    io_uring_queue_exit(&ring_);
}

void UringChannel::submit(Request& request) {
    const bool flush = request.operation == Operation::kFlush;
    if (flush && store_.ignores_flush()) return threads_.submit(request);
    const int fd = store_.ring_fd(request);
    io_uring_sqe* entry = fd < 0 ? nullptr : io_uring_get_sqe(&ring_);
    if (entry == nullptr && fd >= 0) {
        commit();
        entry = io_uring_get_sqe(&ring_);
    }
    if (entry == nullptr) return threads_.submit(request);
    const iovec* parts = request.buffers.data();
    const unsigned count = static_cast<unsigned>(request.buffers.size());
    if (flush) {
        io_uring_prep_fsync(entry, fd, IORING_FSYNC_DATASYNC);
    } else if (request.operation == Operation::kRead) {
        io_uring_prep_readv(entry, fd, parts, count, request.offset);
    } else {
        io_uring_prep_writev2(entry, fd, parts, count, request.offset,
                              request.durable && !store_.ignores_flush() ? RWF_DSYNC : 0);
    }
    io_uring_sqe_set_data(entry, &request);
    ++prepared_;
    ++in_ring_;
}

void UringChannel::commit() {
    threads_.commit();
    if (prepared_ == 0) return;
    if (armed_) io_uring_cq_eventfd_toggle(&ring_, armed_ = false);
    while (prepared_ != 0) {
        const int taken = io_uring_submit(&ring_);
        if (taken == -EINTR) continue;
        if (taken <= 0)
            return wakeup_->signal();  // the host is short of memory: again, a little later
        prepared_ -= static_cast<unsigned>(taken);
    }
}

Request* UringChannel::next_done() {
    while (true) {
        io_uring_cqe* entry = nullptr;
        while (in_ring_ != 0 && io_uring_peek_cqe(&ring_, &entry) == 0) {
            auto& request = *static_cast<Request*>(io_uring_cqe_get_data(entry));
            const int result = entry->res;
            io_uring_cqe_seen(&ring_, entry);
            --in_ring_;
            if (Request* done = finish(request, result)) return done;
        }
        if (Request* done = threads_.next_done()) return done;
        if (in_ring_ == 0 || armed_) return nullptr;
        io_uring_cq_eventfd_toggle(&ring_, armed_ = true);
        // What completed before the kernel saw that has to be found now.
        asm volatile("mfence" ::: "memory");  // (of a fence in C++, TSan knows nothing)
    }
}

Request* UringChannel::finish(Request& request, int result) {
    const bool transfer = request.operation != Operation::kFlush;
    if (transfer && result >= 0) request.advance(static_cast<u64>(result));
    if (transfer ? result >= 0 && request.size == 0 : result == 0) {
        request.error = 0;
        return &request;
    }
    // A flush that failed is not tried again: the kernel tells of lost writes only once.
    if (result >= 0 || result == -EAGAIN || result == -EINTR || result == -ECANCELED) {
        threads_.submit(request);
        threads_.commit();
        return nullptr;
    }
    request.error = -result;
    return &request;
}

void UringChannel::wait() {
    threads_.commit();
    while (in_ring_ != 0) {
        const int taken = io_uring_submit_and_wait(&ring_, 1);
        if (taken >= 0) {
            prepared_ -= static_cast<unsigned>(taken);
            return;
        }
        if (taken != -EINTR && taken != -EAGAIN && taken != -EBUSY) break;
    }
    threads_.wait();
}

}  // namespace polyvisor::block
