// The guest's physical memory: regions of a memfd at guest-physical addresses.
//
// Regions are added before the machine runs and stay until it is destroyed, so a Region* and the
// host addresses inside it are stable for the life of the GuestMemory. Everything a guest can
// influence goes through span()/read()/write(), which check the bounds once.
//
// Each page has a flags byte (PageFlags) that the soft engine and its dirty log share. The soft
// engine's stores look at it only on the slow path: a page with any flag of kPageWriteTraps set is
// never writable through a soft TLB.
//
// Each page also has a dirty bit. Stores that come from outside the engine (write(), note_write())
// set it always, since that costs less than asking whether somebody wants to know; an engine's
// DirtyLog adds what its vCPUs wrote and takes the bits.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/fd.hpp"
#include "base/mapping.hpp"
#include "memory/address.hpp"

namespace polyvisor {

enum PageFlags : u8 {
    kPageCode = 1,  ///< some vCPU holds translated code of this page
    kPageDirtyTrack =
        2,  ///< dirty logging is on and the page is clean: the next store must note it
    kPageWriteTraps = kPageCode | kPageDirtyTrack,
};

/// What the host backs a region with. Guest-physical and host addresses are congruent modulo the
/// larger page, so that KVM can map it as one.
enum class HugePages : u8 {
    kNone,         ///< pages of 4 KiB, of a memfd: other processes could map it too
    kTransparent,  ///< this process's own memory, in which the host joins pages when it can
    k2M,           ///< from the host's pool, taken when the region is made
    k1G,
};
/// "none", "transparent", "2M", "1G". Throws ConfigError for anything else.
HugePages parse_huge_pages(const std::string& name);

class GuestMemory {
  public:
    /// Regions up to which one behind all others may be added while vCPUs run, by one thread.
    static constexpr std::size_t kMostLate = 64;

    struct Region {
        Gpa start;
        u64 size = 0;
        bool read_only = false;
        bool foreign = false;  ///< of add_mapping(): what it has been given memory for is not known
        bool sealed = false;  ///< the host may not write to it either: an image that stays as it is
        std::string name;
        OwnedFd fd;  ///< memfd, sparse until touched; none when kTransparent
        Mapping mapping;
        std::shared_ptr<void> owner;                    ///< of a mapping that is somebody else's
        std::unique_ptr<std::atomic<u8>[]> page_flags;  ///< one per page
        std::unique_ptr<std::atomic<u64>[]> dirty;      ///< one bit per page; see DirtyLog

        u64 pages() const { return size >> kPageShift; }
        /// Words of `dirty`, and of every bitmap of the region: bit n of word n / 64 is page n.
        u64 bitmap_words() const { return (pages() + 63) / 64; }

        bool contains(u64 gpa) const { return gpa - start.value < size; }
        u8* host(u64 gpa) const { return mapping.data() + (gpa - start.value); }
        std::atomic<u8>& flags(u64 gpa) const {
            return page_flags[(gpa - start.value) >> kPageShift];
        }
        /// What the first store of a soft vCPU to a page with kPageDirtyTrack does. The order is
        /// what the log relies on: a page without the flag has its bit, or will have it before the
        /// vCPU gets to its next instruction.
        void note_first_store(u64 gpa) const {
            flags(gpa).fetch_and(static_cast<u8>(~kPageDirtyTrack));
            mark_dirty(gpa, 1);
        }
        /// Sets the dirty bits of [gpa, gpa+size), which lies in the region, after it was stored
        /// to: a full barrier stands between the stores and the bits.
        void mark_dirty(u64 gpa, u64 size) const;
        /// Moves the dirty bits into `bitmap`, where those that are set stay.
        void take_dirty(std::span<u64> bitmap) const;
    };

    GuestMemory() { regions_.reserve(kMostLate); }
    GuestMemory(const GuestMemory&) = delete;
    GuestMemory& operator=(const GuestMemory&) = delete;

    /// Adds `size` bytes (a multiple of 4096, > 0) of zeroed memory at `start` (page aligned).
    /// Throws MemoryRangeError on overlap or wrap-around, ConfigError on bad sizes and for huge
    /// pages that the host does not have or has too few of, HostError.
    Region& add(Gpa start, u64 size, std::string name, bool read_only = false,
                HugePages huge = HugePages::kNone);

    /// Adds memory that is there already: a file or a buffer, which `owner` keeps in place. Size
    /// and errors as of add(). `writable` false: nobody writes to it, neither a guest nor write().
    Region& add_mapping(Gpa start, Mapping mapping, std::string name, bool writable,
                        std::shared_ptr<void> owner = {});

    /// The region that holds gpa, or nullptr. Lock-free; regions are sorted by address.
    const Region* find(Gpa gpa) const;

    /// Host bytes of [gpa, gpa+size), or an empty span when not wholly inside one region.
    /// size > 0. Does not consult read_only: that is for the guest's own stores.
    std::span<u8> span(Gpa gpa, u64 size) const;

    /// Like span() but throws MemoryRangeError with the range.
    std::span<u8> checked(Gpa gpa, u64 size) const;

    /// Copies, also across adjacent regions. Throw MemoryRangeError when some byte is not backed
    /// (then nothing is copied). write() is the host's or a device's store: it ignores read_only,
    /// and does what note_write() does. It throws StateMismatch for sealed regions.
    void read(Gpa gpa, std::span<u8> into) const;
    void write(Gpa gpa, std::span<const u8> from);
    template <class T>
    T load(Gpa gpa) const {
        T value;
        read(gpa, {reinterpret_cast<u8*>(&value), sizeof value});
        return value;
    }
    template <class T>
    void store(Gpa gpa, T value) {
        write(gpa, {reinterpret_cast<const u8*>(&value), sizeof value});
    }

    /// A store that did not come from a vCPU (DMA, the host) to pages with code must be told to the
    /// engine so that it drops what it translated. The engine installs this before running.
    using WriteObserver = std::function<void(Gpa gpa, u64 size)>;
    void set_write_observer(WriteObserver observer) { observer_ = std::move(observer); }
    /// For code that wrote through span() itself (virtio, memoryviews): the range is dirty, and the
    /// observer hears of the pages with code.
    void note_write(Gpa gpa, u64 size);
    /// Only the latter: for stores that nobody saw, and that may have been none.
    void recheck_code(Gpa gpa, u64 size) const;

    /// Part of a region, in bytes from its start.
    struct Extent {
        u64 offset = 0;
        u64 size = 0;
    };
    /// The parts that the host has given memory to; the rest is zero and costs nothing. The guest
    /// must stand still for an exact answer. A foreign region counts as all given.
    static std::vector<Extent> touched(const Region& region);
    /// Gives a region's memory back: it reads as zero afterwards. Throws HostError.
    void discard(const Region& region) { discard(region, 0, region.size); }
    /// The same for the whole pages in [gpa, gpa+size); how many bytes they are. None of read-only
    /// memory and of add_mapping(). Of larger pages from a pool, what is no whole one is only
    /// cleared. Throws MemoryRangeError, HostError.
    u64 discard(Gpa gpa, u64 size);

    const std::vector<std::unique_ptr<Region>>& regions() const { return regions_; }
    /// Of regions(), as other threads may rely on it.
    std::size_t count() const { return count_.load(std::memory_order_acquire); }
    u64 total_size() const;

  private:
    void check_place(Gpa start, u64 size, const std::string& name) const;
    Region& insert(std::unique_ptr<Region> region);
    void discard(const Region& region, u64 offset, u64 size);

    std::vector<std::unique_ptr<Region>>
        regions_;  // sorted by start; what is there when a machine runs stays
    std::atomic<std::size_t> count_{0};
    WriteObserver observer_;
};

}  // namespace polyvisor
