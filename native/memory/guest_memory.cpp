#include "memory/guest_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/error.hpp"

namespace polyvisor {

namespace {

std::string range_text(Gpa start, u64 size) {
    char text[64];
    std::snprintf(text, sizeof text, "0x%llx+0x%llx", static_cast<unsigned long long>(start.value),
                  static_cast<unsigned long long>(size));
    return text;
}

using Region = GuestMemory::Region;

constexpr u64 k2M = u64{1} << 21, k1G = u64{1} << 30;

// The pool that a region's pages come from; 0: none.
u64 pool_page(HugePages huge) {
    return huge == HugePages::k1G ? k1G : huge == HugePages::k2M ? k2M : 0;
}

const char* page_name(u64 page) {
    return page == k1G ? "1 GiB" : "2 MiB";
}

std::string pool_folder(u64 page) {
    return "/sys/kernel/mm/hugepages/hugepages-" + std::to_string(page >> 10) + "kB";
}

// A number that the kernel shows in a file; 0 when it does not.
u64 read_number(const std::string& path) {
    u64 value = 0;
    if (std::FILE* file = std::fopen(path.c_str(), "re")) {
        unsigned long long number = 0;
        if (std::fscanf(file, "%llu", &number) == 1) value = number;
        std::fclose(file);
    }
    return value;
}

OwnedFd make_memfd(const Region& region, HugePages huge) {
    const u64 page = pool_page(huge);
    unsigned flags = MFD_CLOEXEC;
    if (page != 0) {
        if (region.start.value % page != 0 || region.size % page != 0) {
            throw ConfigError("hugepages", "memory region '" + region.name + "' at " +
                                               range_text(region.start, region.size) +
                                               " does not consist of whole pages of " +
                                               page_name(page) +
                                               "; give memory in multiples of that, or take "
                                               "smaller pages");
        }
        flags |= MFD_HUGETLB | static_cast<unsigned>(std::countr_zero(page)) << MAP_HUGE_SHIFT;
    }
    OwnedFd fd(::memfd_create(("polyvisor:" + region.name).c_str(), flags));
    if (fd) return fd;
    if (page != 0 && (errno == ENODEV || errno == EINVAL || errno == ENOENT)) {
        throw ConfigError("hugepages", std::string("this host has no pages of ") + page_name(page) +
                                           "; take others, or transparent ones");
    }
    throw_errno("cannot create guest memory");
}

Mapping map_region(const Region& region, HugePages huge) {
    const u64 page = pool_page(huge);
    Mapping::Placement placement;
    placement.alignment = page != 0 ? page : region.size >= k2M ? k2M : kPageSize;
    placement.phase = region.start.value;
    placement.reserve = page != 0;
    try {
        Mapping mapping(region.fd.get(), region.size, placement);
        // A wish: where it is not granted there are small pages.
        if (huge == HugePages::kTransparent) {
            ::madvise(mapping.data(), mapping.size(), MADV_HUGEPAGE);
        }
        return mapping;
    } catch (const HostError& error) {
        if (page == 0 || error.code != ENOMEM) throw;
        const std::string pool = pool_folder(page);
        const u64 want = region.size / page, total = read_number(pool + "/nr_hugepages");
        const u64 taken = read_number(pool + "/resv_hugepages");
        const u64 free = read_number(pool + "/free_hugepages");
        const u64 left = free > taken ? free - taken : 0;
        throw ConfigError("hugepages", "memory region '" + region.name + "' needs " +
                                           std::to_string(want) + " pages of " + page_name(page) +
                                           ", but the host has " + std::to_string(left) +
                                           " left; reserve more: echo " +
                                           std::to_string(total + want - std::min(left, want)) +
                                           " > " + pool + "/nr_hugepages");
    }
}

}  // namespace

HugePages parse_huge_pages(const std::string& name) {
    if (name == "none") return HugePages::kNone;
    if (name == "transparent") return HugePages::kTransparent;
    if (name == "2M") return HugePages::k2M;
    if (name == "1G") return HugePages::k1G;
    throw ConfigError("hugepages", "there are no huge pages of kind '" + name +
                                       "'; choose one of none, transparent, 2M, 1G");
}

void GuestMemory::check_place(Gpa start, u64 size, const std::string& name) const {
    if (size == 0 || (size & kPageMask) != 0 || (start.value & kPageMask) != 0) {
        throw ConfigError("memory", "memory region '" + name + "' at " + range_text(start, size) +
                                        " must start and end on a 4096-byte page");
    }
    if (start.value + size - 1 < start.value || start.value + size > bit(52)) {
        throw MemoryRangeError(start.value, size,
                               "memory region '" + name + "' at " + range_text(start, size) +
                                   " reaches beyond the 52-bit physical address space");
    }
    for (const auto& region : regions_) {
        if (start.value < region->start.value + region->size &&
            region->start.value < start.value + size) {
            throw MemoryRangeError(start.value, size,
                                   "memory region '" + name + "' at " + range_text(start, size) +
                                       " overlaps region '" + region->name + "' at " +
                                       range_text(region->start, region->size));
        }
    }
}

GuestMemory::Region& GuestMemory::insert(std::unique_ptr<Region> region) {
    region->page_flags = std::make_unique<std::atomic<u8>[]>(region->pages());
    region->dirty = std::make_unique<std::atomic<u64>[]>(region->bitmap_words());
    auto at = std::find_if(regions_.begin(), regions_.end(),
                           [&](const auto& other) { return other->start > region->start; });
    Region& added = **regions_.insert(at, std::move(region));
    count_.store(regions_.size(), std::memory_order_release);
    return added;
}

GuestMemory::Region& GuestMemory::add(Gpa start, u64 size, std::string name, bool read_only,
                                      HugePages huge) {
    check_place(start, size, name);
    auto region = std::make_unique<Region>();
    region->start = start;
    region->size = size;
    region->read_only = read_only;
    region->name = std::move(name);
    if (huge != HugePages::kTransparent) {
        region->fd = make_memfd(*region, huge);
        if (::ftruncate(region->fd.get(), static_cast<off_t>(size)) != 0) {
            throw_errno("cannot size guest memory to " + std::to_string(size) + " bytes");
        }
    }
    region->mapping = map_region(*region, huge);
    return insert(std::move(region));
}

GuestMemory::Region& GuestMemory::add_mapping(Gpa start, Mapping mapping, std::string name,
                                              bool writable, std::shared_ptr<void> owner) {
    check_place(start, mapping.size(), name);
    auto region = std::make_unique<Region>();
    region->start = start;
    region->size = mapping.size();
    region->foreign = true;
    region->read_only = region->sealed = !writable;
    region->name = std::move(name);
    region->mapping = std::move(mapping);
    region->owner = std::move(owner);
    return insert(std::move(region));
}

const GuestMemory::Region* GuestMemory::find(Gpa gpa) const {
    const std::size_t count = this->count();
    for (std::size_t n = 0; n < count; ++n) {  // a handful: a scan beats a search
        if (regions_[n]->contains(gpa.value)) return regions_[n].get();
    }
    return nullptr;
}

std::span<u8> GuestMemory::span(Gpa gpa, u64 size) const {
    const Region* region = find(gpa);
    if (region == nullptr || size > region->size - (gpa.value - region->start.value)) return {};
    return {region->host(gpa.value), static_cast<std::size_t>(size)};
}

std::span<u8> GuestMemory::checked(Gpa gpa, u64 size) const {
    auto found = span(gpa, size);
    if (found.empty()) {
        throw MemoryRangeError(gpa.value, size,
                               "guest-physical range " + range_text(gpa, size) +
                                   " is not backed by one memory region");
    }
    return found;
}

void GuestMemory::read(Gpa gpa, std::span<u8> into) const {
    if (into.empty()) return;
    if (auto whole = span(gpa, into.size()); !whole.empty()) {
        std::memcpy(into.data(), whole.data(), into.size());
        return;
    }
    for (u64 done = 0; done < into.size();) {  // first see that all of it is there
        const Region* region = find(gpa + done);
        if (region == nullptr) checked(gpa + done, into.size() - done);
        done += region->size - (gpa.value + done - region->start.value);
    }
    for (u64 done = 0; done < into.size();) {
        const Region* region = find(gpa + done);
        u64 here = std::min<u64>(into.size() - done,
                                 region->size - (gpa.value + done - region->start.value));
        std::memcpy(into.data() + done, region->host(gpa.value + done), here);
        done += here;
    }
}

void GuestMemory::write(Gpa gpa, std::span<const u8> from) {
    if (from.empty()) return;
    for (u64 done = 0; done < from.size();) {
        const Region* region = find(gpa + done);
        if (region == nullptr) checked(gpa + done, from.size() - done);
        if (region->sealed) {
            throw StateMismatch("memory region '" + region->name + "' at " +
                                range_text(region->start, region->size) +
                                " is open for reading only");
        }
        done += region->size - (gpa.value + done - region->start.value);
    }
    for (u64 done = 0; done < from.size();) {
        const Region* region = find(gpa + done);
        u64 here = std::min<u64>(from.size() - done,
                                 region->size - (gpa.value + done - region->start.value));
        std::memcpy(region->host(gpa.value + done), from.data() + done, here);
        done += here;
    }
    note_write(gpa, from.size());
}

void GuestMemory::note_write(Gpa gpa, u64 size) {
    if (size == 0) return;
    u64 last = std::max(gpa.value, gpa.value + size - 1);
    for (const auto& region : regions_) {
        u64 from = std::max(gpa.value, region->start.value);
        u64 to = std::min(last, region->start.value + region->size - 1);
        if (from <= to) region->mark_dirty(from, to - from + 1);
    }
    recheck_code(gpa, size);
}

void GuestMemory::recheck_code(Gpa gpa, u64 size) const {
    if (!observer_ || size == 0) return;
    const Region* region = nullptr;
    u64 first = align_down(gpa.value, kPageSize);
    for (u64 page = first; page - first < size + (gpa.value - first); page += kPageSize) {
        if (region == nullptr || !region->contains(page)) region = find(Gpa(page));
        if (region == nullptr) continue;
        if (region->flags(page).load(std::memory_order_relaxed) & kPageCode) {
            u64 from = std::max(page, gpa.value);
            observer_(Gpa(from), std::min(page + kPageSize, gpa.value + size) - from);
        }
    }
}

// The read-modify-write is wanted even for a bit that is set: who takes the bit just before it sees
// the stores too, and who takes it after sees the bit.
void GuestMemory::Region::mark_dirty(u64 gpa, u64 bytes) const {
    u64 first = (gpa - start.value) >> kPageShift;
    u64 last = (gpa - start.value + bytes - 1) >> kPageShift;
    for (u64 word = first / 64; word <= last / 64; ++word) {
        u64 mask = ~u64{0};
        if (word == first / 64) mask &= ~u64{0} << (first % 64);
        if (word == last / 64) mask &= ~u64{0} >> (63 - last % 64);
        dirty[word].fetch_or(mask);
    }
}

void GuestMemory::Region::take_dirty(std::span<u64> bitmap) const {
    for (u64 word = 0; word < bitmap_words(); ++word) {
        if (dirty[word].load(std::memory_order_relaxed) != 0)
            bitmap[word] |= dirty[word].exchange(0);
    }
}

u64 GuestMemory::total_size() const {
    u64 total = 0;
    for (const auto& region : regions_) total += region->size;
    return total;
}

}  // namespace polyvisor
