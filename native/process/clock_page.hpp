// The monitor's side of the vDSO: it keeps the page that a program reads the time from.
//
// The program's TSC is made the host's (on KVM) or CLOCK_MONOTONIC (on our own CPU), and a line
// through the host's clocks over it is written to the page every now and then: when a system call
// is served and the page is older than half of what it is good for. A program that makes none for
// longer than that makes one for the next time it wants to know.
//
// What the page gives is within a microsecond of the host's clocks, and what their rate is changed
// by meanwhile (500 ppm of 50 ms at most, when NTP slews them). It does not go backwards. A host
// clock that is set is seen when the page is written next.
#pragma once

#include <atomic>
#include <mutex>

#include "bus/clock.hpp"
#include "process/vdso/clock_page.h"

namespace polyvisor::process {

class ClockPage {
  public:
    static constexpr u64 kValidMilliseconds = 50;

    /// `page`: the host's side of it, zeroes so far. `native`: the program executes RDTSC on the
    /// host's CPU. Moves `clock`, whose TSC is then the host's: before the vCPU is run.
    ClockPage(Clock& clock, bool native, u8* page);

    /// What the vDSO says with its system call: the TSC that it saw. Until one was right there is
    /// nothing in the page, since there are KVMs that do not move a guest's TSC where they are told
    /// to.
    void confirm(u64 seen);
    /// Writes the page, if it is about time. Any thread.
    void refresh();
    /// From now on all that programs want to know of the time are system calls, or not.
    void show_calls(bool wanted);

  private:
    struct Line {
        clockid_t clock;
        pv_clock_line* shown;
        pv_clock_line line{};
        u64 rate = 0, anchor_tsc = 0, anchor_time = 0;
    };
    u64 tsc() const;
    void advance(Line& line) const;
    void write();

    Clock& clock_;
    bool native_;
    pv_clock_page& page_;
    u64 valid_, nominal_;
    std::atomic<bool> confirmed_{false};
    std::atomic<u64> written_{0};  // TSC
    std::mutex mutex_;             // a leaf
    Line monotonic_, raw_;
    s64 realtime_ = 0, boottime_ = 0, tai_ = 0;
};

}  // namespace polyvisor::process
