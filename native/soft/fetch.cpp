// From RIP to a block: fetch translation, look-up, and making what is not there.
#include <algorithm>

#include "soft/host_mxcsr.hpp"
#include "soft/translate.hpp"
#include "soft/vcpu.hpp"

namespace polyvisor::soft {

namespace {

u64 linear_ip(const VcpuFrame& f) {
    return f.long64() ? f.rip : static_cast<u32>(f.seg[kCs].base + f.rip);
}

// A block's stamp is only good for the code segment it was checked against.
u32 limit_of(const VcpuFrame& f) {
    return f.long64() ? 0xffffffff : f.seg[kCs].limit;
}

}  // namespace

bool SoftVcpu::fetch_address(u64 linear, u64& gpa) {
    u64 page = align_down(linear, kPageSize);
    FetchEntry& entry = fetch_tlb_[(linear >> kPageShift) & 127];
    if (entry.page == page && entry.epoch == frame.epoch && entry.cpl == frame.cpl) {
        gpa = entry.gpa + (linear & kPageMask);
        return true;
    }
    if (frame.mode & kModeLongActive) {
        unsigned width = frame.cr4 & bit(12) ? 57 : 48;
        if (static_cast<u64>(sign_extend(linear, width)) != linear) return raise_gp(frame);
    }
    WalkResult result = walk(tables, paging, linear, {.fetch = true, .user = frame.cpl == 3});
    if (result.fault) {
        raise(frame, kPf, result.error);
        frame.fault.cr2 = linear;
        return false;
    }
    gpa = result.page.gpa;
    entry = {page, gpa - (linear & kPageMask), frame.epoch, frame.cpl};
    return true;
}

// Whether a block found by IP still is what its linear address maps to; stamps it if so.
bool SoftVcpu::revalidate(Block& block) {
    ++stats.revalidations;
    if (block.linear != linear_ip(frame) || block.cs_limit != limit_of(frame)) return false;
    u64 gpa;
    if (!fetch_address(block.linear, gpa) || gpa != block.gpa) return false;
    if (block.gpa2 != ~u64{0}) {
        u64 second = align_down(block.linear, kPageSize) + kPageSize;
        if (!fetch_address(second, gpa) || gpa != block.gpa2) return false;
    }
    block.epoch = frame.epoch;
    return true;
}

Block* SoftVcpu::find_block(u32 mode) {
    JumpCache::Entry& entry = jump_cache_.entries[JumpCache::slot(frame.rip)];
    if (entry.ip == frame.rip && entry.block->mode == mode && entry.block->epoch != kDeadEpoch) {
        if (entry.block->epoch == frame.epoch) return entry.block;
        if (revalidate(*entry.block)) return entry.block;
        if (frame.fault.pending != Pending::kNone) return nullptr;
    }
    u64 linear = linear_ip(frame);
    u64 gpa;
    if (!fetch_address(linear, gpa)) return nullptr;
    Block* block = blocks.find(gpa, frame.rip, mode);
    if (block != nullptr && block->epoch != frame.epoch && !revalidate(*block)) {
        if (frame.fault.pending != Pending::kNone) return nullptr;
        block = nullptr;
    }
    if (block == nullptr) {
        block = make_block(gpa, linear, mode);
        if (block == nullptr) return nullptr;
    }
    entry.ip = frame.rip;
    entry.block = block;
    return block;
}

Block* SoftVcpu::make_block(u64 gpa, u64 linear, u32 mode) {
    HostMxcsr usual_mxcsr;
    BlockBuilder builder(blocks, env.cpuid.features, mode, frame.rip, limit_of(frame),
                         !generic_only_);
    Block block;
    block.linear = linear;
    block.gpa = gpa;
    u8 outside[kPageSize];  // code in what is no memory: the bus answers once, when the block is
                            // made
    const GuestMemory::Region* region = env.memory.find(Gpa(gpa));
    u64 in_page = kPageSize - (gpa & kPageMask);
    const u8* host = region != nullptr ? region->host(gpa) : outside;
    if (region == nullptr) std::fill_n(outside, in_page, u8{0xff});
    for (;;) {
        auto step = builder.add({host + builder.bytes(), in_page - builder.bytes()});
        if (step == BlockBuilder::Step::kMore) {
            if (builder.bytes() == in_page) break;
            continue;
        }
        if (step == BlockBuilder::Step::kTruncated && builder.empty()) {
            // The first instruction runs into the next page: it gets a block of its own.
            u64 second;
            u64 next = align_down(linear, kPageSize) + kPageSize;
            if (!frame.long64()) next = static_cast<u32>(next);
            if (!fetch_address(next, second)) return nullptr;
            u8 bytes[32];
            std::fill_n(bytes, sizeof bytes, u8{0xff});
            std::copy_n(host, in_page, bytes);
            if (const auto* other = env.memory.find(Gpa(second))) {
                std::copy_n(other->host(second), 15, bytes + in_page);
            }
            block.gpa2 = second;
            builder.add({bytes, in_page + 15});
        }
        break;
    }
    std::vector<Uop> uops;
    builder.finish(block, uops);
    block.epoch = frame.epoch;
    return blocks.insert(block, uops);
}

}  // namespace polyvisor::soft
