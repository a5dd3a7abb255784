// A channel of threads that call Store::perform(): for stores that block, and where there is no
// io_uring. Threads start when there is work for them.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "block/channel.hpp"

namespace polyvisor::block {

class ThreadChannel final : public Channel {
  public:
    ThreadChannel(Store& store, std::shared_ptr<Wakeup> wakeup);
    ~ThreadChannel() override;

    void submit(Request& request) override {
        batch_.push_back(&request);
        ++in_flight_;
    }
    void commit() override;
    Request* next_done() override;
    void wait() override;
    const char* kind() const override { return "threads"; }

  private:
    void work();
    void start_thread();

    Store& store_;
    // The threads do not call notify() themselves: who has the lock that it takes may be waiting
    // for all that is in flight, also for what no thread has begun yet.
    const std::shared_ptr<Wakeup> wakeup_;
    const unsigned most_threads_;
    std::vector<Request*> batch_;  // this and the next are the submitter's
    unsigned in_flight_ = 0;

    std::mutex mutex_;  // a leaf
    std::condition_variable wanted_, finished_;
    std::deque<Request*> waiting_, done_;
    unsigned idle_ = 0;
    bool stopping_ = false;
    std::vector<std::thread> threads_;  // the submitter's
};

}  // namespace polyvisor::block
