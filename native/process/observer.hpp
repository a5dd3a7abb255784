// Who looks at a program's system calls from outside: hooks, which may answer a call instead of us,
// and the trace.
//
// Hooks are not called by the program's thread, which is confined and must not wait for others'
// locks. It leaves an Inquiry and stands still, without the kernel's lock, while whoever waits for
// the kernel (Kernel::wait()) takes the inquiry, looks, and answers. Calls that nobody looks at
// cost one bit that is tested.
#pragma once

#include <array>
#include <bitset>
#include <deque>
#include <memory>
#include <optional>

#include "base/types.hpp"

namespace polyvisor::process {

class Thread;
class Trace;

using Arguments = std::array<u64, 6>;

/// A system call that is shown to somebody outside. Used with the kernel's lock.
struct Inquiry {
    enum class When : u8 { kBefore, kAfter };

    Thread* thread = nullptr;  ///< nullptr: it waits no longer, as it has to end
    int pid = 0, tid = 0;
    When when = When::kBefore;
    u32 number = 0;
    Arguments arguments{};
    s64 result = 0;       ///< kAfter
    u64 nanoseconds = 0;  ///< kAfter: that it took
    std::optional<s64>
        answer{};  ///< kBefore: the result, or -errno, that it has without being served
    bool answered = false;
};

/// Used with the kernel's lock.
class Observer {
  public:
    Observer();
    ~Observer();

    /// Calls with this number (kOthers: with one that has no name) leave inquiries from now on.
    void watch(u32 number, Inquiry::When when);
    /// Calls that the vDSO would answer are among these.
    bool watches_time() const { return watches_time_; }
    /// All calls are recorded from now on.
    void record(std::unique_ptr<Trace> trace);
    /// nullptr: there is none.
    Trace* trace() const { return trace_.get(); }
    bool looks_at(u32 number) const {
        return trace_ != nullptr || asks(Inquiry::When::kBefore, number) ||
               asks(Inquiry::When::kAfter, number);
    }

    /// The inquiry that has waited longest; nullptr: none does.
    std::shared_ptr<Inquiry> next() const {
        return inquiries_.empty() ? nullptr : inquiries_.front();
    }
    /// Its thread goes on: with this result of the call (kBefore), or with the call.
    void answer(Inquiry& inquiry, std::optional<s64> result);

    /// Serves a call of the thread's, and shows it to those who look.
    s64 serve(Thread& thread, u32 number, const Arguments& arguments);

    static constexpr u32 kOthers = 512;

  private:
    static std::size_t slot(Inquiry::When when) { return when == Inquiry::When::kBefore ? 0 : 1; }
    static std::size_t index(u32 number) { return number < kOthers ? number : kOthers; }
    bool asks(Inquiry::When when, u32 number) const { return hooks_[slot(when)][index(number)]; }
    std::optional<s64> ask(Thread& thread, Inquiry inquiry);

    std::bitset<kOthers + 1> hooks_[2];
    bool watches_time_ = false;
    std::deque<std::shared_ptr<Inquiry>> inquiries_;
    std::unique_ptr<Trace> trace_;
};

}  // namespace polyvisor::process
