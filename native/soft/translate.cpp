#include "soft/translate.hpp"

#include "soft/dispatch.hpp"
#include "soft/generic.hpp"

namespace polyvisor::soft {

namespace {

// Exception number for "raise nothing": 0 is #DE, which no decode-time check gives.
constexpr u8 kNoVector = 0;

bool vex_encoded(const OpInfo& row) {
    return row.map == Map::V0F || row.map == Map::V0F38 || row.map == Map::V0F3A;
}

Uop start_uop(const Insn& insn, const TranslateContext& context) {
    Uop u{};
    u.length = insn.length;
    u.number = context.number;
    u.offset = static_cast<u16>(context.ip - context.block_ip);
    return u;
}

/// Status flags that the instruction sets whatever they were: those that make earlier writes dead.
/// The manuals leave flags undefined that CPUs in fact keep (MUL, BT, ...), so the rows say too
/// much here.
u8 flags_overwritten(const Insn& insn, const OpInfo& row) {
    if (row.map != Map::One) return 0;
    unsigned op = insn.opcode;
    unsigned ext = insn.modrm >> 3 & 7;
    bool arithmetic =
        (op < 0x40 && (op & 7) < 6) || (op >= 0x80 && op <= 0x85) || op == 0xa8 || op == 0xa9;
    bool group3 = (op == 0xf6 || op == 0xf7) && (ext <= 1 || ext == 3);
    bool step = (op == 0xfe || op == 0xff) && ext <= 1;
    unsigned count = op == 0xd1 ? 1 : insn.imm & (insn.opsize == 8 ? 63 : 31);
    bool shift = (op == 0xc1 || op == 0xd1) && ext >= 4 && count != 0;
    return arithmetic || group3 || step || shift ? row.flags_written : 0;
}

}  // namespace

BlockBuilder::Step BlockBuilder::add(std::span<const u8> bytes) {
    if (insns_.size() >= kMaxBlock || ((mode_ & kModeStep) && !insns_.empty())) return Step::kStop;
    Item item{};
    item.offset = static_cast<u16>(size_);
    auto size = static_cast<CodeSize>(mode_ & kModeCodeSize);
    DecodeStatus status = decode(bytes, size, features_, item.insn);
    if (status == DecodeStatus::kTruncated) return Step::kTruncated;
    if (status == DecodeStatus::kUndefined) item.vector = kUd;
    if (status == DecodeStatus::kTooLong) item.vector = kGp;
    if (size != CodeSize::k64) {
        u64 last = ip_ + size_ + std::max<u64>(item.insn.length, 1) - 1;
        if (last > cs_limit_) {
            if (!insns_.empty()) return Step::kStop;
            item.vector = kGp;
        }
    }
    check(item);
    insns_.push_back(item);
    size_ += item.insn.length;
    return ends_block(item) ? Step::kEnd : Step::kMore;
}

// What the framework promises operations to have checked (soft/ops.hpp), as far as the mode
// decides.
void BlockBuilder::check(Item& item) const {
    if (item.vector != kNoVector) return;
    const OpInfo& row = op_info(item.insn.op);
    bool real = !(mode_ & kModeProtected);
    if ((row.attrs & kNoReal) && real) {
        item.vector = kUd;
    } else if ((row.attrs & kCpl0) && (mode_ & kModeCplMask) && !(real && !(mode_ & kModeVm86))) {
        item.vector = kGp;
    } else if (row.attrs & kFpu) {
        if (mode_ & kModeFpuTrap) item.vector = kNm;
    } else if (row.attrs & kMmx) {
        bool sse_off = (row.attrs & kSse) && (mode_ & kModeSseUd);  // MOVQ2DQ, CVTPI2PS, ...
        if ((mode_ & kModeEm) || sse_off)
            item.vector = kUd;
        else if (mode_ & kModeTs)
            item.vector = kNm;
    } else if (row.attrs & kSse) {
        if (mode_ & kModeSseUd)
            item.vector = kUd;
        else if (mode_ & kModeTs)
            item.vector = kNm;
    } else if (row.attrs & kAvx) {
        if (mode_ & kModeAvxUd)
            item.vector = kUd;
        else if (mode_ & kModeTs)
            item.vector = kNm;
    }
    if (item.vector == kNoVector && operation_of(item.insn.op) == nullptr) item.vector = kUd;
}

bool BlockBuilder::ends_block(const Item& item) {
    return item.vector != kNoVector || (op_info(item.insn.op).attrs & kEndsBlock);
}

// Status flags that are overwritten before anybody can read them need not be computed. Anything
// that may fault, and the block's end, reads them all: the flags an exception handler sees are
// exact.
void BlockBuilder::mark_live_flags() {
    u8 live = kAllFlags;
    for (auto at = insns_.rbegin(); at != insns_.rend(); ++at) {
        if (at->vector != kNoVector) {
            live = kAllFlags;
            continue;
        }
        const OpInfo& row = op_info(at->insn.op);
        at->live = (row.flags_written & live) != 0;
        live &= static_cast<u8>(~flags_overwritten(at->insn, row));
        live |= flags_read(at->insn);
        // Register-to-register integer instructions cannot fault, but for divisions; everything
        // else is taken to.
        bool divides = row.map == Map::One &&
                       ((row.opcode | 1) == 0xf7 ? at->insn.reg >= 6 : row.opcode == 0xd4);
        bool quiet = !at->insn.has_mem && !divides && row.feature == Feature::kBase &&
                     (row.map == Map::One || row.map == Map::M0F) && (row.attrs & kNative) &&
                     !(row.attrs & (kEndsBlock | kString | kFpu | kSse | kMmx));
        if (!quiet) live = kAllFlags;
    }
}

void BlockBuilder::emit(const Item& item, u8 number, std::vector<Uop>& uops) {
    const Insn& insn = item.insn;
    TranslateContext context{mode_, ip_ + item.offset, ip_, number, item.live};
    if (item.vector != kNoVector) {
        Uop u = start_uop(insn, context);
        u.run = raise_uop;
        u.cc = item.vector;
        u.size = item.vector == kGp;
        uops.push_back(u);
        return;
    }
    const OpInfo& row = op_info(insn.op);
    if (fast_ && emit_fast(insn, row, context, uops)) return;
    OpInsn* stored = cache_.new_insn();
    stored->insn = insn;
    stored->operation = operation_of(insn.op);
    if (insn.has_mem && insn.base == kRipReg) {
        u64 next = context.ip + insn.length;
        stored->insn.base = kNoReg;
        stored->insn.disp = static_cast<s64>(next + static_cast<u64>(insn.disp));
    }
    Uop u = start_uop(insn, context);
    u.disp = reinterpret_cast<u64>(stored);
    if ((row.attrs & (kFpu | kMmx)) && !(row.attrs & kNoMf)) {
        u.run = check_mf;
        uops.push_back(u);
    }
    bool aligned = insn.has_mem &&
                   ((row.attrs & kAlignedVex) || ((row.attrs & kAligned) && !vex_encoded(row)));
    bool checked = (row.attrs & kFpExcept) && (mode_ & kModeFpException);
    bool code64 = static_cast<CodeSize>(mode_ & kModeCodeSize) == CodeSize::k64;
    if (aligned) {
        u.size = static_cast<u8>(memory_size(insn));
        aligned = u.size >= 16;
    }
    bool joined = aligned && code64 && insn.addrsize == 8 && !checked && !(row.attrs & kEndsBlock);
    if (aligned && !joined) {
        u.run = check_aligned;
        uops.push_back(u);
    }
    if (row.attrs & kEndsBlock) {
        u.run = run_ending;
    } else if (checked) {
        u.run = run_simd_checked;
    } else if (!insn.has_mem) {
        u.run = run_plain;
    } else if (joined) {
        u.run = run_mem64_aligned;
    } else {
        u.run = insn.addrsize == 8 ? run_mem64 : run_mem_any;
    }
    uops.push_back(u);
}

void BlockBuilder::finish(Block& block, std::vector<Uop>& uops) {
    mark_live_flags();
    uops.clear();
    for (std::size_t n = 0; n < insns_.size(); ++n) {
        const Item& item = insns_[n];
        if (fast_ && n + 1 < insns_.size() && item.vector == kNoVector &&
            insns_[n + 1].vector == kNoVector) {
            TranslateContext context{mode_, ip_ + item.offset, ip_, static_cast<u8>(n), true};
            if (emit_fused(item.insn, insns_[n + 1].insn, context, uops)) {
                ++n;
                continue;
            }
        }
        emit(item, static_cast<u8>(n), uops);
    }
    if (!ends_block(insns_.back())) {
        u64 next = ip_ + size_;
        Uop u{};
        u.run = fall_through;
        u.disp = (mode_ & kModeCodeSize) == static_cast<u32>(CodeSize::k64)
                     ? next
                     : static_cast<u32>(next);
        u.offset = static_cast<u16>(size_);
        u.number = static_cast<u8>(insns_.size());
        uops.push_back(u);
    }
    block.instructions = static_cast<u32>(insns_.size());
    block.mode = mode_;
    block.ip = ip_;
    block.bytes = size_;
    block.cs_limit = cs_limit_;
}

}  // namespace polyvisor::soft
