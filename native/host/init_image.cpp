#include "host/init_image.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "base/types.hpp"

extern "C" const polyvisor::u8 pv_init_start[], pv_init_end[];

namespace polyvisor::host {

namespace {

constexpr unsigned kMfdExec = 0x10;  // Linux 6.3

OwnedFd make_image() {
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    OwnedFd file(::memfd_create("polyvisor-init", flags | kMfdExec));
    if (!file) file = OwnedFd(::memfd_create("polyvisor-init", flags));
    const auto size = static_cast<std::size_t>(pv_init_end - pv_init_start);
    if (!file || ::write(file.get(), pv_init_start, size) != static_cast<ssize_t>(size) ||
        ::fcntl(file.get(), F_ADD_SEALS,
                F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) != 0) {
        throw_errno("the init program of sandboxes cannot be put into a file in memory");
    }
    return file;
}

}  // namespace

int init_image() {
    static const OwnedFd image = make_image();
    return image.get();
}

}  // namespace polyvisor::host
