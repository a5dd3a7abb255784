#include "process/address_space.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <set>

namespace polyvisor::process {

namespace {

constexpr u64 kLowEnd = u64{1} << 31;

// `b` follows `a`, and nothing tells them apart.
bool joins(const AddressSpace::Area& a, u64 a_start, const AddressSpace::Area& b, u64 b_start) {
    const u64 size = b_start - a_start;
    return a.end == b_start && a.rights == b.rights && a.most_rights == b.most_rights &&
           a.counted == b.counted && a.shrinks == b.shrinks && a.kind == b.kind &&
           a.on_fork == b.on_fork && a.file == b.file && a.gpa.has_value() == b.gpa.has_value() &&
           (!a.gpa || a.gpa->value + size == b.gpa->value) &&
           (!a.file || a.offset + size == b.offset) && a.name == b.name;
}

}  // namespace

AddressSpace::AddressSpace(Arena& arena, PageTables& tables, u64 limit, Files files)
    : arena_(arena),
      tables_(tables),
      budget_(std::make_shared<MemoryBudget>(limit)),
      files_(files) {}

AddressSpace::~AddressSpace() {
    budget_->used -= state_.used;
}

void AddressSpace::share(std::shared_ptr<MemoryBudget> budget) {
    budget->used += state_.used;
    budget_->used -= state_.used;
    budget_ = std::move(budget);
}

// More, or (as two's complement has it) less.
void AddressSpace::count(u64 bytes) {
    state_.used += bytes;
    budget_->used += bytes;
}

void AddressSpace::restore(const State& state, bool fork) {
    budget_->used += state.used - state_.used;
    state_ = state;
    exhausted_ = false;
    ++generation_;
    for (auto area = state_.areas.begin(); area != state_.areas.end();) {
        Area& here = area->second;
        const u64 start = area->first, end = here.end;
        ++area;
        if (here.shrinks) here.shrinks = arena_.is_file(*here.gpa);
        if (!fork || here.on_fork == OnFork::kCopied) continue;
        if (here.on_fork == OnFork::kWiped && here.gpa) arena_.discard(*here.gpa, end - start);
        if (here.on_fork == OnFork::kGone) drop(start, end);
    }
}

// --- Areas ---------------------------------------------------------------------------------------

// Makes `at` a border between areas; the first area at or behind it.
AddressSpace::Areas::iterator AddressSpace::split(u64 at) {
    auto next = state_.areas.lower_bound(at);
    if (next == state_.areas.begin()) return next;
    auto area = std::prev(next);
    if (area->second.end <= at) return next;
    Area rest = area->second;
    const u64 cut = at - area->first;
    if (rest.gpa) rest.gpa = Gpa(rest.gpa->value + cut);
    rest.offset += cut;
    area->second.end = at;
    return state_.areas.emplace_hint(next, at, std::move(rest));
}

// Undoes what split() and pieces of memory have left in the range.
void AddressSpace::merge(u64 start, u64 end) {
    auto area = state_.areas.lower_bound(start);
    if (area != state_.areas.begin()) --area;
    while (area != state_.areas.end()) {
        auto next = std::next(area);
        if (next == state_.areas.end() || next->first > end) break;
        if (joins(area->second, area->first, next->second, next->first)) {
            area->second.end = next->second.end;
            state_.areas.erase(next);
        } else {
            area = next;
        }
    }
}

AddressSpace::Areas::iterator AddressSpace::find(u64 address) {
    auto area = state_.areas.upper_bound(address);
    if (area == state_.areas.begin() || std::prev(area)->second.end <= address) {
        return state_.areas.end();
    }
    return std::prev(area);
}

AddressSpace::Areas::const_iterator AddressSpace::find(u64 address) const {
    return const_cast<AddressSpace&>(*this).find(address);
}

bool AddressSpace::is_free(u64 start, u64 size) const {
    auto area = state_.areas.lower_bound(start + size);
    return area == state_.areas.begin() || std::prev(area)->second.end <= start;
}

bool AddressSpace::is_mapped(u64 address, u64 size) const {
    if (address > kEnd || size > kEnd - address) return false;
    for (const u64 end = address + size; address < end;) {
        auto area = find(address);
        if (area == state_.areas.end()) return false;
        address = area->second.end;
    }
    return true;
}

// From the top down, as Linux does.
std::optional<u64> AddressSpace::find_gap(u64 size, u64 top) const {
    for (auto it = state_.areas.rbegin(); it != state_.areas.rend(); ++it) {
        if (it->first >= top) continue;
        if (it->second.end <= top && top - it->second.end >= size) return top - size;
        top = it->first;
    }
    if (top < kFirst + size) return std::nullopt;
    return top - size;
}

// The area keeps its place, and what it held is gone.
void AddressSpace::take_memory(u64 start, Area& area) {
    if (!area.gpa) return;
    const u64 size = area.end - start;
    tables_.unmap(start, size);
    arena_.free(*area.gpa, size);
    ++generation_;
    if (area.counted) count(-size);
    area.gpa.reset();
    area.shrinks = false;
}

void AddressSpace::drop(u64 start, u64 end) {
    auto area = split(start);
    split(end);
    while (area != state_.areas.end() && area->first < end) {
        take_memory(area->first, area->second);
        area = state_.areas.erase(area);
    }
}

// As Linux's heuristic: a single demand that cannot be met is refused, though only what is touched
// counts.
bool AddressSpace::too_large(const Area& area, u64 size) const {
    return area.counted && (area.rights & kWritable) && size > left();
}

// `file` may be nothing: one more that nobody else has.
bool AddressSpace::may_keep(const Arena::File& file) const {
    if (state_.areas.size() < kMostFiles) return true;
    std::set<const OwnedFd*> kept;
    for (const auto& [start, area] : state_.areas) {
        if (area.file) kept.insert(area.file.get());
    }
    return kept.size() < kMostFiles || kept.contains(file.get());
}

s64 AddressSpace::map(const Request& request) {
    const u64 size = align_up(request.size, kPageSize);
    if (request.size == 0) return -EINVAL;
    if (size < request.size || size > kEnd - kFirst) return -ENOMEM;
    u64 start = align_down(request.address, kPageSize);
    if (request.fixed) {
        if (start != request.address) return -EINVAL;
        if (start < kFirst || start > kEnd - size) return start < kFirst ? -EPERM : -ENOMEM;
        if (request.no_replace && !is_free(start, size)) return -EEXIST;
    } else if (start < kFirst || start > kEnd - size || !is_free(start, size)) {
        const auto gap = find_gap(size, request.low ? kLowEnd : state_.top);
        if (!gap) return -ENOMEM;
        start = *gap;
    }
    if (state_.areas.size() >= kMostAreas) return -ENOMEM;
    if ((request.file || request.shared) && !may_keep(request.file)) return -ENOMEM;
    Area area;
    area.end = start + size;
    area.rights = request.rights;
    area.most_rights = request.most_rights;
    area.name = request.name;
    area.offset = request.offset;
    area.file = request.file;
    if (request.shared) {
        area.kind = request.file ? Kind::kSharedFile : Kind::kSharedMemory;
        if (!arena_.may_map()) return -ENOMEM;
    }
    area.counted = request.counted && (!request.file || (request.rights & kWritable)) &&
                   area.kind != Kind::kSharedFile;
    if (area.kind == Kind::kSharedMemory) {
        if (area.counted && size > left()) return -ENOMEM;
        OwnedFd memory(::memfd_create("polyvisor:shared", MFD_CLOEXEC | MFD_ALLOW_SEALING));
        if (!memory || ::ftruncate(memory.get(), static_cast<off_t>(size)) != 0 ||
            ::fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
            return -ENOMEM;
        }
        area.file = std::make_shared<const OwnedFd>(std::move(memory));
        area.offset = 0;
    } else if (request.reserved && too_large(area, size)) {
        return -ENOMEM;
    }
    drop(start, start + size);
    const bool shared = area.kind != Kind::kPrivate && request.rights != 0;
    auto made = state_.areas.emplace(start, std::move(area)).first;
    if (shared) {
        const Fault fault = give(made, start, start + size);
        if (fault != Fault::kServed && fault != Fault::kBeyondFile) {
            drop(start, start + size);
            return -ENOMEM;
        }
    }
    give_small(start, start + size);
    merge(start, start + size);
    return static_cast<s64>(start);
}

s64 AddressSpace::unmap(u64 address, u64 size) {
    if (size == 0) return -EINVAL;
    size = align_up(size, kPageSize);
    if (address % kPageSize != 0 || size == 0 || address > kEnd || size > kEnd - address) {
        return -EINVAL;
    }
    auto area = find(address);
    if (state_.areas.size() >= kMostAreas && area != state_.areas.end() && area->first < address &&
        area->second.end > address + size) {
        return -ENOMEM;
    }
    drop(address, address + size);
    return 0;
}

s64 AddressSpace::protect(u64 address, u64 size, u8 rights) {
    if (address % kPageSize != 0) return -EINVAL;
    if (size == 0) return 0;
    size = align_up(size, kPageSize);
    if (size == 0 || !is_mapped(address, size)) return -ENOMEM;
    if (state_.areas.size() >= kMostAreas) return -ENOMEM;
    const u64 end = address + size;
    auto area = split(address);
    split(end);
    s64 result = 0;
    for (; area != state_.areas.end() && area->first < end; ++area) {
        const u64 start = area->first, bytes = area->second.end - start;
        Area& here = area->second;
        if (here.rights == rights) continue;
        if (rights & ~here.most_rights) {
            result = -EACCES;
            break;
        }
        Area wanted = here;
        wanted.rights = rights;
        if ((rights & kWritable) && here.kind == Kind::kPrivate && here.file) {
            // From now on it is copied from the file.
            wanted.counted = true;
            if (!here.gpa && too_large(wanted, bytes)) result = -ENOMEM;
            if (here.shrinks) take_memory(start, here);
        } else if (!here.gpa && !(here.rights & kWritable) && too_large(wanted, bytes)) {
            result = -ENOMEM;
        }
        if (result != 0) break;
        if (here.gpa) {
            if (!tables_.map(start, *here.gpa, bytes, rights)) {
                result = -ENOMEM;
                break;
            }
            if (wanted.counted && !here.counted) count(bytes);
            if (here.rights & ~rights) {
                arena_.forget_rights(*here.gpa, bytes);
                ++generation_;
            }
            if (rights & kExecutable) arena_.wrote(*here.gpa, bytes);
        }
        here.counted = wanted.counted;
        here.rights = rights;
    }
    give_small(address, end);
    merge(address, end);
    return result;
}

// --- Moving --------------------------------------------------------------------------------------

s64 AddressSpace::remap(const Remap& request) {
    const u64 address = request.address;
    u64 old_size = align_up(request.old_size, kPageSize);
    const u64 new_size = align_up(request.new_size, kPageSize);
    if (address % kPageSize != 0 || new_size == 0 || old_size == 0) return -EINVAL;
    if ((request.fixed || request.keep) && !request.may_move) return -EINVAL;
    if (request.keep && old_size != new_size) return -EINVAL;
    if (new_size > kEnd - kFirst) return -ENOMEM;
    auto first = find(address);
    if (first == state_.areas.end() || !is_mapped(address, old_size)) return -EFAULT;
    const Area kind = first->second;
    for (auto area = first; area != state_.areas.end() && area->first < address + old_size;
         ++area) {
        const Area& here = area->second;  // pieces of one mapping, or not
        if (here.rights != kind.rights || here.kind != kind.kind || here.file != kind.file ||
            here.name != kind.name) {
            return -EFAULT;
        }
    }
    if (request.keep && (kind.kind != Kind::kPrivate || kind.file)) return -EINVAL;
    if (state_.areas.size() >= kMostAreas) return -ENOMEM;
    if (new_size > old_size && too_large(kind, new_size - old_size)) return -ENOMEM;
    if (request.fixed) {
        const u64 target = request.target;
        if (target % kPageSize != 0 || target > kEnd - new_size ||
            (target < address + old_size && address < target + new_size)) {
            return -EINVAL;
        }
        if (target < kFirst) return -EPERM;
        drop(target, target + new_size);
    }
    if (new_size < old_size) {
        drop(address + new_size, address + old_size);
        old_size = new_size;
    }
    if (request.fixed || request.keep) {
        if (request.fixed) return move(request, request.target);
    } else {
        if (new_size == old_size) return static_cast<s64>(address);
        const u64 end = address + old_size, more = new_size - old_size;
        if (address <= kEnd - new_size && is_free(end, more)) {
            Area rest = std::prev(state_.areas.lower_bound(end))->second;
            rest.offset += end - std::prev(state_.areas.lower_bound(end))->first;
            rest.end = end + more;
            rest.gpa.reset();
            rest.shrinks = false;
            state_.areas.emplace(end, std::move(rest));
            give_small(end, end + more);
            merge(end, end + more);
            return static_cast<s64>(address);
        }
    }
    if (!request.may_move) return -ENOMEM;
    const auto gap = find_gap(new_size, state_.top);
    return gap ? move(request, *gap) : -ENOMEM;
}

// The pages go along: only the tables change. `target` is free.
s64 AddressSpace::move(const Remap& request, u64 target) {
    const u64 address = request.address, new_size = align_up(request.new_size, kPageSize);
    const u64 size = std::min(align_up(request.old_size, kPageSize), new_size);
    auto area = split(address);
    split(address + size);
    std::vector<std::pair<u64, Area>> moved;
    for (; area != state_.areas.end() && area->first < address + size; ++area) {
        const u64 to = target + (area->first - address), bytes = area->second.end - area->first;
        const Area& here = area->second;
        if (here.gpa && !tables_.map(to, *here.gpa, bytes, here.rights)) {
            tables_.unmap(target, size);
            return -ENOMEM;
        }
        moved.emplace_back(to, here);
        moved.back().second.end = to + bytes;
    }
    tables_.unmap(address, size);
    ++generation_;
    Area rest = moved.back().second;
    rest.offset += rest.end - moved.back().first;
    rest.end = target + new_size;
    rest.gpa.reset();
    rest.shrinks = false;
    for (area = state_.areas.find(address); area != state_.areas.end();) {
        if (area->first >= address + size) break;
        if (area->second.gpa) {
            arena_.forget_rights(*area->second.gpa, area->second.end - area->first);
        }
        area->second.gpa.reset();
        area = request.keep ? std::next(area) : state_.areas.erase(area);
    }
    for (auto& [start, piece] : moved) state_.areas.emplace(start, std::move(piece));
    if (new_size > size) state_.areas.emplace(target + size, std::move(rest));
    give_small(target + size, target + new_size);
    merge(target, target + new_size);
    merge(address, address + size);
    return static_cast<s64>(target);
}

u64 AddressSpace::brk(u64 end) {
    u64& heap_end = state_.heap_end;
    if (end < state_.heap_start || end > kEnd) return heap_end;
    const u64 from = align_up(heap_end, kPageSize), to = align_up(end, kPageSize);
    if (to > from) {
        Request request;
        request.address = from;
        request.size = to - from;
        request.rights = kReadable | kWritable;
        request.fixed = request.no_replace = true;
        request.name = "[heap]";
        if (map(request) < 0) return heap_end;
    } else if (to < from) {
        drop(to, from);
    }
    return heap_end = end;
}

void AddressSpace::clear() {
    drop(0, kEnd);
    state_.heap_start = state_.heap_end = 0;
    state_.top = kTop;
    exhausted_ = false;
}

}  // namespace polyvisor::process
