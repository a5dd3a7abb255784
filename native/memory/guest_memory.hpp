// The guest's physical memory: regions of a memfd at guest-physical addresses.
//
// Regions are added before the machine runs and stay until it is destroyed, so a Region* and the
// host addresses inside it are stable for the life of the GuestMemory. Everything a guest can
// influence goes through span()/read()/write(), which check the bounds once.
//
// Each page has a flags byte (PageFlags) that the engines and the dirty log share. The soft
// engine's stores look at it only on the slow path: a page with any flag of kPageWriteTraps set is
// never writable through a soft TLB.
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

class GuestMemory {
  public:
    struct Region {
        Gpa start;
        u64 size = 0;
        bool read_only = false;
        std::string name;
        OwnedFd fd;  ///< memfd; sparse until touched
        Mapping mapping;
        std::unique_ptr<std::atomic<u8>[]> page_flags;  ///< one per page

        bool contains(u64 gpa) const { return gpa - start.value < size; }
        u8* host(u64 gpa) const { return mapping.data() + (gpa - start.value); }
        std::atomic<u8>& flags(u64 gpa) const {
            return page_flags[(gpa - start.value) >> kPageShift];
        }
    };

    GuestMemory() = default;
    GuestMemory(const GuestMemory&) = delete;
    GuestMemory& operator=(const GuestMemory&) = delete;

    /// Adds `size` bytes (a multiple of 4096, > 0) of zeroed memory at `start` (page aligned).
    /// Throws MemoryRangeError on overlap or wrap-around, ConfigError on bad sizes, HostError.
    Region& add(Gpa start, u64 size, std::string name, bool read_only = false);

    /// The region that holds gpa, or nullptr. Lock-free; regions are sorted by address.
    const Region* find(Gpa gpa) const;

    /// Host bytes of [gpa, gpa+size), or an empty span when not wholly inside one region.
    /// size > 0. Does not consult read_only: that is for the guest's own stores.
    std::span<u8> span(Gpa gpa, u64 size) const;

    /// Like span() but throws MemoryRangeError with the range.
    std::span<u8> checked(Gpa gpa, u64 size) const;

    /// Copies, also across adjacent regions. Throw MemoryRangeError when some byte is not backed
    /// (then nothing is copied). write() is the host's or a device's store: it ignores read_only,
    /// and calls the write observer (below) for pages with write traps.
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

    /// A store that did not come from a vCPU (DMA, the host) to pages with write traps must be told
    /// to the engine so that it drops translated code. The engine installs this before running.
    using WriteObserver = std::function<void(Gpa gpa, u64 size)>;
    void set_write_observer(WriteObserver observer) { observer_ = std::move(observer); }
    /// For code that wrote through span() itself (virtio, memoryviews): reports the range.
    void note_write(Gpa gpa, u64 size);

    const std::vector<std::unique_ptr<Region>>& regions() const { return regions_; }
    u64 total_size() const;

  private:
    std::vector<std::unique_ptr<Region>> regions_;  // sorted by start; fixed once a machine runs
    WriteObserver observer_;
};

}  // namespace polyvisor
