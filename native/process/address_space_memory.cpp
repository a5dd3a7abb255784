// How areas get memory, and what is copied from and to it.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "process/address_space.hpp"

namespace polyvisor::process {

namespace {

// Memory that is given at once, and in pieces: the more of a mapping is in use, the larger.
constexpr u64 kSmall = 1 << 20, kSmallFile = 256 << 10;
constexpr u64 kLeastPiece = 128 << 10, kMostPiece = 4 << 20;

// A file that was shortened leaves pages that nobody can touch: the kernel can say so, a memcpy
// cannot.
bool careful_copy(void* to, const void* from, u64 size) {
    iovec local{to, size}, remote{const_cast<void*>(from), size};
    return ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(size);
}

// Bytes of whole pages that a file has from `offset` on.
u64 file_bytes(const OwnedFd& file, u64 offset) {
    struct stat about{};
    if (::fstat(file.get(), &about) != 0) return 0;
    const u64 size = align_up(static_cast<u64>(about.st_size), kPageSize);
    return size > offset ? size - offset : 0;
}

// What the file does not have stays as it is.
void read_file(const OwnedFd& file, u64 offset, u8* to, u64 size) {
    while (size != 0) {
        const ssize_t done = ::pread(file.get(), to, size, static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return;
        to += done;
        offset += static_cast<u64>(done);
        size -= static_cast<u64>(done);
    }
}

}  // namespace

// --- Memory for areas ----------------------------------------------------------------------------

bool AddressSpace::copies_file(const Area& area) const {
    return area.file && area.kind == Kind::kPrivate &&
           (files_ == Files::kCopied || (area.rights & kWritable) || !arena_.may_map());
}

// [from, to) of an area without any.
AddressSpace::Fault AddressSpace::give(Areas::iterator area, u64 from, u64 to) {
    const u64 offset = area->second.offset + (from - area->first);
    const Area& kind = area->second;
    if (kind.file && kind.kind != Kind::kSharedMemory) {
        const u64 there = file_bytes(*kind.file, offset);
        if (there == 0) return Fault::kBeyondFile;
        to = std::min(to, from + there);
    }
    const u64 size = to - from;
    const bool counted = kind.counted || copies_file(kind);
    if (counted && size > left()) return Fault::kNoMemory;
    std::optional<Gpa> near;
    if (from == area->first && area != state_.areas.begin()) {
        const auto& [start, before] = *std::prev(area);
        if (before.end == from && before.gpa) near = Gpa(before.gpa->value + (from - start));
    }
    const auto gpa = arena_.allocate(size, near);
    if (!gpa) return Fault::kNoMemory;
    bool shrinks = false;
    if (copies_file(kind)) {
        read_file(*kind.file, offset, arena_.host(*gpa), size);
    } else if (kind.file) {
        const bool shared = kind.kind != Kind::kPrivate;
        if (arena_.map_file(*gpa, size, kind.file, offset, shared) == 0) {
            shrinks = kind.kind != Kind::kSharedMemory;
        } else if (shared) {
            arena_.free(*gpa, size);
            return Fault::kNoMemory;
        } else {
            read_file(*kind.file, offset, arena_.host(*gpa), size);
        }
    }
    if (!tables_.map(from, *gpa, size, kind.rights)) {
        tables_.unmap(from, size);
        arena_.free(*gpa, size);
        return Fault::kNoMemory;
    }
    split(from);
    split(to);
    Area& here = state_.areas.find(from)->second;
    here.gpa = gpa;
    here.shrinks = shrinks;
    here.counted = counted;
    if (counted) count(size);
    merge(from, to);
    return Fault::kServed;
}

// Memory for an address, and some around it.
AddressSpace::Fault AddressSpace::give_piece(u64 address) {
    auto area = find(address);
    const Area& here = area->second;
    u64 from = area->first, to = here.end;
    if (here.file && !copies_file(here)) {
        if (file_bytes(*here.file, here.offset + (align_down(address, kPageSize) - from)) == 0) {
            return Fault::kBeyondFile;
        }
        return give(area, from, to);
    }
    // As much again as there is already on one side.
    u64 below = 0, above = 0;
    for (auto side = area; side != state_.areas.begin() && below < kMostPiece;) {
        const u64 start = side->first;
        --side;
        if (side->second.end != start || !side->second.gpa || side->second.name != here.name) break;
        below += start - side->first;
    }
    for (auto side = find(to); side != state_.areas.end() && above < kMostPiece;
         side = find(side->second.end)) {
        if (!side->second.gpa || side->second.name != here.name) break;
        above += side->second.end - side->first;
    }
    const u64 piece =
        align_down(std::clamp(std::max(below, above), kLeastPiece, kMostPiece), kLeastPiece);
    const u64 page = align_down(address, kPageSize), lowest = address / piece * piece;
    from = std::max(from, lowest);
    to = std::min(to, lowest + piece);
    Fault fault = give(area, from, to);
    if (fault == Fault::kNoMemory) fault = give(find(page), page, page + kPageSize);
    // The file may end before the page does.
    if (fault == Fault::kServed && !find(page)->second.gpa) return Fault::kBeyondFile;
    return fault;
}

// What is not worth an exit of the program later on. (Without memory that comes then.)
void AddressSpace::give_small(u64 start, u64 end) {
    for (u64 at = start; at < end;) {
        auto area = state_.areas.lower_bound(at);
        if (area == state_.areas.end() || area->first >= end) return;
        at = area->second.end;
        const Area& here = area->second;
        if (here.gpa || here.rights == 0) continue;
        const u64 small = !here.file                ? kSmall
                          : !copies_file(here)      ? ~u64{0}
                          : here.rights & kWritable ? kSmallFile
                                                    : 0;
        if (at - area->first <= small) give(area, area->first, at);
    }
}

// All of a range that the program may use in that way; false: it may not, or there is none.
bool AddressSpace::give_all(u64 address, u64 size, u8 rights) {
    if (size == 0) return true;
    if (address > kEnd || size > kEnd - address) return false;
    for (const u64 end = address + size; address < end;) {
        auto area = find(address);
        if (area == state_.areas.end() || (area->second.rights & rights) != rights) return false;
        if (area->second.gpa) {
            address = area->second.end;
            continue;
        }
        const Fault fault = give_piece(address);
        if (fault == Fault::kNoMemory) exhausted_ = true;
        if (fault != Fault::kServed) return false;
    }
    return true;
}

AddressSpace::Fault AddressSpace::fault(u64 address, u32 error) {
    constexpr u32 kWrite = 2, kReserved = 8, kFetch = 16;
    auto area = find(address);
    if (area == state_.areas.end()) return Fault::kNotMapped;
    const u8 needed = error & kFetch ? kExecutable : error & kWrite ? kWritable : kReadable;
    if ((error & kReserved) || !(area->second.rights & needed)) return Fault::kForbidden;
    // Else another thread was faster, or the CPU has an older translation.
    return area->second.gpa ? Fault::kServed : give_piece(address);
}

bool AddressSpace::lost_file() const {
    return std::any_of(state_.areas.begin(), state_.areas.end(), [](const auto& one) {
        const Area& area = one.second;
        return area.shrinks && file_bytes(*area.file, area.offset) < area.end - one.first;
    });
}

bool AddressSpace::recover_lost_pages() {
    if (!arena_.lost_pages()) return false;
    give_up_files();
    return true;
}

void AddressSpace::give_up_files() {
    for (auto& [start, area] : state_.areas) {
        if (area.kind == Kind::kSharedFile) take_memory(start, area);
    }
}

// --- Advice --------------------------------------------------------------------------------------

s64 AddressSpace::discard(u64 address, u64 size) {
    const u64 end = address + size;
    const bool whole = is_mapped(address, size);
    for (auto area = state_.areas.lower_bound(
             find(address) == state_.areas.end() ? address : find(address)->first);
         area != state_.areas.end() && area->first < end; ++area) {
        Area& here = area->second;
        const u64 from = std::max(address, area->first), to = std::min(end, here.end);
        if (!here.gpa || here.kind != Kind::kPrivate || here.shrinks) continue;
        if (!here.file && to - from > kSmall && state_.areas.size() < kMostAreas) {
            split(from);
            split(to);
            area = state_.areas.find(from);
            take_memory(from, area->second);
            continue;
        }
        const Gpa gpa(here.gpa->value + (from - area->first));
        arena_.discard(gpa, to - from);
        if (here.file) {
            read_file(*here.file, here.offset + (from - area->first), arena_.host(gpa), to - from);
        }
    }
    merge(address, end);
    return whole ? 0 : -ENOMEM;
}

s64 AddressSpace::populate(u64 address, u64 size) {
    if (!is_mapped(address, size)) return -ENOMEM;
    return give_all(address, size, kReadable) ? 0 : -EFAULT;
}

s64 AddressSpace::set_on_fork(u64 address, u64 size, OnFork what) {
    if (state_.areas.size() >= kMostAreas) return -ENOMEM;
    const u64 end = address + size;
    const bool whole = is_mapped(address, size);
    auto area = split(address);
    split(end);
    for (; area != state_.areas.end() && area->first < end; ++area) area->second.on_fork = what;
    merge(address, end);
    return whole ? 0 : -ENOMEM;
}

s64 AddressSpace::sync(u64 address, u64 size) {
    if (!is_mapped(address, size)) return -ENOMEM;
    s64 result = 0;
    each(address, size, 0, [&](u64, const Area& area, u64 offset, u64 bytes) {
        if (area.kind != Kind::kSharedFile || !area.gpa) return true;
        if (::msync(arena_.host(*area.gpa + offset), bytes, MS_SYNC) != 0) result = -errno;
        return true;
    });
    return result;
}

// --- The program's memory ------------------------------------------------------------------------

// step(address, area, offset in it, bytes) for what the range has of each area; false: it does not
// have these rights everywhere, or step() said so.
template <class Step>
bool AddressSpace::each(u64 address, u64 size, u8 rights, Step step) const {
    if (size == 0) return true;
    if (address > kEnd || size > kEnd - address) return false;
    for (auto area = find(address); area != state_.areas.end(); ++area) {
        const Area& here = area->second;
        if (area->first > address || (here.rights & rights) != rights) return false;
        const u64 bytes = std::min(size, here.end - address);
        if (!step(address, here, address - area->first, bytes)) return false;
        size -= bytes;
        address += bytes;
        if (size == 0) return true;
    }
    return false;
}

bool AddressSpace::copy_in(u64 address, std::span<u8> into) const {
    auto copy = [&](u64, const Area& area, u64 offset, u64 size) {
        u8* to = into.data();
        into = into.subspan(size);
        if (area.gpa) {
            const u8* from = arena_.host(*area.gpa + offset);
            if (area.shrinks) return careful_copy(to, from, size);
            std::memcpy(to, from, size);
            return true;
        }
        // Nobody has written to it.
        std::memset(to, 0, size);
        if (!area.file || area.kind == Kind::kSharedMemory) return true;
        if (file_bytes(*area.file, area.offset + align_down(offset, kPageSize)) <
            size + (offset & kPageMask)) {
            return false;
        }
        read_file(*area.file, area.offset + offset, to, size);
        return true;
    };
    return each(address, into.size(), kReadable, copy);
}

bool AddressSpace::copy_out(u64 address, std::span<const u8> from) {
    if (!give_all(address, from.size(), kWritable)) return false;
    auto copy = [&](u64, const Area& area, u64 offset, u64 size) {
        const Gpa gpa = *area.gpa + offset;
        const bool good = !area.shrinks || careful_copy(arena_.host(gpa), from.data(), size);
        if (!area.shrinks) std::memcpy(arena_.host(gpa), from.data(), size);
        if (area.rights & kExecutable) arena_.wrote(gpa, size);
        from = from.subspan(size);
        return good;
    };
    return each(address, from.size(), kWritable, copy);
}

std::optional<std::string> AddressSpace::string(u64 address, std::size_t most) const {
    std::string text;
    while (text.size() < most) {
        // To the end of the page, so that what is behind it need not be there.
        char bytes[256];
        const u64 page_left = kPageSize - (address & kPageMask);
        const u64 here = std::min<u64>({sizeof bytes, page_left, most - text.size()});
        if (!copy_in(address, {reinterpret_cast<u8*>(bytes), here})) return std::nullopt;
        const void* end = std::memchr(bytes, 0, here);
        if (end != nullptr) return text.append(bytes, static_cast<const char*>(end) - bytes);
        text.append(bytes, here);
        address += here;
    }
    return std::nullopt;
}

bool AddressSpace::spans(u64 address, u64 size, bool write, std::vector<iovec>& into) {
    const u8 rights = write ? kWritable : kReadable;
    if (!give_all(address, size, rights)) return false;
    return each(address, size, rights, [&](u64, const Area& area, u64 offset, u64 bytes) {
        const Gpa gpa = *area.gpa + offset;
        if (write && (area.rights & kExecutable)) arena_.wrote(gpa, bytes);
        into.push_back({arena_.host(gpa), bytes});
        return true;
    });
}

u32* AddressSpace::word(u64 address) {
    if (address % sizeof(u32) != 0 || !give_all(address, sizeof(u32), kWritable)) return nullptr;
    auto area = find(address);
    if (area->second.shrinks) return nullptr;
    return reinterpret_cast<u32*>(arena_.host(*area->second.gpa + (address - area->first)));
}

}  // namespace polyvisor::process
