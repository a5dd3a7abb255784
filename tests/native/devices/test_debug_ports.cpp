// The debug console and isa-debug-exit.
#include "devices/debug_ports.hpp"

#include "base/error.hpp"
#include "check.hpp"
#include "devices/char_backends.hpp"
#include "ports.hpp"

using namespace polyvisor;
using namespace polyvisor::devices;

int main() {
    Clock clock(Clock::Mode::kDeterministic);
    BufferSink sink;
    DebugConsole console(clock, &sink);
    CHECK_EQ(in(console, 0), 0xe9);
    for (char c : std::string("hello\n")) out(console, 0, static_cast<u8>(c));
    CHECK_EQ(sink.text(), "hello\n");
    out(console, 0, u8{'$'});
    console.flush();
    CHECK_EQ(sink.text(), "hello\n$");
    CHECK(console.save().empty());
    u8 byte = 0;
    CHECK_THROWS(console.restore({&byte, 1}), StateError);

    std::vector<u32> statuses;
    DebugExit exit([&](u32 status) { statuses.push_back(status); });
    out(exit, 0, u8{0x10});
    out<u32>(exit, 0, 3);
    out<u16>(exit, 2, 3);  // only the first port counts
    CHECK_EQ(statuses.size(), 2u);
    CHECK_EQ(statuses[0], 0x21u);
    CHECK_EQ(statuses[1], 7u);
    CHECK_EQ(in<u32>(exit, 0), 0u);
    return pvtest::finish("test_debug_ports");
}
