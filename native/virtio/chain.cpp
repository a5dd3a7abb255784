#include <algorithm>
#include <cstring>

#include "virtio/queue.hpp"

namespace polyvisor::virtio {

namespace {

// Calls `copy(host, done, bytes)` for each piece of [offset, offset + size) of the buffers.
template <class Copy>
u32 each_piece(std::span<const Buffer> buffers, u32 offset, std::size_t size, Copy copy) {
    std::size_t done = 0;
    for (const Buffer& buffer : buffers) {
        if (done == size) break;
        if (offset >= buffer.size) {
            offset -= buffer.size;
            continue;
        }
        std::size_t bytes = std::min<std::size_t>(buffer.size - offset, size - done);
        copy(buffer.data + offset, done, bytes);
        done += bytes;
        offset = 0;
    }
    return static_cast<u32>(done);
}

}  // namespace

u32 Chain::read(u32 offset, std::span<u8> into) const {
    return each_piece(readable(), offset, into.size(),
                      [&](const u8* host, std::size_t done, std::size_t bytes) {
                          std::memcpy(into.data() + done, host, bytes);
                      });
}

u32 Chain::write(u32 offset, std::span<const u8> from) const {
    return each_piece(writable(), offset, from.size(),
                      [&](u8* host, std::size_t done, std::size_t bytes) {
                          std::memcpy(host, from.data() + done, bytes);
                      });
}

}  // namespace polyvisor::virtio
