#include "block/store.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor::block {

const char* name_of(Operation operation) {
    constexpr const char* kNames[] = {"read", "write", "flush", "discard", "write-zeroes"};
    return kNames[static_cast<unsigned>(operation)];
}

void Request::advance(u64 bytes) {
    offset += bytes;
    size -= bytes;
    while (!buffers.empty() && bytes >= buffers.front().iov_len) {
        bytes -= buffers.front().iov_len;
        buffers = buffers.subspan(1);
    }
    if (bytes != 0 && !buffers.empty()) {
        iovec& part = buffers.front();
        part.iov_base = static_cast<u8*>(part.iov_base) + bytes;
        part.iov_len -= bytes;
    }
}

std::vector<iovec> Request::first_bytes(u64 bytes) const {
    std::vector<iovec> result;
    for (const iovec& part : buffers) {
        if (bytes == 0) break;
        result.push_back({part.iov_base, std::min<u64>(part.iov_len, bytes)});
        bytes -= result.back().iov_len;
    }
    return result;
}

void gather(std::span<const iovec> parts, std::span<u8> into) {
    for (const iovec& part : parts) {
        const std::size_t size = std::min(part.iov_len, into.size());
        std::memcpy(into.data(), part.iov_base, size);
        into = into.subspan(size);
        if (into.empty()) return;
    }
}

void scatter(std::span<const iovec> parts, std::span<const u8> from) {
    for (const iovec& part : parts) {
        const std::size_t size = std::min(part.iov_len, from.size());
        std::memcpy(part.iov_base, from.data(), size);
        from = from.subspan(size);
        if (from.empty()) return;
    }
}

void Store::resize(u64) {
    throw StateMismatch("disk '" + name() + "' cannot change its size");
}

}  // namespace polyvisor::block
