#include "block/thread_channel.hpp"

#include <pthread.h>
#include <signal.h>

#include <system_error>

#include "base/error.hpp"

namespace polyvisor::block {

ThreadChannel::ThreadChannel(Store& store, std::shared_ptr<Wakeup> wakeup)
    : store_(store), wakeup_(std::move(wakeup)), most_threads_(store.info().threads) {}

ThreadChannel::~ThreadChannel() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    wanted_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void ThreadChannel::commit() {
    if (batch_.empty()) return;
    std::size_t missing;
    {
        std::lock_guard lock(mutex_);
        waiting_.insert(waiting_.end(), batch_.begin(), batch_.end());
        missing = waiting_.size() > idle_ ? waiting_.size() - idle_ : 0;
    }
    for (; missing != 0 && threads_.size() < most_threads_; --missing) start_thread();
    batch_.size() == 1 ? wanted_.notify_one() : wanted_.notify_all();
    batch_.clear();
}

// Signals are for the program's own threads. Without the first thread nothing would ever be done;
// then the submitter does it.
void ThreadChannel::start_thread() {
    sigset_t all, before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
        if (threads_.empty()) {
            std::lock_guard lock(mutex_);
            for (Request* request : waiting_) {
                request->error = store_.perform(*request);
                done_.push_back(request);
            }
            waiting_.clear();
            wakeup_->signal();
        }
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadChannel::work() {
    ::pthread_setname_np(::pthread_self(), "pv-block");
    std::unique_lock lock(mutex_);
    while (true) {
        ++idle_;
        wanted_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
        --idle_;
        if (stopping_) return;
        Request* request = waiting_.front();
        waiting_.pop_front();
        lock.unlock();
        request->error = store_.perform(*request);
        lock.lock();
        done_.push_back(request);
        // Who takes them goes on until there are none: it needs to be told of the first only.
        if (done_.size() != 1) continue;
        lock.unlock();
        finished_.notify_all();
        wakeup_->signal();
        lock.lock();
    }
}

Request* ThreadChannel::next_done() {
    if (in_flight_ == 0) return nullptr;
    std::lock_guard lock(mutex_);
    if (done_.empty()) return nullptr;
    --in_flight_;
    Request* request = done_.front();
    done_.pop_front();
    return request;
}

void ThreadChannel::wait() {
    commit();
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return !done_.empty(); });
}

}  // namespace polyvisor::block
