#include "base/mapping.hpp"

#include <sys/mman.h>

#include <cerrno>

#include "base/error.hpp"

namespace polyvisor {

Mapping::Mapping(int fd, u64 offset, u64 size) : size_(size) {
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED | MAP_NORESERVE;
    void* at = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(offset));
    if (at == MAP_FAILED) throw_errno("cannot map " + std::to_string(size) + " bytes");
    data_ = static_cast<u8*>(at);
}

Mapping::Mapping(int fd, u64 size, const Placement& placement) : size_(size) {
    const u64 alignment = placement.alignment;
    const u64 room = size + alignment;
    void* at = MAP_FAILED;
    if (room > size) {
        at = ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    } else {
        errno = ENOMEM;
    }
    if (at == MAP_FAILED) throw_errno("cannot map " + std::to_string(size) + " bytes");
    u8* first = static_cast<u8*>(at);
    u8* begin = first + ((placement.phase - reinterpret_cast<u64>(first)) & (alignment - 1));
    int flags = (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_FIXED |
                (placement.reserve ? 0 : MAP_NORESERVE);
    if (::mmap(begin, size, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) {
        int error = errno;
        ::munmap(first, room);
        errno = error;
        throw_errno("cannot map " + std::to_string(size) + " bytes");
    }
    u8* end = begin + align_up(size, kPageSize);
    if (begin != first) ::munmap(first, static_cast<u64>(begin - first));
    if (end < first + room) ::munmap(end, static_cast<u64>(first + room - end));
    data_ = begin;
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(owned_, other.owned_);
    return *this;
}

Mapping::~Mapping() {
    if (data_ != nullptr && owned_) ::munmap(data_, size_);
}

}  // namespace polyvisor
