// A whole machine from plain C++: a guest of a few bytes in real mode that computes 6 * 7, stores
// the product at 0x2000 and ends the machine with it. Prints "ok".
#include <array>
#include <chrono>
#include <iostream>

#include "base/error.hpp"
#include "machine/machine.hpp"

using namespace polyvisor;

int main() {
    MachineConfig config;
    config.memory = 1 << 20;
    config.engine = "soft";
    Machine machine(config);

    const std::array<u8, 13> guest = {
        0xb8, 0x06, 0x00,  // mov ax, 6
        0xb1, 0x07,        // mov cl, 7
        0xf6, 0xe1,        // mul cl
        0xa2, 0x00, 0x20,  // mov [0x2000], al
        0xe6, 0xf4,        // out 0xf4, al     (the debug-exit port)
        0xf4,              // hlt
    };
    machine.memory()->write(Gpa(0x1000), guest);
    CpuState state = machine.vcpu(0).save();
    Segment& cs = state.segments[1];
    cs.base = cs.selector = 0;
    state.rip = 0x1000;
    machine.vcpu(0).restore(state);

    machine.start();
    if (!machine.wait(std::chrono::seconds(20))) {
        std::cerr << "the guest did not end\n";
        return 1;
    }
    StopInfo info = machine.stop_info();
    if (info.reason != StopReason::kDebugExit || machine.memory()->load<u8>(Gpa(0x2000)) != 42) {
        std::cerr << "ended otherwise: " << info.detail << '\n';
        return 2;
    }
    try {
        machine.memory()->checked(Gpa(0xffffe), 4);
        return 3;
    } catch (const MemoryRangeError& error) {
        if (error.gpa != 0xffffe) return 4;
    }
    std::cout << "ok\n";
}
