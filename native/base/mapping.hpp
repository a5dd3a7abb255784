#pragma once

#include <span>
#include <utility>

#include "base/types.hpp"

namespace polyvisor {

/// An owned mmap()ed range, unmapped once.
class Mapping {
  public:
    Mapping() = default;
    /// Maps `size` bytes of `fd` (-1: anonymous memory) shared (or private when anonymous),
    /// readable and writable. Throws HostError.
    Mapping(int fd, u64 offset, u64 size);
    Mapping(Mapping&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Mapping& operator=(Mapping&& other) noexcept;
    ~Mapping();

    u8* data() const { return data_; }
    u64 size() const { return size_; }

  private:
    u8* data_ = nullptr;
    u64 size_ = 0;
};

}  // namespace polyvisor
