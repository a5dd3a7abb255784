// System calls without a C library: the init of a sandbox is one static program of a few pages,
// which the kernel executes in a tenth of the time that a C library takes to start.
//
// Every call returns what the kernel returned: a negative errno is an error.
#pragma once

#include <asm/unistd.h>
#include <linux/fcntl.h>

#include "base/types.hpp"

namespace polyvisor::host::init {

template <class... Arguments>
inline long sys(long number, Arguments... arguments) {
    static_assert(sizeof...(arguments) <= 6);
    const long all[6] = {(long)arguments...};
    long result;
    register long r10 __asm__("r10") = all[3];
    register long r8 __asm__("r8") = all[4];
    register long r9 __asm__("r9") = all[5];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(all[0]), "S"(all[1]), "d"(all[2]), "r"(r10), "r"(r8),
                       "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

// Of calls newer than the oldest kernel headers that polyvisor is built with.
constexpr long kSysOpenTree = 428, kSysMoveMount = 429, kSysFsopen = 430, kSysFsconfig = 431,
               kSysFsmount = 432, kSysCloseRange = 436, kSysOpenat2 = 437, kSysMountSetattr = 442;

constexpr int kCwd = -100;  // AT_FDCWD
constexpr int kEintr = 4, kEnoent = 2, kEacces = 13, kEexist = 17, kEnotdir = 20, kEinval = 22,
              kEloop = 40, kEagain = 11, kEnametoolong = 36;

inline std::size_t length_of(const char* text) {
    std::size_t length = 0;
    while (text[length] != '\0') ++length;
    return length;
}

inline void close_fd(int fd) {
    if (fd >= 0) sys(__NR_close, fd);
}

/// Closed at the end of the block.
class Fd {
  public:
    explicit Fd(long fd) : fd_(static_cast<int>(fd)) {}
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    ~Fd() { close_fd(fd_); }
    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    /// errno of the call that should have opened it.
    int error() const { return -fd_; }

  private:
    int fd_;
};

}  // namespace polyvisor::host::init
