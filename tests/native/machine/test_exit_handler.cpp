// What each exit means, without a machine or a CPU.
#include "base/error.hpp"
#include "check.hpp"
#include "machine/exit_handler.hpp"

using namespace polyvisor;

namespace {

struct Result {
    Exit exit;
    Next next;
    StopInfo stop;
    u64 notes;
};

Result handle(ExitReason reason, bool write = false, std::string text = {}) {
    Log log;
    Result result;
    result.exit.reason = reason;
    result.exit.write = write;
    result.exit.size = 4;
    result.exit.address = 0x1234;
    result.exit.data.fill(0x55);
    result.exit.text = std::move(text);
    result.next = handle_exit(result.exit, 3, log, result.stop);
    result.notes = log.counts().empty() ? 0 : log.counts()[0].count;
    return result;
}

void unclaimed_accesses_float() {
    for (ExitReason reason : {ExitReason::kIo, ExitReason::kMmio}) {
        Result read = handle(reason);
        CHECK(read.next == Next::kRun);
        CHECK_EQ(unsigned{read.exit.data[0]}, 0xffu);
        CHECK_EQ(unsigned{read.exit.data[7]}, 0xffu);
        CHECK_EQ(read.notes, 1u);
        Result write = handle(reason, true);
        CHECK(write.next == Next::kRun);
        CHECK_EQ(unsigned{write.exit.data[0]}, 0x55u);
    }
}

void unknown_msrs_read_zero() {
    Result read = handle(ExitReason::kMsr);
    CHECK(read.next == Next::kRun);
    CHECK_EQ(unsigned{read.exit.data[0]}, 0u);
    CHECK_EQ(read.notes, 1u);
}

void unknown_hypercalls_fail() {
    Result result = handle(ExitReason::kHypercall);
    CHECK(result.next == Next::kRun);
    CHECK_EQ(unsigned{result.exit.data[0]}, 0xffu);
}

void ends_carry_reason_and_text() {
    Result fault = handle(ExitReason::kShutdown, false, "triple fault at 0x7c00");
    CHECK(fault.next == Next::kEnd);
    CHECK_EQ(fault.stop.reason, StopReason::kTripleFault);
    CHECK_EQ(fault.stop.detail, std::string("triple fault at 0x7c00"));
    CHECK_EQ(fault.stop.cpu, 3u);
    CHECK(!handle(ExitReason::kShutdown).stop.detail.empty());

    Result fail = handle(ExitReason::kFail, false, "out of luck");
    CHECK(fail.next == Next::kEnd);
    CHECK_EQ(fail.stop.reason, StopReason::kEngineFailure);
    CHECK_EQ(fail.stop.detail, std::string("out of luck"));
}

void the_rest_goes_on() {
    CHECK(handle(ExitReason::kInterrupted).next == Next::kRun);
    CHECK(handle(ExitReason::kHalt).next == Next::kHalted);
    CHECK(handle(ExitReason::kDebug).next == Next::kPause);
}

void names_of_reasons_go_both_ways() {
    for (unsigned n = 0; n <= static_cast<unsigned>(StopReason::kEngineFailure); ++n) {
        auto reason = static_cast<StopReason>(n);
        CHECK_EQ(stop_reason(to_string(reason)), reason);
    }
    CHECK_THROWS(stop_reason("boredom"), ConfigError);
}

}  // namespace

int main() {
    unclaimed_accesses_float();
    unknown_msrs_read_zero();
    unknown_hypercalls_fail();
    ends_carry_reason_and_text();
    the_rest_goes_on();
    names_of_reasons_go_both_ways();
    return pvtest::finish("test_exit_handler");
}
