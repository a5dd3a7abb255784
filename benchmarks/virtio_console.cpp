// What a console write costs the host outside the CPU engine: a driver without Linux, and the
// device. Arguments: bytes of a write, writes. Prints nanoseconds of the process's CPU time per
// write, which the driver's own part is in.
#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>

#include "virtio/console.hpp"
#include "virtio/fake_guest.hpp"

using namespace polyvisor;
using namespace polyvisor::virtio;

namespace {

double cpu_seconds() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const auto size = static_cast<u32>(std::atoi(argv[1]));
    const int writes = std::atoi(argv[2]);
    GuestMemory memory;
    memory.add(Gpa(0), 16 << 20, "ram");
    Clock clock;
    EventLoop loop(clock);
    loop.start();
    Console device({memory, loop}, {{{"", true}}});
    FakeGuest guest(device, memory);
    const u64 buffer = guest.buffer(size);
    const double start = cpu_seconds();
    for (int i = 0; i < writes; ++i) {
        guest.driver(1).add({{buffer, size, false}});
        guest.kick(1);
        if (!guest.driver(1).get()) return 1;  // as Linux: it spins until the write is taken
    }
    std::printf("%.0f\n", (cpu_seconds() - start) * 1e9 / writes);
    return device.console(0)->size() == u64{size} * static_cast<u64>(writes) ? 0 : 1;
}
