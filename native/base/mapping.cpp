#include "base/mapping.hpp"

#include <sys/mman.h>

#include "base/error.hpp"

namespace polyvisor {

Mapping::Mapping(int fd, u64 offset, u64 size) : size_(size) {
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED | MAP_NORESERVE;
    void* at = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(offset));
    if (at == MAP_FAILED) throw_errno("cannot map " + std::to_string(size) + " bytes");
    data_ = static_cast<u8*>(at);
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Mapping::~Mapping() {
    if (data_ != nullptr) ::munmap(data_, size_);
}

}  // namespace polyvisor
