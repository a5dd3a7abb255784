#include "soft/soft_tlb.hpp"

#include <array>
#include <cstring>

namespace polyvisor::soft {

namespace {

constexpr auto kEmpty = [] {
    std::array<u64, 256> empty{};
    for (unsigned n = 0; n < 256; ++n) empty[n] = tlb_invalid(n);
    return empty;
}();

}  // namespace

void clear_tlbs(VcpuFrame& f) {
    for (Tlb& tlb : f.tlb) {
        std::memcpy(tlb.neg_r, kEmpty.data(), sizeof tlb.neg_r);
        std::memcpy(tlb.neg_w, kEmpty.data(), sizeof tlb.neg_w);
    }
}

void clear_tlb_page(VcpuFrame& f, u64 linear) {
    unsigned n = (linear >> kPageShift) & 255;
    for (Tlb& tlb : f.tlb) {
        tlb.neg_r[n] = tlb_invalid(n);
        tlb.neg_w[n] = tlb_invalid(n);
    }
}

void drop_writable(VcpuFrame& f) {
    for (Tlb& tlb : f.tlb) std::memcpy(tlb.neg_w, kEmpty.data(), sizeof tlb.neg_w);
}

bool drop_writable_host(VcpuFrame& f, const u8* host_page) {
    bool found = false;
    for (Tlb& tlb : f.tlb) {
        for (unsigned n = 0; n < 256; ++n) {
            if (tlb.neg_w[n] == tlb_invalid(n)) continue;
            if (-tlb.neg_w[n] + tlb.addend[n] == reinterpret_cast<u64>(host_page)) {
                tlb.neg_w[n] = tlb_invalid(n);
                found = true;
            }
        }
    }
    return found;
}

}  // namespace polyvisor::soft
