// Prints "ok" when guest memory of the installed core works from plain C++.
#include <iostream>

#include "base/error.hpp"
#include "memory/guest_memory.hpp"

int main() {
    using namespace polyvisor;
    GuestMemory memory;
    memory.add(Gpa(0), 1 << 20, "ram");
    memory.store<u32>(Gpa(0x1000), 0xcafe);
    if (memory.load<u16>(Gpa(0x1000)) != 0xcafe) return 1;
    try {
        memory.checked(Gpa(0xffffe), 4);
        return 2;
    } catch (const MemoryRangeError& error) {
        if (error.gpa != 0xffffe) return 3;
    }
    std::cout << "ok\n";
}
