#include "mmu/find.hpp"

#include <algorithm>
#include <cstring>

namespace polyvisor {

namespace {

using Bytes = std::span<const u8>;

// Finds matches in runs of bytes that come in order. A match may begin at the end of one run and
// end in a later one: the last bytes of what is adjacent are kept for that.
class Searcher {
  public:
    Searcher(Bytes pattern, u64 limit, std::vector<u64>& matches)
        : pattern_(pattern), limit_(limit), matches_(matches) {}

    /// False when the limit is met.
    bool run(u64 gva, Bytes bytes) {
        if (gva != end_) kept_.clear();
        if (!kept_.empty()) {
            const std::size_t kept = kept_.size();
            const std::size_t more = std::min(bytes.size(), pattern_.size() - 1);
            const u64 first = gva - kept;
            kept_.insert(kept_.end(), bytes.begin(), bytes.begin() + static_cast<s64>(more));
            // Those that begin in `bytes` are found below.
            if (!search(first, kept_, kept)) return false;
            kept_.resize(kept);
        }
        if (!search(gva, bytes, bytes.size())) return false;
        end_ = gva + bytes.size();
        keep(bytes);
        return true;
    }

  private:
    bool search(u64 gva, Bytes bytes, std::size_t starts) {
        for (std::size_t at = 0; at < starts && bytes.size() - at >= pattern_.size();) {
            const void* found = pattern_.size() == 1
                                    ? std::memchr(bytes.data() + at, pattern_[0], bytes.size() - at)
                                    : ::memmem(bytes.data() + at, bytes.size() - at,
                                               pattern_.data(), pattern_.size());
            if (found == nullptr) break;
            at = static_cast<std::size_t>(static_cast<const u8*>(found) - bytes.data());
            if (at >= starts) break;
            matches_.push_back(gva + at);
            if (matches_.size() >= limit_) return false;
            ++at;
        }
        return true;
    }

    void keep(Bytes bytes) {
        const std::size_t most = pattern_.size() - 1;
        const std::size_t fresh = std::min(bytes.size(), most);
        if (kept_.size() + fresh > most) {
            kept_.erase(kept_.begin(),
                        kept_.begin() + static_cast<s64>(kept_.size() + fresh - most));
        }
        kept_.insert(kept_.end(), bytes.end() - static_cast<s64>(fresh), bytes.end());
    }

    Bytes pattern_;
    u64 limit_;
    std::vector<u64>& matches_;
    std::vector<u8> kept_;
    u64 end_ = 0;
};

// Pages that are neighbours in both address spaces are searched as one, up to so many bytes.
constexpr u64 kLongRun = 64 << 20;
// What memory that was never touched reads as.
constexpr u64 kZeros = 64 << 10;
constexpr std::array<u8, kZeros> kZero{};

class Finder {
  public:
    Finder(const AddressSpace& space, Bytes pattern, const FindOptions& options)
        : memory_(space.memory()),
          options_(options),
          pattern_(pattern),
          searcher_(pattern, options.limit, result_.matches),
          scanner_(space, options.start, options.last) {
        scanner_.budget = options.budget;
    }

    FindResult find() {
        MappedRange run;
        for (MappedRange page; scanner_.next(page);) {
            const bool joined = run.size != 0 && run.gva + run.size == page.gva &&
                                run.physical + run.size == page.physical && run.size < kLongRun;
            if (joined) {
                run.size += page.size;
                continue;
            }
            if (!search(run)) return std::move(result_);
            run = page;
        }
        if (search(run) && scanner_.exhausted()) stop(scanner_.position());
        return std::move(result_);
    }

  private:
    // False when a limit is met; `result_` then says where to go on.
    bool search(MappedRange run) {
        while (run.size != 0) {
            const GuestMemory::Region* region = memory_.find(Gpa(run.physical));
            if (region == nullptr) {  // up to the next region, if it is in the run
                u64 skip = run.size;
                for (const auto& other : memory_.regions()) {
                    if (other->start.value > run.physical) {
                        skip = std::min(skip, other->start.value - run.physical);
                    }
                }
                advance(run, skip);
                continue;
            }
            const Part part = part_of(*region, run.physical - region->start.value);
            u64 size = std::min(run.size, part.size);
            if (part.zero && nonzero_ && size > 2 * kZeros) {
                if (!look(run.gva, kZero.data(), kZeros)) return false;
                advance(run, size - kZeros);  // nothing can match in between
                size = kZeros;
            }
            size = std::min({size, part.zero ? kZeros : kLongRun, options_.bytes - result_.looked});
            if (size == 0) {
                stop(run.gva);
                return false;
            }
            if (!look(run.gva, part.zero ? kZero.data() : region->host(run.physical), size)) {
                return false;
            }
            advance(run, size);
        }
        return true;
    }

    bool look(u64 gva, const u8* bytes, u64 size) {
        result_.looked += size;
        if (searcher_.run(gva, {bytes, size})) return true;
        result_.complete = false;
        result_.next = result_.matches.back() + 1;
        return false;
    }

    struct Part {
        u64 size;
        bool zero;  // the host has given no memory to it
    };
    // To read from memory that the guest has never touched would make the host give it: such parts
    // are known to be zero instead.
    Part part_of(const GuestMemory::Region& region, u64 offset) {
        if (region_ != &region) {
            region_ = &region;
            extents_ = GuestMemory::touched(region);
        }
        auto after = std::upper_bound(
            extents_.begin(), extents_.end(), offset,
            [](u64 value, const GuestMemory::Extent& extent) { return value < extent.offset; });
        if (after != extents_.begin()) {
            const auto& extent = *std::prev(after);
            if (offset - extent.offset < extent.size) {
                return {extent.offset + extent.size - offset, false};
            }
        }
        const u64 end = after == extents_.end() ? region.size : after->offset;
        return {end - offset, true};
    }

    static void advance(MappedRange& run, u64 by) {
        run.gva += by;
        run.physical += by;
        run.size -= by;
    }

    // What begins before `at` and ends behind it has not been found yet.
    void stop(u64 at) {
        const u64 back = std::min<u64>(pattern_.size() - 1, at - options_.start);
        result_.complete = false;
        result_.next = at - back;
    }

    GuestMemory& memory_;
    const FindOptions& options_;
    Bytes pattern_;
    const bool nonzero_ = pattern_.size() <= kZeros && std::any_of(pattern_.begin(), pattern_.end(),
                                                                   [](u8 b) { return b != 0; });
    const GuestMemory::Region* region_ = nullptr;  // whose extents are known
    std::vector<GuestMemory::Extent> extents_;
    FindResult result_;
    Searcher searcher_;
    MappingScanner scanner_;
};

// Calls step(host bytes, physical) for each page's part of a virtual range.
template <class Step>
CopyFault each_page(const AddressSpace& space, u64 gva, u64 size, bool write, Step step) {
    const GuestMemory::Region* region = nullptr;
    for (u64 done = 0; done < size;) {
        const u64 at = gva + done;
        const u64 part = std::min(size - done, kPageSize - (at & kPageMask));
        if (done != 0 && at == 0) return {CopyFault::kNotMapped, at, 0};  // beyond the last address
        const auto physical = space.translate(at);
        if (!physical) return {CopyFault::kNotMapped, at, 0};
        if (region == nullptr || !region->contains(*physical)) {
            region = space.memory().find(Gpa(*physical));
        }
        if (region == nullptr) return {CopyFault::kNoMemory, at, *physical};
        if (write && region->sealed) return {CopyFault::kReadOnly, at, *physical};
        step(region->host(*physical), *physical, done, part);
        done += part;
    }
    return {};
}

}  // namespace

FindResult find_bytes(const AddressSpace& space, std::span<const u8> pattern,
                      const FindOptions& options) {
    return Finder(space, pattern, options).find();
}

CopyFault check_virtual(const AddressSpace& space, u64 gva, u64 size, bool write) {
    return each_page(space, gva, size, write, [](u8*, u64, u64, u64) {});
}

CopyFault read_virtual(const AddressSpace& space, u64 gva, std::span<u8> into) {
    return each_page(space, gva, into.size(), false, [&](u8* host, u64, u64 done, u64 part) {
        std::memcpy(into.data() + done, host, part);
    });
}

CopyFault write_virtual(const AddressSpace& space, u64 gva, std::span<const u8> from) {
    struct Piece {
        u64 physical, done, size;
    };
    // All is translated before anything is written: what is written may be a page table.
    std::vector<Piece> pieces;
    CopyFault fault =
        each_page(space, gva, from.size(), true, [&](u8*, u64 physical, u64 done, u64 part) {
            if (!pieces.empty() && pieces.back().physical + pieces.back().size == physical) {
                pieces.back().size += part;
            } else {
                pieces.push_back({physical, done, part});
            }
        });
    if (fault.reason != CopyFault::kNone) return fault;
    for (const Piece& piece : pieces) {
        space.memory().write(Gpa(piece.physical), from.subspan(piece.done, piece.size));
    }
    return {};
}

}  // namespace polyvisor
