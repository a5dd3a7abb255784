#include "base/error.hpp"

#include <cerrno>

#include "check.hpp"

using namespace polyvisor;

int main() {
    try {
        errno = ENOSPC;
        throw_errno("cannot write the disk image", "/tmp/disk.img");
    } catch (const HostError& error) {
        CHECK_EQ(error.code, ENOSPC);
        CHECK_EQ(error.path, "/tmp/disk.img");
        CHECK_EQ(std::string(error.what()), "cannot write the disk image: No space left on device");
    }
    // Everything is an Error, which is what a caller of several parts catches.
    CHECK_THROWS(throw ConfigError("memory", "memory is 0"), Error);
    CHECK_THROWS(throw MemoryRangeError(0x1000, 16, "not backed"), Error);
    CHECK_THROWS(throw StateError("rip", "not canonical"), Error);
    CHECK_THROWS(throw EngineUnavailable("kvm", "missing", "no /dev/kvm"), Error);
    CHECK_THROWS(throw StateMismatch("running"), Error);
    MemoryRangeError range(0x1000, 16, "not backed");
    CHECK_EQ(range.gpa, 0x1000u);
    CHECK_EQ(range.size, 16u);
    return pvtest::finish("error");
}
