// A virtqueue as Python sees it: what polyvisor._ring (Cython), which pops and pushes, and the
// device in polyvisor._native, which holds and lets go, share.
//
// A queue has a mutex (virtio::Device::Held), which is always taken before the GIL. Whoever has it
// is written here, so that a Python thread that has not is told so instead of racing.
#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "virtio/queue.hpp"

namespace polyvisor::python {

class Ring {
  public:
    Ring(std::shared_ptr<GuestMemory> memory, std::string device, unsigned index)
        : memory_(std::move(memory)), device_(std::move(device)), index_(index) {}
    virtual ~Ring() = default;
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    unsigned index() const { return index_; }
    const std::string& device() const { return device_; }
    /// Chains' buffers lie in it.
    const std::shared_ptr<GuestMemory>& memory() const { return memory_; }

    /// Waits for the queue, without the GIL. What speaks against it, or nothing.
    virtual std::string take() noexcept = 0;
    virtual void give() noexcept = 0;
    /// This thread has taken the queue when it was not alive: nothing to pop, nothing to push to.
    virtual bool taken_dead() const noexcept = 0;

    /// This thread has the queue; what follows is for such threads.
    bool mine() const { return holder_.load(std::memory_order_relaxed) == ::pthread_self(); }
    virtio::Queue& queue() { return *queue_; }
    void begin(virtio::Queue& queue) {
        queue_ = &queue;
        holder_.store(::pthread_self(), std::memory_order_relaxed);
    }
    /// Whoever stopped looking half way hears of the next chain again.
    void end() {
        if (quiet_) queue_->enable_notify();
        quiet_ = false;
        holder_.store(0, std::memory_order_relaxed);
        queue_ = nullptr;
    }
    /// The next chain. When there is none, the driver notifies of the next.
    bool next(virtio::Chain& chain) {
        if (!quiet_) queue_->disable_notify();
        quiet_ = true;
        while (!queue_->pop(chain)) {
            quiet_ = false;
            if (!queue_->enable_notify()) return false;
            queue_->disable_notify();
            quiet_ = true;
        }
        ++outstanding_;
        last_ = &chain;
        return true;
    }
    void push(const virtio::Chain& chain, u32 written) {
        queue_->push(chain, written);
        --outstanding_;
        last_ = nullptr;
    }
    /// False: it is not the last that was popped, or something was pushed since.
    bool unpop(const virtio::Chain& chain) {
        if (last_ != &chain) return false;
        queue_->unpop(chain);
        --outstanding_;
        last_ = nullptr;
        return true;
    }

    /// Chains taken before the driver reset the queue belong to nobody.
    u64 generation() const { return generation_.load(std::memory_order_acquire); }
    void forget() {
        generation_.fetch_add(1, std::memory_order_acq_rel);
        outstanding_ = 0;
    }
    /// Chains that were popped and not pushed.
    u32 outstanding() const { return outstanding_.load(std::memory_order_relaxed); }

    /// Chains are large, so they are used again. The GIL guards them.
    std::unique_ptr<virtio::Chain> chain() {
        if (spare_.empty()) return std::make_unique<virtio::Chain>();
        auto chain = std::move(spare_.back());
        spare_.pop_back();
        return chain;
    }
    void done(std::unique_ptr<virtio::Chain> chain) {
        if (spare_.size() < kSpare) spare_.push_back(std::move(chain));
    }

  private:
    static constexpr std::size_t kSpare = 64;

    std::shared_ptr<GuestMemory> memory_;
    std::string device_;
    unsigned index_;
    std::atomic<pthread_t> holder_{0};
    virtio::Queue* queue_ = nullptr;
    bool quiet_ = false;                   // the driver need not notify
    const virtio::Chain* last_ = nullptr;  // that was popped, until anything is pushed
    std::atomic<u64> generation_{1};
    std::atomic<u32> outstanding_{0};
    std::vector<std::unique_ptr<virtio::Chain>> spare_;
};

}  // namespace polyvisor::python
