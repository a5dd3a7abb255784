// What tests of a dirty log compare it with: the contents of the guest's memory, page by page.
// `Guest` is a test's machine with `memory`, whose first region starts at 0, and `engine`.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/engine.hpp"

namespace pvtest {

using namespace polyvisor;

using Pages = std::vector<u64>;  // page numbers, ascending

template <class Guest>
Pages fetch(Guest& guest, unsigned number = 0) {
    const auto& region = *guest.memory.regions()[number];
    std::vector<u64> bitmap(region.bitmap_words());
    guest.engine->dirty_log().fetch(region, bitmap);
    Pages pages;
    for (u64 page = 0; page < bitmap.size() * 64; ++page) {
        if (bitmap[page / 64] >> (page % 64) & 1) pages.push_back(page);
    }
    return pages;
}

template <class Guest>
const u8* page_of(Guest& guest, u64 page) {
    return guest.memory.span(Gpa(page << kPageShift), kPageSize).data();
}

/// A second copy of the guest's memory, as a migration makes it.
struct Copy {
    std::vector<u8> bytes;

    template <class Guest>
    void take(Guest& guest, const Pages& pages) {
        for (u64 page : pages) {
            std::memcpy(&bytes[page * kPageSize], page_of(guest, page), kPageSize);
        }
    }
    template <class Guest>
    void take_all(Guest& guest) {
        bytes.resize(guest.memory.regions()[0]->size);
        std::memcpy(bytes.data(), page_of(guest, 0), bytes.size());
    }
    template <class Guest>
    Pages different(Guest& guest) const {
        Pages pages;
        for (u64 page = 0; page < bytes.size() / kPageSize; ++page) {
            if (std::memcmp(&bytes[page * kPageSize], page_of(guest, page), kPageSize) != 0) {
                pages.push_back(page);
            }
        }
        return pages;
    }
};

/// The seed of a guest's random numbers, in RBX.
inline void seed(Vcpu& vcpu, u64 value) {
    CpuState state = vcpu.save();
    state.gpr[kRbx] = value | 1;
    vcpu.restore(state);
}

}  // namespace pvtest
