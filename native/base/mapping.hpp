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
    /// Maps `fd` from its start, shared (-1: private anonymous memory), at an address that is
    /// congruent to `phase` modulo `alignment` (a power of two, at least a page): what lies at such
    /// a distance in another address space can be one huge page in both. `reserve`: fails now,
    /// rather than with SIGBUS when the memory is touched, if the host cannot promise all of it
    /// (huge pages).
    struct Placement {
        u64 alignment = kPageSize;
        u64 phase = 0;
        bool reserve = false;
    };
    Mapping(int fd, u64 size, const Placement& placement);
    /// A range that is somebody else's and stays mapped.
    static Mapping borrowed(u8* data, u64 size) {
        Mapping mapping;
        mapping.data_ = data;
        mapping.size_ = size;
        mapping.owned_ = false;
        return mapping;
    }
    Mapping(Mapping&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)),
          size_(std::exchange(other.size_, 0)),
          owned_(other.owned_) {}
    Mapping& operator=(Mapping&& other) noexcept;
    ~Mapping();

    u8* data() const { return data_; }
    u64 size() const { return size_; }

  private:
    u8* data_ = nullptr;
    u64 size_ = 0;
    bool owned_ = true;
};

}  // namespace polyvisor
