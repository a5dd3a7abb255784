// A disk image in a temporary folder, and a driver of virtio-blk without Linux.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "block/file_store.hpp"
#include "virtio/blk.hpp"
#include "virtio/fake_guest.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::virtio;

/// A folder that is gone at its end: in memory, where a flush costs nothing, or on a real file
/// system, which has O_DIRECT.
class Folder {
  public:
    explicit Folder(bool real = false) {
        const bool memory = !real && ::access("/dev/shm", W_OK) == 0;
        std::string name = std::string(memory ? "/dev/shm" : "/var/tmp") + "/pv-disk-XXXXXX";
        if (::mkdtemp(name.data()) == nullptr) throw_errno("mkdtemp", name);
        path_ = name;
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    std::string file(const std::string& name, std::span<const u8> contents) const {
        const std::string path = path_ + "/" + name;
        OwnedFd fd(::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600));
        if (!fd || ::write(fd.get(), contents.data(), contents.size()) !=
                       static_cast<ssize_t>(contents.size())) {
            throw_errno("cannot write the image", path);
        }
        return path;
    }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
};

inline std::vector<u8> contents_of(const std::string& path) {
    OwnedFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    std::vector<u8> bytes(std::filesystem::file_size(path));
    if (::read(fd.get(), bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) {
        throw_errno("cannot read the image", path);
    }
    return bytes;
}

/// Memory, an event loop, a log: what a machine gives a device.
struct Host {
    Host() {
        memory.add(Gpa(0), 64 << 20, "ram");
        loop.start();
    }
    Environment environment() { return {memory, loop, &log}; }

    GuestMemory memory;
    Clock clock;
    EventLoop loop{clock};
    std::vector<std::string> lines;
    std::mutex lines_mutex;
    Log log{[this](std::string_view line) {
                std::lock_guard lock(lines_mutex);
                lines.emplace_back(line);
            },
            1000};
};

struct DiskHeader {
    u32 type, reserved;
    u64 sector;
};
template <class T>
std::span<const u8> bytes_of(const T& value) {
    return {reinterpret_cast<const u8*>(&value), sizeof value};
}

/// One request on queue 0, whose answer it waits for: what the device wrote, status last.
inline std::vector<u8> ask(FakeGuest& guest, u32 type, u64 sector, std::span<const u8> out,
                           u32 in) {
    guest.free_buffers();
    const DiskHeader header{type, 0, sector};
    if (out.empty()) return guest.request(0, {bytes_of(header)}, in + 1);
    return guest.request(0, {bytes_of(header), out}, in + 1);
}
inline u8 status_of(const std::vector<u8>& answer) {
    return answer.empty() ? 0xff : answer.back();
}

}  // namespace pvtest
