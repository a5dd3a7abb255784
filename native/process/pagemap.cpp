#include "process/pagemap.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <atomic>

#include "base/fd.hpp"

namespace polyvisor::process {

namespace {

using Extents = std::vector<GuestMemory::Extent>;

// PAGEMAP_SCAN of linux/fs.h, which older headers do not have (nor kernels before 6.7).
struct ScannedRun {
    u64 start, end, categories;
};
struct ScanRequest {
    u64 size, flags, start, end, walk_end, runs, run_count, most_pages, inverted, all_of, any_of,
        returned;
};
static_assert(kPagemapScan == _IOWR('f', 16, ScanRequest));
constexpr u64 kFile = 1 << 2, kPresent = 1 << 3, kSwapped = 1 << 4, kZeroPage = 1 << 5;

// It is the memory of the process that opened it, whoever reads it: a child has to open its own.
struct Pagemap {
    OwnedFd fd{::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
    pid_t owner = ::getpid();
    std::atomic<bool> scans{true};
};

Pagemap& pagemap() {
    static Pagemap map;
    return map;
}

void append(Extents& extents, std::size_t from, u64 start, u64 end) {
    if (extents.size() > from && extents.back().offset + extents.back().size == start) {
        extents.back().size += end - start;
    } else {
        extents.push_back({start, end - start});
    }
}

bool scan(Pagemap& map, u64 base, u64 start, u64 end, Extents& into) {
    const std::size_t before = into.size();
    ScannedRun runs[256];
    ScanRequest request{};
    request.size = sizeof request;
    request.end = base + end;
    request.runs = reinterpret_cast<u64>(runs);
    request.run_count = std::size(runs);
    request.inverted = request.all_of = kFile | kZeroPage;
    request.any_of = kPresent | kSwapped;
    request.returned = kPresent;
    for (request.start = base + start; request.start < request.end;
         request.start = request.walk_end) {
        const int count = ::ioctl(map.fd.get(), kPagemapScan, &request);
        if (count < 0 || request.walk_end <= request.start) {
            into.resize(before);
            return false;
        }
        for (int n = 0; n < count; ++n) {
            append(into, before, runs[n].start - base, runs[n].end - base);
        }
    }
    return true;
}

bool read_entries(Pagemap& map, u64 base, u64 start, u64 end, Extents& into) {
    constexpr u64 kPresentEntry = bit(63), kSwappedEntry = bit(62), kFileEntry = bit(61);
    const std::size_t before = into.size();
    std::vector<u64> entries(4096);
    for (u64 at = start; at < end;) {
        const u64 count = std::min<u64>(entries.size(), (end - at) / kPageSize);
        const ssize_t got = ::pread(map.fd.get(), entries.data(), count * 8,
                                    static_cast<off_t>((base + at) / kPageSize * 8));
        if (got != static_cast<ssize_t>(count * 8)) {
            into.resize(before);
            return false;
        }
        for (u64 n = 0; n < count; ++n, at += kPageSize) {
            const bool present = entries[n] & (kPresentEntry | kSwappedEntry);
            if (present && !(entries[n] & kFileEntry)) append(into, before, at, at + kPageSize);
        }
    }
    return true;
}

}  // namespace

void open_pagemap() {
    pagemap();
}

void private_pages(const u8* base, u64 start, u64 end, Extents& into) {
    if (start >= end) return;
    Pagemap& map = pagemap();
    const u64 at = reinterpret_cast<u64>(base);
    if (map.fd && map.owner == ::getpid()) {
        if (map.scans && scan(map, at, start, end, into)) return;
        map.scans = false;
        if (read_entries(map, at, start, end, into)) return;
    }
    into.push_back({start, end - start});
}

}  // namespace polyvisor::process
