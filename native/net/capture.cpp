#include "net/capture.hpp"

#include <fcntl.h>
#include <sys/uio.h>
#include <time.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::net {

namespace {

struct FileHeader {
    u32 magic = 0xa1b23c4d;  // times have nanoseconds
    u16 major = 2, minor = 4;
    u32 zone = 0, accuracy = 0;
    u32 longest = 262144;
    u32 network = 1;  // Ethernet
};
struct FrameRecord {
    u32 seconds, nanoseconds;
    u32 captured, original;
};

}  // namespace

void Capture::start(const std::string& path) {
    OwnedFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    const FileHeader header;
    if (!file || ::write(file.get(), &header, sizeof header) != sizeof header) {
        throw_errno("cannot write the capture file '" + path + "'", path);
    }
    std::lock_guard lock(mutex_);
    file_ = std::move(file);
    path_ = path;
    active_.store(true, std::memory_order_release);
}

void Capture::stop() {
    std::lock_guard lock(mutex_);
    active_.store(false, std::memory_order_release);
    file_.reset();
}

void Capture::add(std::span<const u8> frame) {
    timespec now;
    ::clock_gettime(CLOCK_REALTIME, &now);
    std::lock_guard lock(mutex_);
    if (!file_) return;
    const u32 size = static_cast<u32>(frame.size());
    FrameRecord record{static_cast<u32>(now.tv_sec), static_cast<u32>(now.tv_nsec), size, size};
    const iovec parts[] = {{&record, sizeof record}, {const_cast<u8*>(frame.data()), size}};
    const ssize_t written = ::writev(file_.get(), parts, 2);
    if (written == static_cast<ssize_t>(sizeof record + size)) return;
    if (log_ != nullptr) {
        log_->note("net", "the capture to '" + path_ +
                              "' ends: " + std::strerror(written < 0 ? errno : ENOSPC));
    }
    active_.store(false, std::memory_order_release);
    file_.reset();
}

}  // namespace polyvisor::net
