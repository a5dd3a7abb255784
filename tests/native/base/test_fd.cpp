#include "base/fd.hpp"

#include <fcntl.h>

#include "check.hpp"

using namespace polyvisor;

static bool is_open(int fd) {
    return ::fcntl(fd, F_GETFD) >= 0;
}
static OwnedFd open_null() {
    return OwnedFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
}

int main() {
    int raw;
    {
        OwnedFd fd = open_null();
        raw = fd.get();
        CHECK(fd);
        CHECK(is_open(raw));
    }
    CHECK(!is_open(raw));

    OwnedFd first = open_null();
    raw = first.get();
    OwnedFd second = std::move(first);
    CHECK(!first);
    CHECK_EQ(second.get(), raw);

    // Assignment closes what was owned before, and is harmless to itself.
    OwnedFd third = open_null();
    int replaced = third.get();
    third = std::move(second);
    CHECK(!is_open(replaced));
    CHECK(is_open(raw));
    OwnedFd& same = third;
    third = std::move(same);
    CHECK_EQ(third.get(), raw);

    int released = third.release();
    CHECK(!third);
    third.reset();
    CHECK(is_open(released));
    ::close(released);
    return pvtest::finish("fd");
}
