// Takes ioctl()'s place in a test program, so that a KVM that this host does not have can be
// played: answers by request, everything else goes to the kernel.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <functional>
#include <map>

namespace pvtest {

/// The answer; negative: -errno.
using FakeAnswer = std::function<long(int fd, void* argument)>;
inline std::map<unsigned long, FakeAnswer> fake_answers;

inline long kernel_ioctl(int fd, unsigned long request, void* argument) {
    long result = ::syscall(SYS_ioctl, fd, request, argument);
    return result < 0 ? -errno : result;
}

}  // namespace pvtest

extern "C" int ioctl(int fd, unsigned long request, ...) noexcept {
    va_list list;
    va_start(list, request);
    void* argument = va_arg(list, void*);
    va_end(list);
    auto found = pvtest::fake_answers.find(request);
    long result = found != pvtest::fake_answers.end() ? found->second(fd, argument)
                                                      : pvtest::kernel_ioctl(fd, request, argument);
    if (result >= 0) return static_cast<int>(result);
    errno = static_cast<int>(-result);
    return -1;
}
