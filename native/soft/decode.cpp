// The instruction decoder: prefixes, opcode, ModRM, SIB, displacement, immediates, driven by tables
// that are built once from the rows of soft/optab.hpp.
//
// An opcode (map, byte) has a slot. A slot leads to lists of candidate rows: one list when the rows
// do not look at ModRM, else sixteen, by ModRM.reg and by whether the operand is memory. Within a
// list rows stand in order of preference (mandatory F2/F3, then 66, then table order). What a row
// demands of prefixes, mode, W, L, vvvv and REX.B is a bit set, the instruction's situation another
// with one bit of each kind, so that choosing is `(row.allowed & situation) == situation` down a
// list of one to three rows.
//
// Limits: 3DNow!, XOP, EVEX, REX2 and MPX do not exist here: their encodings are #UD or the NOPs
// they are on CPUs without them. What depends on control registers or CPL is left to the
// operations.
#include <algorithm>
#include <array>
#include <vector>

#include "cpu/state.hpp"
#include "soft/optab.hpp"

namespace polyvisor::soft {
namespace {

constexpr unsigned kMaxLength = 15;
constexpr u8 kMaps = 8;

// clang-format off
/// The situation bits that a row allows.
enum Situation : u32 {
    kSitNoPrefix = 1 << 0, kSit66 = 1 << 1, kSitF3 = 1 << 2, kSitF2 = 1 << 3,
    kSit16 = 1 << 4, kSit32 = 1 << 5, kSit64 = 1 << 6,
    kSitW0 = 1 << 7, kSitW1 = 1 << 8,
    kSitL0 = 1 << 9, kSitL1 = 1 << 10,
    kSitNoVvvv = 1 << 11, kSitVvvv = 1 << 12,
    kSitNoRexB = 1 << 13, kSitRexB = 1 << 14,
    kSitAll = (1 << 15) - 1,
};
// clang-format on

enum class Immediate : u8 { kNone, kByte, kSignedByte, kWord, kZ, kV, kFar, kMoffs };

enum RowFlags : u16 {
    kRowWIgnored = 1 << 0,    ///< W does not matter outside 64-bit mode (general-register operands)
    kRowModIgnored = 1 << 1,  ///< MOV CR/DR: ModRM.rm is a register whatever mod says
    kRowMmxReg = 1 << 2,      ///< ModRM.reg is an MMX register: REX.R is ignored
    kRowMmxRm = 1 << 3,       ///< ModRM.rm is an MMX or x87 register: REX.B is ignored
    kRowNo8 = 1 << 4,         ///< no 8-byte form: port I/O
    kRowNo2 = 1 << 5,         ///< outside 64-bit mode the operand is 4 bytes whatever the prefixes
    kRowVsib = 1 << 6,
    kRowSreg = 1 << 7,  ///< ModRM.reg is a segment register
    kRowLoadsSreg = 1 << 8,
    kRowCr = 1 << 9,
    kRowDr = 1 << 10,
    kRowImmReg = 1 << 11,  ///< the immediate's upper half is a register number
    kRowSpecial =
        kRowModIgnored | kRowMmxReg | kRowMmxRm | kRowSreg | kRowLoadsSreg | kRowCr | kRowDr,
    kRowSize = kRowNo8 | kRowNo2,
};

struct Row {
    u32 allowed;
    u16 op;
    u16 flags;
    u32 attrs;
    Feature feature;
    Mandatory prefix;
    Immediate imm, imm2;
    bool full;  ///< the whole ModRM byte must equal full_modrm
    u8 full_modrm;
};

struct List {
    u16 first = 0, count = 0;
};

struct Slot {
    u16 list = 0;
    bool exists = false;
    bool has_modrm = false;
    bool by_modrm = false;  ///< sixteen lists: (register form << 3) | reg
};

// clang-format off
Immediate immediate_of(Operand operand) {
    switch (operand) {
        using enum Operand;
        case Ib: case Lx: case Ldq: return Immediate::kByte;
        case sIb: case Jb: return Immediate::kSignedByte;
        case Iw: return Immediate::kWord;
        case Iz: case Jz: return Immediate::kZ;
        case Iv: return Immediate::kV;
        case Ap: return Immediate::kFar;
        case Ob: case Ov: return Immediate::kMoffs;
        default: return Immediate::kNone;
    }
}

u16 operand_flags(const OpInfo& info, Operand operand) {
    bool vex = info.map == Map::V0F || info.map == Map::V0F38 || info.map == Map::V0F3A;
    switch (operand) {
        using enum Operand;
        case Ey: case Gy: case By: case My: case Ry: case Ed: case Eq: case Gd: case Gq: case Rd: case Rq:
            return vex ? kRowWIgnored : 0;
        case Pq: case Pd: return kRowMmxReg;
        case Qq: case Qd: case Nq: case STi: return kRowMmxRm;
        case eAX: case DX: return kRowNo8;
        case Rv: case Gv: return info.attrs & kForce64 ? kRowNo2 : 0;
        case Cd: return kRowCr | kRowModIgnored;
        case Dd: return kRowDr | kRowModIgnored;
        case VMx: return kRowVsib;
        case Lx: case Ldq: return kRowImmReg;
        case Sw: return kRowSreg;
        default: return 0;
    }
}
// clang-format on

Row make_row(const OpInfo& info, u16 op) {
    Row row{};
    row.op = op;
    row.attrs = info.attrs;
    row.feature = info.feature;
    row.prefix = info.prefix;
    row.full = info.ext.kind == OpExt::kFull;
    row.full_modrm = info.ext.value;
    for (Operand operand : info.operands) {
        row.flags |= operand_flags(info, operand);
        Immediate imm = immediate_of(operand);
        if (imm != Immediate::kNone) (row.imm == Immediate::kNone ? row.imm : row.imm2) = imm;
    }
    if (info.operands[0] == Operand::Sw) row.flags |= kRowLoadsSreg;

    u32 allowed = kSitAll;
    switch (info.prefix) {
        case Mandatory::Any:
            break;
        case Mandatory::NP:
            allowed &= ~(kSit66 | kSitF2 | kSitF3);
            break;
        case Mandatory::P66:
            allowed &= ~(kSitNoPrefix | kSitF2 | kSitF3);
            break;
        case Mandatory::PF3:
            allowed &= ~(kSitNoPrefix | kSit66 | kSitF2);
            break;
        case Mandatory::PF2:
            allowed &= ~(kSitNoPrefix | kSit66 | kSitF3);
            break;
    }
    if (info.attrs & kNoRep) allowed &= ~(kSitF2 | kSitF3);
    if (info.attrs & kNo64) allowed &= ~kSit64;
    if (info.attrs & kOnly64) allowed &= ~(kSit16 | kSit32);
    if (info.attrs & kW0) allowed &= ~kSitW1;
    if (info.attrs & kW1) allowed &= ~kSitW0;
    if (info.attrs & kL0) allowed &= ~kSitL1;
    if (info.attrs & kL1) allowed &= ~kSitL0;
    if (info.attrs & kVvvvUnused) allowed &= ~kSitVvvv;
    // NOP and PAUSE are exceptions among the XCHGs with rAX: they do not take REX.B.
    if (info.map == Map::One && info.opcode == 0x90 && !(info.attrs & kOpcodeReg))
        allowed &= ~kSitRexB;
    row.allowed = allowed;
    return row;
}

/// Whether a ModRM byte with this reg field and form can satisfy `ext` (kFull: apart from rm).
bool ext_accepts(const OpExt& ext, bool reg_form, u8 reg) {
    switch (ext.kind) {
        case OpExt::kNone:
        case OpExt::kAny:
            return true;
        case OpExt::kMem:
            return !reg_form;
        case OpExt::kReg:
            return reg_form;
        case OpExt::kGroup:
            return reg == ext.value;
        case OpExt::kGroupMem:
            return !reg_form && reg == ext.value;
        case OpExt::kGroupReg:
            return reg_form && reg == ext.value;
        case OpExt::kFull:
            return reg_form == (ext.value >= 0xc0) && reg == ((ext.value >> 3) & 7);
    }
    return false;
}

class Tables {
  public:
    Tables() {
        for (unsigned map = 0; map < kMaps; ++map) {
            for (unsigned opcode = 0; opcode < 256; ++opcode) build_slot(map, opcode);
        }
    }

    const Slot& slot(Map map, u8 opcode) const {
        return slots_[static_cast<u8>(map) * 256 + opcode];
    }
    List list(unsigned n) const { return lists_[n]; }
    const Row* rows() const { return rows_.data(); }

  private:
    void build_slot(unsigned map, unsigned opcode) {
        std::vector<u16> members;
        bool modrm = false, by_modrm = false;
        for (unsigned n = 0; n < kOpCount; ++n) {
            const OpInfo& info = op_info(static_cast<Op>(n));
            unsigned span = info.attrs & kOpcodeReg ? 8 : 1;
            if (static_cast<unsigned>(info.map) != map || opcode - info.opcode >= span) continue;
            members.push_back(static_cast<u16>(n));
            modrm |= info.ext.kind != OpExt::kNone;
            by_modrm |= info.ext.kind != OpExt::kNone && info.ext.kind != OpExt::kAny;
        }
        Slot& slot = slots_[map * 256 + opcode];
        if (members.empty()) return;
        auto rank = [](u16 n) {
            Mandatory prefix = op_info(static_cast<Op>(n)).prefix;
            if (prefix == Mandatory::PF2 || prefix == Mandatory::PF3) return 0;
            return prefix == Mandatory::P66 ? 1 : 2;
        };
        std::stable_sort(members.begin(), members.end(),
                         [&](u16 a, u16 b) { return rank(a) < rank(b); });
        slot.exists = true;
        slot.has_modrm = modrm;
        slot.by_modrm = by_modrm;
        slot.list = static_cast<u16>(lists_.size());
        for (u8 n = 0; n < (by_modrm ? 16 : 1); ++n) {
            List list{static_cast<u16>(rows_.size()), 0};
            for (u16 member : members) {
                const OpInfo& info = op_info(static_cast<Op>(member));
                if (by_modrm && !ext_accepts(info.ext, n & 8, n & 7)) continue;
                rows_.push_back(make_row(info, member));
                ++list.count;
            }
            lists_.push_back(list);
        }
    }

    std::array<Slot, kMaps * 256> slots_{};
    std::vector<List> lists_;
    std::vector<Row> rows_;
};

const Tables& tables() {
    static const Tables instance;
    return instance;
}

enum ByteClass : u8 { kOther, kSeg, kOpsize, kAddrsize, kLock, kRepne, kRep, kRex };

constexpr std::array<u8, 256> kByteClass = [] {
    std::array<u8, 256> table{};
    for (u8 seg : {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65}) table[seg] = kSeg;
    table[0x66] = kOpsize;
    table[0x67] = kAddrsize;
    table[0xf0] = kLock;
    table[0xf2] = kRepne;
    table[0xf3] = kRep;
    for (unsigned rex = 0x40; rex < 0x50; ++rex) table[rex] = kRex;
    return table;
}();

/// The bytes of one instruction: never reads beyond what was given, nor beyond 15.
class Cursor {
  public:
    Cursor(std::span<const u8> bytes)
        : begin_(bytes.data()),
          at_(bytes.data()),
          end_(bytes.data() + std::min<size_t>(bytes.size(), kMaxLength)),
          whole_(bytes.size() >= kMaxLength) {}

    bool byte(u8& value) {
        if (PV_UNLIKELY(at_ == end_)) return false;
        value = *at_++;
        return true;
    }
    bool peek(u8& value) const {
        if (PV_UNLIKELY(at_ == end_)) return false;
        value = *at_;
        return true;
    }
    /// `size` bytes, little endian, zero extended.
    bool number(unsigned size, u64& value) {
        if (PV_UNLIKELY(static_cast<size_t>(end_ - at_) < size)) {
            at_ = end_;
            return false;
        }
        value = 0;
        for (unsigned n = 0; n < size; ++n) value |= u64{at_[n]} << (8 * n);
        at_ += size;
        return true;
    }
    u8 length() const { return static_cast<u8>(at_ - begin_); }
    DecodeStatus ran_out() const {
        return whole_ ? DecodeStatus::kTooLong : DecodeStatus::kTruncated;
    }

  private:
    const u8* begin_;
    const u8* at_;
    const u8* end_;
    bool whole_;
};

constexpr u8 kNoOverride = 0xff;

struct Decoding {
    Cursor cursor;
    CodeSize size;
    Insn& insn;
    u8 rex = 0;  ///< or, with VEX: its R, X, B in REX's positions
    bool w = false;
    u8 override_ = kNoOverride;
    u8 vex_vvvv = 15;    ///< as 15 - the register
    u8 simd_prefix = 0;  ///< 0 none, 1 66, 2 F3, 3 F2
    Map map = Map::One;

    bool long64() const { return size == CodeSize::k64; }
};

bool prefixes(Decoding& d) {
    static constexpr u8 kSegmentOf[] = {kEs, kCs, kSs, kDs};
    u8 rex = 0;
    for (;;) {
        u8 byte;
        if (!d.cursor.peek(byte)) return false;
        u8 kind = kByteClass[byte];
        if (PV_LIKELY(kind == kOther) || (kind == kRex && !d.long64())) break;
        u8 skipped;
        (void)d.cursor.byte(skipped);
        if (kind == kRex) {
            rex = byte;
            continue;
        }
        rex = 0;  // REX counts only directly before the opcode
        switch (kind) {
            case kSeg:
                d.insn.prefixes |= kPrefixSegment;
                if (byte >= 0x64) {
                    d.override_ = byte == 0x64 ? kFs : kGs;
                } else if (!d.long64()) {
                    d.override_ = kSegmentOf[(byte >> 3) & 3];
                }
                break;
            case kOpsize:
                d.insn.prefixes |= kPrefixOpsize;
                break;
            case kAddrsize:
                d.insn.prefixes |= kPrefixAddrsize;
                break;
            case kLock:
                d.insn.prefixes |= kPrefixLock;
                break;
            case kRepne:
                d.insn.prefixes = (d.insn.prefixes & ~kPrefixRep) | kPrefixRepne;
                break;
            default:
                d.insn.prefixes = (d.insn.prefixes & ~kPrefixRepne) | kPrefixRep;
                break;
        }
    }
    if (rex) {
        d.insn.prefixes |= kPrefixRex;
        d.rex = rex;
        d.w = rex & 8;
    }
    if (d.insn.prefixes & kPrefixRep) {
        d.simd_prefix = 2;
    } else if (d.insn.prefixes & kPrefixRepne) {
        d.simd_prefix = 3;
    } else if (d.insn.prefixes & kPrefixOpsize) {
        d.simd_prefix = 1;
    }
    return true;
}

/// After C4 or C5 that is a VEX prefix. Leaves the cursor at the opcode.
DecodeStatus vex_prefix(Decoding& d, bool three) {
    constexpr u8 kForbidden = kPrefixLock | kPrefixRep | kPrefixRepne | kPrefixOpsize | kPrefixRex;
    u8 first, last;
    if (!d.cursor.byte(first)) return d.cursor.ran_out();
    u8 map = 1;
    u8 r = !(first & 0x80), x = 0, b = 0;
    if (three) {
        x = !(first & 0x40);
        b = !(first & 0x20);
        map = first & 0x1f;
        if (!d.cursor.byte(last)) return d.cursor.ran_out();
        d.w = last & 0x80;
    } else {
        last = first;
        d.w = false;
    }
    if (d.insn.prefixes & kForbidden) return DecodeStatus::kUndefined;
    if (map < 1 || map > 3) return DecodeStatus::kUndefined;
    d.map = static_cast<Map>(static_cast<u8>(Map::V0F) + map - 1);
    if (d.long64()) {
        d.rex = static_cast<u8>(r << 2 | x << 1 | b);
    } else {
        d.rex = 0;
    }
    d.insn.prefixes |= kPrefixVex;
    d.vex_vvvv = (last >> 3) & 15;
    d.insn.vvvv = (15 - d.vex_vvvv) & (d.long64() ? 15 : 7);
    d.insn.vex_l = (last >> 2) & 1;
    static constexpr u8 kPp[] = {0, 1, 2, 3};
    d.simd_prefix = kPp[last & 3];
    return DecodeStatus::kOk;
}

DecodeStatus opcode(Decoding& d) {
    u8 byte;
    if (!d.cursor.byte(byte)) return d.cursor.ran_out();
    if (byte == 0x0f) {
        if (!d.cursor.byte(byte)) return d.cursor.ran_out();
        if (byte == 0x38 || byte == 0x3a) {
            d.map = byte == 0x38 ? Map::M0F38 : Map::M0F3A;
            if (!d.cursor.byte(byte)) return d.cursor.ran_out();
        } else {
            d.map = Map::M0F;
        }
    } else if ((byte & 0xfe) == 0xc4) {
        bool vex = d.long64();
        if (!vex) {  // LES and LDS, which have no register form
            u8 next;
            if (!d.cursor.peek(next)) return d.cursor.ran_out();
            vex = next >= 0xc0;
        }
        if (vex) {
            DecodeStatus status = vex_prefix(d, byte == 0xc4);
            if (status != DecodeStatus::kOk) return status;
            if (!d.cursor.byte(byte)) return d.cursor.ran_out();
        }
    } else if ((byte & 0xf8) == 0xd8) {
        d.map = Map::X87;
    }
    d.insn.opcode = byte;
    return DecodeStatus::kOk;
}

const Row* choose(const Decoding& d, const Slot& slot, const FeatureSet& features) {
    const Tables& t = tables();
    unsigned n = slot.list;
    if (slot.by_modrm) n += (d.insn.modrm >= 0xc0 ? 8 : 0) | ((d.insn.modrm >> 3) & 7);
    List list = t.list(n);
    u32 common = (1u << d.simd_prefix) | (kSit16 << static_cast<u8>(d.size)) |
                 (d.insn.vex_l ? kSitL1 : kSitL0) | (d.vex_vvvv == 15 ? kSitNoVvvv : kSitVvvv) |
                 (d.rex & 1 ? kSitRexB : kSitNoRexB);
    u32 situation = common | (d.w ? kSitW1 : kSitW0);
    u32 without_w = d.long64() ? situation : common | kSitW0;
    const Row* row = t.rows() + list.first;
    for (const Row* end = row + list.count; row != end; ++row) {
        u32 here = row->flags & kRowWIgnored ? without_w : situation;
        if ((row->allowed & here) != here) continue;
        if (PV_UNLIKELY(row->full) && row->full_modrm != d.insn.modrm) continue;
        if (PV_UNLIKELY(!features.has(row->feature))) continue;
        return row;
    }
    return nullptr;
}

void operand_size(Decoding& d, const Row& row) {
    Insn& i = d.insn;
    // 66 that selects the row is no operand-size prefix any more.
    bool prefix66 = (i.prefixes & kPrefixOpsize) && row.prefix != Mandatory::P66;
    if (i.prefixes & kPrefixVex) {
        i.opsize = d.w && d.long64() ? 8 : 4;
    } else if (d.long64()) {
        if (d.w || (row.attrs & kForce64)) {
            i.opsize = 8;
        } else if (prefix66) {
            i.opsize = 2;
        } else {
            i.opsize = row.attrs & kDef64 ? 8 : 4;
        }
    } else if (row.prefix == Mandatory::P66) {
        i.opsize = 4;
    } else {
        i.opsize = (d.size == CodeSize::k16) != prefix66 ? 2 : 4;
    }
    if (PV_UNLIKELY(row.flags & kRowSize)) {
        if ((row.flags & kRowNo8) && i.opsize == 8) i.opsize = 4;
        if ((row.flags & kRowNo2) && !d.long64()) i.opsize = 4;
    }
    i.rex_w = d.w && (d.long64() || !(row.flags & kRowWIgnored));
}

/// Register numbers that do not follow the rule, and those that do not exist.
bool special_registers(Decoding& d, const Row& row) {
    Insn& i = d.insn;
    if (row.flags & kRowModIgnored) i.mod = 3;
    if (row.flags & (kRowMmxReg | kRowSreg)) i.reg &= 7;
    if ((row.flags & kRowMmxRm) && i.mod == 3) i.rm &= 7;
    if ((row.flags & kRowSreg) && i.reg >= kSegmentCount) return false;
    if ((row.flags & kRowLoadsSreg) && i.reg == kCs) return false;
    if ((row.flags & kRowCr) && !((0x11d >> i.reg) & 1)) return false;  // CR0, 2, 3, 4, 8
    if ((row.flags & kRowDr) && i.reg >= 8) return false;
    return true;
}

DecodeStatus memory16(Decoding& d) {
    static constexpr u8 kBase[] = {kRbx, kRbx, kRbp, kRbp, kRsi, kRdi, kRbp, kRbx};
    static constexpr u8 kIndex[] = {kRsi, kRdi, kRsi, kRdi, kNoReg, kNoReg, kNoReg, kNoReg};
    Insn& i = d.insn;
    u8 rm = i.modrm & 7;
    u64 disp;
    if (i.mod == 0 && rm == 6) {
        if (!d.cursor.number(2, disp)) return d.cursor.ran_out();
        i.disp = sign_extend(disp, 16);
        return DecodeStatus::kOk;
    }
    i.base = kBase[rm];
    i.index = kIndex[rm];
    if (i.base == kRbp) i.segment = kSs;
    if (i.mod) {
        if (!d.cursor.number(i.mod, disp)) return d.cursor.ran_out();
        i.disp = sign_extend(disp, i.mod * 8);
    }
    return DecodeStatus::kOk;
}

DecodeStatus memory(Decoding& d, const Row& row) {
    Insn& i = d.insn;
    i.has_mem = true;
    if (PV_UNLIKELY(i.addrsize == 2)) {
        if (row.flags & kRowVsib) return DecodeStatus::kUndefined;
        return memory16(d);
    }
    u8 rm = i.modrm & 7;
    unsigned disp_size = i.mod == 2 ? 4 : i.mod;
    if (rm == 4) {
        u8 sib;
        if (!d.cursor.byte(sib)) return d.cursor.ran_out();
        i.scale = sib >> 6;
        u8 index = ((sib >> 3) & 7) | (d.rex & 2) << 2;
        if (index != 4 || (row.flags & kRowVsib)) i.index = index;
        // Gathers: destination, index and mask must be three registers.
        if (PV_UNLIKELY(row.flags & kRowVsib) &&
            (i.index == i.reg || i.index == i.vvvv || i.reg == i.vvvv)) {
            return DecodeStatus::kUndefined;
        }
        rm = sib & 7;
        if (rm == 5 && i.mod == 0) {
            disp_size = 4;
        } else {
            i.base = rm | (d.rex & 1) << 3;
        }
    } else if (PV_UNLIKELY(row.flags & kRowVsib)) {
        return DecodeStatus::kUndefined;
    } else if (rm == 5 && i.mod == 0) {
        disp_size = 4;
        if (d.long64()) i.base = kRipReg;
    } else {
        i.base = rm | (d.rex & 1) << 3;
    }
    if (i.base == kRsp || i.base == kRbp) i.segment = kSs;
    if (disp_size) {
        u64 disp;
        if (!d.cursor.number(disp_size, disp)) return d.cursor.ran_out();
        i.disp = sign_extend(disp, disp_size * 8);
    }
    return DecodeStatus::kOk;
}

bool immediate(Decoding& d, Immediate kind, u64& into) {
    Insn& i = d.insn;
    u64 value = 0;
    bool ok = true;
    switch (kind) {
        case Immediate::kNone:
            break;
        case Immediate::kByte:
            ok = d.cursor.number(1, into);
            break;
        case Immediate::kSignedByte:
            ok = d.cursor.number(1, value);
            into = static_cast<u64>(sign_extend(value, 8));
            break;
        case Immediate::kWord:
            ok = d.cursor.number(2, into);
            break;
        case Immediate::kZ: {
            unsigned size = i.opsize == 2 ? 2 : 4;
            ok = d.cursor.number(size, value);
            into = static_cast<u64>(sign_extend(value, size * 8));
            break;
        }
        case Immediate::kV:
            ok = d.cursor.number(i.opsize, into);
            break;
        case Immediate::kFar:
            ok = d.cursor.number(i.opsize == 2 ? 2 : 4, into) && d.cursor.number(2, i.imm2);
            break;
        case Immediate::kMoffs:
            ok = d.cursor.number(i.addrsize, value);
            i.disp = static_cast<s64>(value);
            i.has_mem = true;
            break;
    }
    return ok;
}

DecodeStatus body(Decoding& d, const FeatureSet& features) {
    Insn& i = d.insn;
    if (!prefixes(d)) return d.cursor.ran_out();
    DecodeStatus status = opcode(d);
    if (PV_UNLIKELY(status != DecodeStatus::kOk)) return status;

    const Slot& slot = tables().slot(d.map, i.opcode);
    if (PV_UNLIKELY(!slot.exists)) return DecodeStatus::kUndefined;
    if (slot.has_modrm) {
        if (!d.cursor.byte(i.modrm)) return d.cursor.ran_out();
        i.has_modrm = true;
        i.mod = i.modrm >> 6;
        i.reg = ((i.modrm >> 3) & 7) | (d.rex & 4) << 1;
        i.rm = (i.modrm & 7) | (d.rex & 1) << 3;
    } else {
        i.rm = (i.opcode & 7) | (d.rex & 1) << 3;
    }
    const Row* row = choose(d, slot, features);
    if (PV_UNLIKELY(!row)) return DecodeStatus::kUndefined;
    i.op = static_cast<Op>(row->op);
    operand_size(d, *row);
    if (PV_UNLIKELY(row->flags & kRowSpecial) && !special_registers(d, *row)) {
        return DecodeStatus::kUndefined;
    }
    if (PV_UNLIKELY(i.prefixes & kPrefixLock) && !((row->attrs & kLockable) && i.mod != 3)) {
        return DecodeStatus::kUndefined;
    }
    if (PV_UNLIKELY(i.prefixes & kPrefixAddrsize)) {
        i.addrsize = d.size == CodeSize::k32 ? 2 : 4;
    } else {
        i.addrsize = 2 << static_cast<u8>(d.size);
    }
    i.segment = kDs;
    if (i.mod != 3) {
        status = memory(d, *row);
        if (PV_UNLIKELY(status != DecodeStatus::kOk)) return status;
    }
    if (d.override_ != kNoOverride) i.segment = d.override_;
    if (row->imm != Immediate::kNone) {
        if (!immediate(d, row->imm, i.imm)) return d.cursor.ran_out();
        if ((row->flags & kRowImmReg) && !d.long64()) i.imm &= 0x7f;  // eight registers
        if (row->imm2 != Immediate::kNone && !immediate(d, row->imm2, i.imm2))
            return d.cursor.ran_out();
    }
    return DecodeStatus::kOk;
}

}  // namespace

DecodeStatus decode(std::span<const u8> bytes, CodeSize size, const FeatureSet& features,
                    Insn& insn) {
    insn = Insn{};
    Decoding d{Cursor(bytes), size, insn};
    DecodeStatus status = body(d, features);
    insn.length = d.cursor.length();
    return status;
}

}  // namespace polyvisor::soft
