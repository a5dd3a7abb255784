// A small open-addressing hash map from u64 to u32, for the indexes of ShadowMmu: linear probing,
// no tombstones (erase moves later entries back), one allocation. The key ~0 is not allowed.
#pragma once

#include <vector>

#include "base/types.hpp"

namespace polyvisor {

class ShadowMap {
  public:
    static constexpr u32 kNone = ~u32{0};

    ShadowMap() { clear(); }

    /// The value of `key`, or kNone.
    u32 find(u64 key) const {
        for (u64 n = home(key);; n = (n + 1) & mask_) {
            if (slots_[n].key == key) return slots_[n].value;
            if (slots_[n].key == kEmpty) return kNone;
        }
    }
    /// Adds or replaces.
    void set(u64 key, u32 value) {
        if ((size_ + 1) * 4 > slots_.size() * 3) grow();
        u64 n = home(key);
        while (slots_[n].key != kEmpty && slots_[n].key != key) n = (n + 1) & mask_;
        size_ += slots_[n].key == kEmpty;
        slots_[n] = {key, value};
    }
    void erase(u64 key) {
        u64 hole = home(key);
        while (slots_[hole].key != key) {
            if (slots_[hole].key == kEmpty) return;
            hole = (hole + 1) & mask_;
        }
        --size_;
        // What follows moves into the hole unless that would put it before its home.
        for (u64 n = (hole + 1) & mask_; slots_[n].key != kEmpty; n = (n + 1) & mask_) {
            if (((n - home(slots_[n].key)) & mask_) < ((n - hole) & mask_)) continue;
            slots_[hole] = slots_[n];
            hole = n;
        }
        slots_[hole].key = kEmpty;
    }
    void clear() {
        slots_.assign(64, {});
        mask_ = 63;
        size_ = 0;
    }
    u64 size() const { return size_; }

  private:
    static constexpr u64 kEmpty = ~u64{0};
    struct Slot {
        u64 key = kEmpty;
        u32 value = 0;
    };

    u64 home(u64 key) const { return (key * 0x9e37'79b9'7f4a'7c15 >> 20) & mask_; }
    void grow() {
        std::vector<Slot> old(slots_.size() * 2);
        old.swap(slots_);
        mask_ = slots_.size() - 1;
        size_ = 0;
        for (const Slot& slot : old) {
            if (slot.key != kEmpty) set(slot.key, slot.value);
        }
    }

    std::vector<Slot> slots_;
    u64 mask_ = 0, size_ = 0;
};

}  // namespace polyvisor
