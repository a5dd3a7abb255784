#include "process/observer.hpp"

#include <sys/syscall.h>
#include <time.h>

#include <algorithm>

#include "process/thread.hpp"
#include "process/trace.hpp"

namespace polyvisor::process {

namespace {

u64 now() {
    timespec time{};
    ::clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<u64>(time.tv_sec) * 1'000'000'000 + static_cast<u64>(time.tv_nsec);
}

}  // namespace

Observer::Observer() = default;
Observer::~Observer() = default;

void Observer::watch(u32 number, Inquiry::When when) {
    hooks_[slot(when)].set(index(number));
    for (u32 time : {SYS_clock_gettime, SYS_clock_getres, SYS_gettimeofday, SYS_time, SYS_getcpu}) {
        watches_time_ |= number == time;
    }
}

void Observer::record(std::unique_ptr<Trace> trace) {
    trace_ = std::move(trace);
}

void Observer::answer(Inquiry& inquiry, std::optional<s64> result) {
    inquiry.answered = true;
    inquiry.answer = result;
    std::erase_if(inquiries_, [&](const auto& other) { return other.get() == &inquiry; });
    if (inquiry.thread != nullptr) inquiry.thread->notify();
}

std::optional<s64> Observer::ask(Thread& thread, Inquiry inquiry) {
    auto shown = inquiries_.emplace_back(std::make_shared<Inquiry>(inquiry));
    shown->thread = &thread;
    shown->pid = thread.process().pid;
    shown->tid = thread.tid();
    thread.wait_until([&] { return shown->answered; });
    shown->thread = nullptr;
    std::erase(inquiries_, shown);
    return shown->answer;
}

s64 Observer::serve(Thread& thread, u32 number, const Arguments& arguments) {
    Event event;
    if (trace_) event = trace_->enter(thread, number, arguments);
    std::optional<s64> answer;
    if (asks(Inquiry::When::kBefore, number)) {
        answer = ask(thread, {.number = number, .arguments = arguments});
    }
    const u64 begin = now();
    s64 result = -EINTR;
    // (Who was to end while it stood still does nothing more.)
    if (answer || !thread.ending) {
        result = answer ? *answer : serve_system_call(thread, number, arguments);
    }
    const u64 took = now() - begin;
    thread.forget_strings();
    if (trace_) trace_->leave(thread, std::move(event), result, begin, took);
    if (asks(Inquiry::When::kAfter, number) && !thread.ending) {
        ask(thread, {.when = Inquiry::When::kAfter,
                     .number = number,
                     .arguments = arguments,
                     .result = result,
                     .nanoseconds = took});
    }
    return result;
}

}  // namespace polyvisor::process
