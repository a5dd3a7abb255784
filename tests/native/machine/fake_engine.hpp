// An engine whose guest is a C++ function: what the machine does with exits, pauses and stops can
// be tested without a CPU.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>

#include "cpu/engine.hpp"

namespace pvtest {

using namespace polyvisor;

class FakeVcpu final : public Vcpu {
  public:
    /// One call is one run(); it gets the vCPU to look at stop requests.
    using Guest = std::function<Exit(FakeVcpu&)>;

    FakeVcpu(u32 id, Guest guest) : id_(id), guest_(std::move(guest)) {}

    Exit run() override {
        if (take_stop()) return {};
        ++runs;
        return guest_(*this);
    }
    void request_stop() override {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
    }
    /// What a guest that is halted or loops for ever does: waits for request_stop().
    Exit wait_for_stop() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return stop_; });
        stop_ = false;
        return {};
    }
    bool take_stop() {
        std::lock_guard lock(mutex_);
        return std::exchange(stop_, false);
    }
    void set_instruction_budget(u64 instructions) override { budget = instructions; }
    void set_debug(const GuestDebug& to) override { debug = to; }
    void raise_int3() override { ++int3s; }
    CpuState save() const override { return state; }
    void restore(const CpuState& to) override { state = to; }
    GeneralRegisters general() const override { return {state.gpr, state.rip, state.rflags}; }
    void set_general(const GeneralRegisters& to) override {
        state.gpr = to.gpr, state.rip = to.rip, state.rflags = to.rflags;
    }
    u32 id() const override { return id_; }
    bool translate(u64, u64&) const override { return false; }
    std::vector<Counter> counters() const override { return {{"runs", runs}}; }
    void interrupt() override {}
    void nmi() override { ++nmis; }
    void smi() override {}
    void init() override {}
    void sipi(u8) override {}

    CpuState state;
    u64 budget = ~u64{0};
    GuestDebug debug;
    std::atomic<u64> runs{0}, nmis{0}, int3s{0};

  private:
    u32 id_;
    Guest guest_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool stop_ = false;
};

/// Notes what the host writes; the guest is a function, and writes nothing.
class FakeDirtyLog final : public DirtyLog {
  public:
    const char* method() const override { return "none"; }
    bool active() const override { return active_; }
    void start() override { active_ = true; }
    void stop() override { active_ = false; }
    void fetch(const GuestMemory::Region& region, std::span<u64> bitmap) override {
        region.take_dirty(bitmap);
    }

  private:
    bool active_ = false;
};

class FakeEngine final : public Engine {
  public:
    explicit FakeEngine(FakeVcpu::Guest guest) : guest_(std::move(guest)) {}
    Caps caps() const override { return {.instruction_budget = true, .deterministic = true}; }
    const char* name() const override { return "fake"; }
    DirtyLog& dirty_log() override { return dirty_log_; }
    std::unique_ptr<Vcpu> create_vcpu(u32 id, LocalInterrupts*) override {
        return std::make_unique<FakeVcpu>(id, guest_);
    }

  private:
    FakeDirtyLog dirty_log_;
    FakeVcpu::Guest guest_;
};

inline Exit make_exit(ExitReason reason, std::string text = {}) {
    Exit exit;
    exit.reason = reason;
    exit.text = std::move(text);
    return exit;
}

}  // namespace pvtest
