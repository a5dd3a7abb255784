#include "host/init/network.hpp"

#include <linux/sockios.h>

#include "host/init/report.hpp"
#include "host/init/sys.hpp"

namespace polyvisor::host::init {

void raise_loopback() {
    constexpr int kInet = 2, kDatagram = 2, kCloexec = 02000000, kUpAndRunning = 0x41;
    const Fd socket(check(sys(__NR_socket, kInet, kDatagram | kCloexec, 0), "make a socket"));
    // struct ifreq; its header wants a C library's.
    struct {
        char name[16];
        u16 flags;
        char rest[22];
    } const request{"lo", kUpAndRunning, ""};
    check(sys(__NR_ioctl, socket.get(), SIOCSIFFLAGS, &request), "raise the interface", "lo");
}

}  // namespace polyvisor::host::init
