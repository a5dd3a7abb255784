#include "kvm/stats.hpp"

#include <unistd.h>
#include "kvm/abi.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "kvm/ioctl.hpp"

namespace polyvisor::kvm {

namespace {

// More than any kernel has: a file that claims more is not read.
constexpr u32 kMaxStats = 4096, kMaxNameSize = 4096;
constexpr u64 kMaxValues = 65536;
// struct kvm_stats_desc up to its name, whose length only the file's header knows.
constexpr std::size_t kDescriptorSize = 16;

bool read_at(int fd, u64 offset, std::span<u8> into) {
    while (!into.empty()) {
        ssize_t got = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        offset += static_cast<u64>(got);
        into = into.subspan(static_cast<std::size_t>(got));
    }
    return true;
}

template <class T>
T load(const u8* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

}  // namespace

StatsFile::StatsFile(int fd) {
    int file = try_ioctl(fd, KVM_GET_STATS_FD);
    if (file >= 0) file_ = OwnedFd(file);
}

// The descriptors never change while the file is open, so they are read once. False: the file is
// not as the kernel documents it.
bool StatsFile::describe() const {
    if (described_) return true;
    kvm_stats_header header;
    if (!read_at(file_.get(), 0, {reinterpret_cast<u8*>(&header), sizeof header})) return false;
    if (header.num_desc > kMaxStats || header.name_size == 0 || header.name_size > kMaxNameSize) {
        return false;
    }
    const std::size_t step = kDescriptorSize + header.name_size;
    std::vector<u8> block(header.num_desc * step);
    if (!read_at(file_.get(), header.desc_offset, block)) return false;

    std::vector<Statistic> stats;
    std::vector<Place> places;
    u64 size = 0;
    for (std::size_t at = 0; at < block.size(); at += step) {
        const u8* from = &block[at];
        u32 flags = load<u32>(from);
        u32 kind = (flags & KVM_STATS_TYPE_MASK) >> KVM_STATS_TYPE_SHIFT;
        u32 unit = (flags & KVM_STATS_UNIT_MASK) >> KVM_STATS_UNIT_SHIFT;
        const char* name = reinterpret_cast<const char*>(from + kDescriptorSize);
        Statistic stat;
        stat.name.assign(name, ::strnlen(name, header.name_size));
        stat.kind = kind < static_cast<u32>(Statistic::Kind::kOther)
                        ? static_cast<Statistic::Kind>(kind)
                        : Statistic::Kind::kOther;
        stat.unit = unit < static_cast<u32>(Statistic::Unit::kOther)
                        ? static_cast<Statistic::Unit>(unit)
                        : Statistic::Unit::kOther;
        stat.base = (flags & KVM_STATS_BASE_MASK) == KVM_STATS_BASE_POW2 ? 2 : 10;
        stat.exponent = load<s16>(from + 4);
        u64 count = load<u16>(from + 6);
        u64 offset = load<u32>(from + 8);
        stat.bucket_size = load<u32>(from + 12);
        if (offset % sizeof(u64) != 0 || offset / sizeof(u64) + count > kMaxValues) return false;
        size = std::max(size, offset / sizeof(u64) + count);
        places.push_back({offset / sizeof(u64), count});
        stats.push_back(std::move(stat));
    }
    stats_ = std::move(stats);
    places_ = std::move(places);
    data_offset_ = header.data_offset;
    data_size_ = size;
    described_ = true;
    return true;
}

std::vector<Statistic> StatsFile::read() const {
    if (!file_) return {};
    std::lock_guard lock(mutex_);
    if (!describe()) return {};
    std::vector<u64> data(data_size_);
    std::span<u8> bytes{reinterpret_cast<u8*>(data.data()), data.size() * sizeof(u64)};
    if (!read_at(file_.get(), data_offset_, bytes)) return {};
    std::vector<Statistic> stats = stats_;
    for (std::size_t i = 0; i < stats.size(); ++i) {
        auto first = data.begin() + static_cast<std::ptrdiff_t>(places_[i].index);
        stats[i].values.assign(first, first + static_cast<std::ptrdiff_t>(places_[i].count));
    }
    return stats;
}

std::vector<Vcpu::Counter> to_counters(std::span<const Statistic> stats) {
    std::vector<Vcpu::Counter> counters;
    for (const Statistic& stat : stats) {
        if (!stat.histogram() && stat.values.size() == 1) {
            counters.push_back({stat.name, stat.values[0]});
            continue;
        }
        for (std::size_t i = 0; i < stat.values.size(); ++i) {
            counters.push_back({stat.name + "[" + std::to_string(i) + "]", stat.values[i]});
        }
    }
    return counters;
}

std::vector<Vcpu::Counter> read_stats(int fd) {
    return to_counters(StatsFile(fd).read());
}

}  // namespace polyvisor::kvm
