// Which pages of a region the host has given memory to, and giving it back.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "base/error.hpp"
#include "memory/guest_memory.hpp"

namespace polyvisor {

namespace {

using Extents = std::vector<GuestMemory::Extent>;

void append(Extents& extents, u64 offset, u64 size) {
    if (!extents.empty() && extents.back().offset + extents.back().size == offset) {
        extents.back().size += size;
    } else {
        extents.push_back({offset, size});
    }
}

Extents data_segments(const GuestMemory::Region& region) {
    Extents extents;
    const int fd = region.fd.get();
    const auto size = static_cast<off_t>(region.size);
    for (off_t at = 0; at < size;) {
        off_t begin = ::lseek(fd, at, SEEK_DATA);
        if (begin < 0 || begin >= size) break;  // ENXIO: nothing but holes from here on
        off_t end = ::lseek(fd, begin, SEEK_HOLE);
        if (end < 0 || end > size) end = size;
        append(extents, static_cast<u64>(begin), static_cast<u64>(end - begin));
        at = end;
    }
    return extents;
}

// Private memory: what the kernel says of this process's pages (Linux: admin-guide/mm/pagemap).
Extents present_pages(const GuestMemory::Region& region) {
    constexpr u64 kPresent = bit(63), kSwapped = bit(62);
    constexpr std::size_t kBatch = 4096;
    Extents extents;
    OwnedFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    std::vector<u64> entries(kBatch);
    const u64 first = reinterpret_cast<u64>(region.mapping.data()) / kPageSize;
    for (u64 page = 0; page < region.pages();) {
        u64 count = std::min<u64>(kBatch, region.pages() - page);
        ssize_t got = -1;
        if (pagemap) {
            got = ::pread(pagemap.get(), entries.data(), count * 8,
                          static_cast<off_t>((first + page) * 8));
        }
        if (got < static_cast<ssize_t>(count * 8)) {  // no /proc: then all of it counts
            append(extents, page * kPageSize, region.size - page * kPageSize);
            break;
        }
        for (u64 n = 0; n < count; ++n) {
            if (entries[n] & (kPresent | kSwapped)) {
                append(extents, (page + n) * kPageSize, kPageSize);
            }
        }
        page += count;
    }
    return extents;
}

}  // namespace

std::vector<GuestMemory::Extent> GuestMemory::touched(const Region& region) {
    if (region.foreign) return {{0, region.size}};
    return region.fd ? data_segments(region) : present_pages(region);
}

void GuestMemory::discard(const Region& region, u64 offset, u64 size) {
    int result = region.fd
                     ? ::fallocate(region.fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                   static_cast<off_t>(offset), static_cast<off_t>(size))
                     : ::madvise(region.mapping.data() + offset, size, MADV_DONTNEED);
    if (result != 0) throw_errno("cannot clear guest memory");
    note_write(region.start + offset, size);
}

u64 GuestMemory::discard(Gpa gpa, u64 size) {
    checked(gpa, size);
    const Region* region = find(gpa);
    if (region->foreign || region->read_only) return 0;  // it is not only this machine's
    const u64 first = align_up(gpa.value, kPageSize);
    const u64 end = align_down(gpa.value + size, kPageSize);
    if (first >= end) return 0;
    discard(*region, first - region->start.value, end - first);
    return end - first;
}

}  // namespace polyvisor
