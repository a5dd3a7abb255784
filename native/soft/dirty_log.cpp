#include "soft/dirty_log.hpp"

#include <algorithm>
#include <bit>
#include <thread>

#include "base/error.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

namespace {

using Region = GuestMemory::Region;

template <class Function>
void for_each_page(std::span<const u64> bitmap, Function function) {
    for (u64 word = 0; word < bitmap.size(); ++word) {
        for (u64 left = bitmap[word]; left != 0; left &= left - 1) {
            function(word * 64 + static_cast<unsigned>(std::countr_zero(left)));
        }
    }
}

std::vector<u64> all_pages(const Region& region) {
    std::vector<u64> pages(region.bitmap_words(), ~u64{0});
    if (region.pages() % 64 != 0) pages.back() >>= 64 - region.pages() % 64;
    return pages;
}

}  // namespace

bool SoftDirtyLog::active() const {
    std::lock_guard lock(mutex_);
    return active_;
}

void SoftDirtyLog::add(SoftVcpu* vcpu) {
    std::lock_guard lock(mutex_);
    vcpus_.push_back(vcpu);
}

void SoftDirtyLog::remove(SoftVcpu* vcpu) {
    std::lock_guard lock(mutex_);
    std::erase(vcpus_, vcpu);
}

void SoftDirtyLog::arm(const Region& region, std::span<const u64> pages) const {
    for_each_page(pages, [&](u64 page) { region.page_flags[page].fetch_or(kPageDirtyTrack); });
}

bool SoftDirtyLog::wait_for_vcpus() const {
    using Clk = std::chrono::steady_clock;
    std::vector<u64> tickets;
    for (SoftVcpu* vcpu : vcpus_) tickets.push_back(vcpu->post_rearm());
    const auto end = Clk::now() + kPatience;
    for (std::size_t n = 0; n < vcpus_.size(); ++n) {
        // A block takes well below a microsecond, unless its thread has lost its processor.
        for (unsigned turn = 0; !vcpus_[n]->rearmed(tickets[n]); ++turn) {
            if (turn < 200) {
                __builtin_ia32_pause();
            } else if (Clk::now() < end) {
                std::this_thread::sleep_for(std::chrono::microseconds(20));
            } else {
                return false;
            }
        }
    }
    return true;
}

// The bit goes first and the flag is looked at second; note_first_store() does it the other way
// round, so a store in between leaves the bit set.
void SoftDirtyLog::clean(const Region& region, std::span<const u64> pages) const {
    for (u64 word = 0; word < pages.size(); ++word) {
        if (pages[word] != 0) region.dirty[word].fetch_and(~pages[word]);
    }
    for_each_page(pages, [&](u64 page) {
        if (!(region.page_flags[page].load() & kPageDirtyTrack)) {
            region.mark_dirty(region.start.value + (page << kPageShift), 1);
        }
    });
}

void SoftDirtyLog::start() {
    std::lock_guard lock(mutex_);
    active_ = true;
    for (const auto& region : memory_.regions()) arm(*region, all_pages(*region));
    bool rearmed = wait_for_vcpus();
    for (const auto& region : memory_.regions()) {
        auto all = all_pages(*region);
        if (rearmed) {
            clean(*region, all);
        } else {
            region->mark_dirty(region->start.value, region->size);
        }
    }
}

void SoftDirtyLog::stop() {
    std::lock_guard lock(mutex_);
    if (!active_) return;
    active_ = false;
    for (const auto& region : memory_.regions()) {
        for (u64 page = 0; page < region->pages(); ++page) {
            auto& flags = region->page_flags[page];
            if (flags.load(std::memory_order_relaxed) & kPageDirtyTrack) {
                flags.fetch_and(static_cast<u8>(~kPageDirtyTrack));
            }
        }
    }
}

void SoftDirtyLog::fetch(const Region& region, std::span<u64> bitmap) {
    std::lock_guard lock(mutex_);
    if (!active_) throw StateMismatch("the dirty log is not active; start() it first");
    std::vector<u64> pages(region.bitmap_words());
    bool any = false;
    for (u64 word = 0; word < pages.size(); ++word) {
        pages[word] = region.dirty[word].load();
        bitmap[word] |= pages[word];
        any |= pages[word] != 0;
    }
    if (!any) return;
    arm(region, pages);
    if (wait_for_vcpus()) clean(region, pages);
}

}  // namespace polyvisor::soft
