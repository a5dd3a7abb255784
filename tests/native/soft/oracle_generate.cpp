// How cases are made: a random form of the row is encoded and decoded again; registers get values
// that tend to be interesting; then those that form an address are changed so that it falls where
// it should: mostly into the data pages, but also across their edges, into the page that can only
// be read, and where nothing is mapped. Instructions with needs of their own (a divisor that fits,
// a count that ends, an image that can be loaded) are looked after at the end.
#include "oracle_generate.hpp"

#include <cstring>

#include "row_encoder.hpp"
#include "soft/frame.hpp"

namespace pvtest {

using namespace polyvisor;
using namespace polyvisor::soft;

namespace {

bool starts_with(std::string_view text, std::string_view with) {
    return text.starts_with(with);
}

bool has(const OpInfo& row, Operand wanted) {
    for (Operand operand : row.operands) {
        if (operand == wanted) return true;
    }
    return false;
}

u64 random_integer(Random& random) {
    switch (random.below(8)) {
        case 0:
            return random.below(65);
        case 1:
            return static_cast<u64>(random.between(-64, 64));
        case 2: {
            u64 boundary = bit(random.pick<unsigned>({7, 8, 15, 16, 31, 32, 63}));
            return boundary + static_cast<u64>(random.between(-1, 1));
        }
        case 3:
            return static_cast<u32>(random.next());
        case 4:
            return random.next() & random.next() & random.next();
        case 5:
            return random.next() | random.next() | random.next();
        default:
            return random.next();
    }
}

float random_float(Random& random) {
    u32 bits = static_cast<u32>(random.next());
    switch (random.below(10)) {
        case 0:
            bits &= 0x80000000;
            break;  // zeros
        case 1:
            bits = (bits & 0x80000000) | 0x7f800000;
            break;  // infinities
        case 2:
            bits |= 0x7f800000;
            break;  // NaN
        case 3:
            bits &= 0x807fffff;
            break;  // denormal
        case 4:
            return static_cast<float>(random.between(-1000, 1000));
        case 5:
            return static_cast<float>(random.between(-1000000, 1000000)) / 256.0f;
        case 6:
            break;
        default:
            bits = (bits & 0x807fffff) | (96 + random.below(64)) << 23;
            break;
    }
    return std::bit_cast<float>(bits);
}

double random_double(Random& random) {
    u64 bits = random.next();
    switch (random.below(10)) {
        case 0:
            bits &= bit(63);
            break;
        case 1:
            bits = (bits & bit(63)) | u64{0x7ff} << 52;
            break;
        case 2:
            bits |= u64{0x7ff} << 52;
            break;
        case 3:
            bits &= ~(u64{0x7ff} << 52);
            break;
        case 4:
            return random.between(-1000, 1000);
        case 5:
            return random.between(-1000000, 1000000) / 4096.0;
        case 6:
            break;
        default:
            bits = (bits & ~(u64{0x7ff} << 52)) | u64{960 + random.below(128)} << 52;
            break;
    }
    return std::bit_cast<double>(bits);
}

/// 16 bytes of one kind: integers, floats or doubles.
void random_vector(Random& random, u8* into) {
    unsigned kind = random.below(5);
    for (unsigned n = 0; n < 16; n += 8) {
        if (kind == 0) {
            double value = random_double(random);
            std::memcpy(into + n, &value, 8);
        } else if (kind == 1) {
            float values[2] = {random_float(random), random_float(random)};
            std::memcpy(into + n, values, 8);
        } else {
            u64 value = kind == 2 ? random_integer(random) : random.next();
            std::memcpy(into + n, &value, 8);
        }
    }
}

/// An extended-precision value, mostly of a kind that arithmetic makes.
void random_extended(Random& random, u8* into) {
    u64 mantissa = random.next() | bit(63);
    u16 sign = random.one_in(2) ? 0x8000 : 0,
        exponent = static_cast<u16>(0x3fff + random.between(-40, 40));
    switch (random.below(12)) {
        case 0:
            mantissa = 0, exponent = 0;
            break;
        case 1:
            mantissa = bit(63), exponent = 0x7fff;
            break;
        case 2:
            exponent = 0x7fff;
            break;
        case 3:
            mantissa &= ~bit(63), exponent = 0;
            break;
        case 4:
            exponent = static_cast<u16>(random.next() & 0x7fff);
            break;
        case 5:
            mantissa = random.next(), exponent = static_cast<u16>(random.next() & 0x7fff);
            break;
        case 6:
        case 7: {
            u64 integer = random.below(1 << 20) + 1;
            unsigned shift = static_cast<unsigned>(std::countl_zero(integer));
            mantissa = integer << shift;
            exponent = static_cast<u16>(0x3fff + 63 - shift);
            break;
        }
        default:
            break;
    }
    exponent |= sign;
    std::memcpy(into, &mantissa, 8);
    std::memcpy(into + 8, &exponent, 2);
}

void random_fpu(Random& random, UserState& s, const OpInfo& row) {
    auto put16 = [&](unsigned at, u16 value) { std::memcpy(s.legacy + at, &value, 2); };
    u16 control = static_cast<u16>(0x7f | random.pick<u16>({0, 0x200, 0x300, 0x300, 0x300}) |
                                   random.below(4) << 10);
    if (random.one_in(10)) control &= ~static_cast<u16>(random.below(64));
    u16 status = static_cast<u16>(random.below(8) << 11 | (random.next() & 0x4700));
    if (random.one_in(6)) status |= random.below(128);
    // ES and B say whether an unmasked exception is pending.
    status &= 0x7f7f;
    if (status & ~control & 0x3f) status |= 0x8080;
    put16(kFcwAt, control);
    put16(kFswAt, status);
    s.legacy[kFtwAt] = random.one_in(3) ? static_cast<u8>(random.next()) : 0xff;
    // MMX code runs with the top of the stack anywhere; registers hold integers.
    for (unsigned n = 0; n < 8; ++n) {
        u8* at = s.legacy + kStAt + n * 16;
        random_extended(random, at);
        if (row.attrs & kMmx) random_vector(random, at), at[8] = at[9] = 0xff;
        std::memset(at + 10, 0, 6);
    }
    u32 mxcsr = 0x1f80 | (random.below(4) << 13);
    if (random.one_in(4)) mxcsr |= 1 << 15;
    if (random.one_in(4)) mxcsr |= 1 << 6;
    if (random.one_in(3)) mxcsr |= random.below(64);
    // Underflow stays masked: unmasked it is signalled for exact results as well, which the
    // interpreter, that runs with everything masked, cannot see.
    if (random.one_in(10)) mxcsr &= ~((random.below(64) & 0x2f) << 7);
    std::memcpy(s.legacy + kMxcsrAt, &mxcsr, 4);
    u32 mask = 0xffff;
    std::memcpy(s.legacy + kMxcsrMaskAt, &mask, 4);
    for (unsigned n = 0; n < 16; ++n) {
        random_vector(random, s.legacy + kXmmAt + n * 16);
        random_vector(random, s.ymm_high[n]);
    }
}

/// Where an access of `size` bytes goes.
u64 choose_address(Random& random, unsigned size, u64 alignment) {
    if (size == 0) size = 16;
    u64 limit = kWritableSize - size;
    auto inside = [&] { return kDataBase + random.below(static_cast<u32>(limit + 1)); };
    switch (random.below(24)) {
        case 0:
            return kDataBase + 4096 - random.below(size + 1);  // two pages, both mapped
        case 1:
            return kDataBase + 4096 - size;  // up to a page's end
        case 2:
            return align_down(kDataBase + kWritableSize - random.below(size + 1),
                              random.one_in(2) ? 1 : alignment);
        case 3:
            return kDataBase + kDataSize - random.below(size + 1);  // into the hole behind
        case 4:
            return kDataBase - random.below(size + 1);  // out of the hole before
        case 5:
            return kDataBase + kWritableSize + random.below(4000);  // can only be read
        case 6:
            return random.one_in(2) ? kDataBase + 0x100000 + random.below(4096)
                                    : random_integer(random);
        case 7:
        case 8:
            return inside();
        default:
            return align_down(inside(), alignment);
    }
}

void random_data(Random& random, Case& c) {
    unsigned kind = random.below(4);
    u64 pattern = random_integer(random);
    for (unsigned at = 0; at < kDataSize; at += 16) {
        u8* to = c.data.data() + at;
        if (kind == 0) {
            random_vector(random, to);
        } else if (kind == 1) {
            std::memcpy(to, &pattern, 8);
            std::memcpy(to + 8, &pattern, 8);
        } else {
            u64 values[2] = {random.next(), kind == 2 ? random.next() : random_integer(random)};
            std::memcpy(to, values, 16);
        }
    }
    if (kind == 1) {  // strings that are equal for a while
        std::memset(c.data.data(), static_cast<u8>(pattern), kDataSize);
        for (unsigned n = 0; n < 40; ++n) c.data[random.below(kDataSize)] ^= 1;
    }
}

u8* data_at(Case& c, u64 address, unsigned size) {
    if (address < kDataBase || address - kDataBase > kDataSize - size) return nullptr;
    return c.data.data() + (address - kDataBase);
}

u64 address_mask(const Insn& i) {
    return i.addrsize == 8 ? ~u64{0} : i.addrsize == 4 ? 0xffffffff : 0xffff;
}

u64 segment_base(const Case& c) {
    if (c.insn.segment == kCs) return c.code_base;
    if (c.insn.segment < kFs) return c.data_base;
    if (c.size != CodeSize::k64) return 0;
    return c.insn.segment == kFs ? c.before.fs_base : c.insn.segment == kGs ? c.before.gs_base : 0;
}

u64 effective(const Case& c) {
    const Insn& i = c.insn;
    u64 address = static_cast<u64>(i.disp);
    if (i.base == kRipReg) {
        address += c.code_address + i.length;
    } else if (i.base != kNoReg) {
        address += c.before.gpr[i.base];
    }
    if (i.index != kNoReg && !has(op_info(c.op), Operand::VMx))
        address += c.before.gpr[i.index] << i.scale;
    return (address & address_mask(i)) + segment_base(c);
}

/// Changes the base register, or the displacement, so that the ModRM operand is at `target`.
void aim(Random& random, Case& c, const Encoded& encoded, u64 target) {
    Insn& i = c.insn;
    UserState& s = c.before;
    bool vsib = has(op_info(c.op), Operand::VMx);
    u64 offset = target - segment_base(c);
    bool indexed = i.index != kNoReg && !vsib;
    if (i.addrsize == 2 && c.size == CodeSize::k16) {
        if (encoded.disp16_at != 0) {
            auto low = static_cast<s16>(offset);
            std::memcpy(c.code + encoded.disp16_at, &low, 2);
            i.disp = low;
            return;
        }
        u64 value = offset - static_cast<u64>(i.disp) - (i.index == kNoReg ? 0 : s.gpr[i.index]);
        s.gpr[i.base] = (s.gpr[i.base] & ~u64{0xffff}) | (value & 0xffff);
        return;
    }
    if (i.base < 16) {
        if (indexed && i.index == i.base) {  // base * (1 + scale)
            s.gpr[i.base] = (offset - static_cast<u64>(i.disp)) / (1 + (u64{1} << i.scale));
            return;
        }
        if (indexed && random.one_in(2)) s.gpr[i.index] = random_integer(random);
        u64 index = indexed ? s.gpr[i.index] << i.scale : 0;
        u64 value = offset - static_cast<u64>(i.disp) - index;
        if (i.addrsize == 4 && c.size == CodeSize::k64 && random.one_in(2))
            value ^= random.next() << 32;
        s.gpr[i.base] = value;
    } else if (encoded.disp_at != 0) {
        if (indexed) s.gpr[i.index] = random.below(256);
        u64 disp = offset - (indexed ? s.gpr[i.index] << i.scale : 0);
        if (i.base == kRipReg) disp -= c.code_address + i.length;
        auto low = static_cast<s32>(disp);
        std::memcpy(c.code + encoded.disp_at, &low, 4);
        i.disp = low;
    }
}

/// Indices of a gather, so that most elements are mapped.
void aim_gather(Random& random, Case& c) {
    u8* low = c.before.legacy + kXmmAt + c.insn.index * 16;
    u8* high = c.before.ymm_high[c.insn.index];
    bool wide = op_info(c.op).mnemonic.find("gatherq") != std::string_view::npos;
    for (unsigned n = 0; n < 8; ++n) {
        u8* at = n < 4 ? low + n * 4 : high + (n - 4) * 4;
        s32 value = random.between(-300, 300);
        if (wide && n % 2) {
            std::memcpy(&value, at - 4, 4);
            value >>= 31;
        }
        std::memcpy(at, &value, 4);
    }
}

// Rows that reach memory through a register that no operand names.
void aim_implicit(Random& random, Case& c) {
    const OpInfo& row = op_info(c.op);
    UserState& s = c.before;
    std::string_view m = row.mnemonic;
    // The stack is somewhere in the writable pages, with room on both sides, or now and then not.
    // An offset in a 16-bit segment has 16 bits; what stands above them does not count.
    bool small = c.size == CodeSize::k16;
    auto offset16 = [&](u64 offset) {
        return small ? (offset & 0xffff) | static_cast<u32>(random.next() << 16) : offset;
    };
    auto offset_in = [&](u64 address, u64 base) {
        return c.insn.addrsize == 2 ? offset16(address - base) : address - base;
    };
    s.gpr[kRsp] = offset16(
        (random.one_in(8) ? choose_address(random, 8, 8) : kDataBase + 512 + random.below(7000)) -
        c.data_base);
    if (m == "enter" || m == "leave") {
        s.gpr[kRbp] = offset16(choose_address(random, 8, 8) - c.data_base);
    }
    if (m == "xlat") {
        s.gpr[kRbx] =
            offset_in(choose_address(random, 1, 1) - (s.gpr[kRax] & 0xff), segment_base(c));
    }
    if (m.find("maskmov") != std::string_view::npos) {
        s.gpr[kRdi] = offset_in(choose_address(random, 16, 1), segment_base(c));
    }
    if (row.attrs & kString) {
        unsigned size = memory_size(c.insn) ? memory_size(c.insn) : c.insn.opsize;
        bool repeat = c.insn.prefixes & (kPrefixRep | kPrefixRepne);
        u64 count = random.one_in(6) ? random.below(5000) : random.below(20);
        if (repeat) s.gpr[kRcx] = count;
        if (random.one_in(3)) s.rflags |= kFlagD;
        for (auto n : {kRsi, kRdi}) {
            s.gpr[n] = offset_in(choose_address(random, size, size),
                                 n == kRsi ? segment_base(c) : c.data_base);
        }
        if (c.insn.addrsize == 4 && c.size == CodeSize::k64 && random.one_in(2)) {
            for (auto n : {kRcx, kRsi, kRdi}) s.gpr[n] ^= random.next() << 32;
        }
    }
    if (m.starts_with("loop") || m == "jrcxz") {
        if (random.one_in(2)) s.gpr[kRcx] = random.below(3);
        if (random.one_in(8)) s.gpr[kRcx] |= random.next() << 32;
    }
}

u64 stack_address(const Case& c) {
    u64 rsp = c.before.gpr[kRsp];
    return c.size == CodeSize::k16 ? c.data_base + (rsp & 0xffff) : rsp;
}

// Makes outcomes likely that random values nearly never give.
void care(Random& random, Case& c) {
    const OpInfo& row = op_info(c.op);
    const Insn& i = c.insn;
    UserState& s = c.before;
    u8* memory = i.has_mem ? data_at(c, c.memory_address, 512) : nullptr;
    if (row.mnemonic == "div" || row.mnemonic == "idiv") {
        if (i.rm != kRdx || i.has_mem) {
            s.gpr[kRdx] = random.pick<u64>({0, 0, random.below(16), ~u64{0}, s.gpr[kRdx]});
        }
        if (row.operands[0] == Operand::Eb && random.one_in(2)) s.gpr[kRax] &= ~u64{0xf000};
    } else if (row.mnemonic == "cmpxchg" && random.one_in(2)) {
        if (!i.has_mem) {
            s.gpr[kRax] = s.gpr[i.rm];
        } else if (memory && i.base != kRax && i.index != kRax) {
            std::memcpy(&s.gpr[kRax], memory, 8);
        }
    } else if (starts_with(row.mnemonic, "cmpxchg") && memory && random.one_in(2)) {
        unsigned half = c.op == Op::CMPXCHG16B_Mdq ? 8 : 4;
        bool free = i.base != kRax && i.index != kRax && i.base != kRdx && i.index != kRdx;
        if (free) {
            std::memcpy(&s.gpr[kRax], memory, half);
            std::memcpy(&s.gpr[kRdx], memory + half, half);
        }
    } else if (starts_with(row.mnemonic, "bt") && i.has_mem && has(row, Operand::Gv)) {
        if (i.reg != i.base && i.reg != i.index) {
            s.gpr[i.reg] =
                (s.gpr[i.reg] & ~u64{0xffffffff}) | static_cast<u32>(random.between(-4000, 4000));
            if (i.opsize == 8) s.gpr[i.reg] = static_cast<u64>(random.between(-4000, 4000));
        }
    } else if (row.mnemonic == "ldmxcsr" || row.mnemonic == "vldmxcsr") {
        if (memory && !random.one_in(4)) memory[2] = memory[3] = 0;
    } else if (row.mnemonic == "fxrstor") {
        if (memory && !random.one_in(4)) memory[kMxcsrAt + 2] = memory[kMxcsrAt + 3] = 0;
    } else if (row.mnemonic == "bound" && memory && random.one_in(2)) {
        s32 low = static_cast<s32>(s.gpr[i.reg]) & ~0xff;
        u32 bounds[2] = {static_cast<u32>(low), static_cast<u32>(low) | 0xff};
        if (i.opsize == 4) std::memcpy(memory, bounds, 8);
    } else if (starts_with(row.mnemonic, "pcmp") || starts_with(row.mnemonic, "vpcmp")) {
        if (row.mnemonic.find("str") != std::string_view::npos) {
            s.gpr[kRax] = static_cast<u64>(random.between(-20, 20));
            s.gpr[kRdx] = static_cast<u64>(random.between(-20, 20));
        }
    } else if (starts_with(row.mnemonic, "wrfsbase") || starts_with(row.mnemonic, "wrgsbase")) {
        if (random.one_in(2)) s.gpr[i.rm] &= 0x7fffffffffff;
    } else if (row.mnemonic == "cvtpi2ps" && i.has_mem) {
        s.legacy[kFswAt] &=
            0x7f;  // whether a pending x87 exception counts then differs between CPUs
        s.legacy[kFswAt + 1] &= 0x7f;
        s.legacy[kFcwAt] |= 0x3f;
    } else if (row.mnemonic == "ret" || row.mnemonic == "jmp" || row.mnemonic == "call") {
        // Addresses that can be jumped to; the instruction there is not executed.
        u64 target = random.next() >> (random.one_in(8) ? 0 : 17);
        if (c.size == CodeSize::k16 && random.one_in(2)) target &= 0xffff;
        u8* top = data_at(c, stack_address(c), 8);
        if (row.mnemonic == "ret" && top) std::memcpy(top, &target, 8);
        if (memory && row.mnemonic != "ret") std::memcpy(memory, &target, 8);
        if (row.operands[0] == Operand::Ev && !i.has_mem) s.gpr[i.rm] = target;
    } else if (row.mnemonic == "popf") {
        // The trap flag would stop the host, not the instruction under test; NT and ID would stay
        // set in the child, where the tracer cannot clear them.
        if (u8* top = data_at(c, stack_address(c), 8)) {
            top[1] &= ~0x41;
            top[2] &= ~0x20;
        }
    }
}

}  // namespace

namespace {

/// Not so where memory is accessed in parts that CPUs choose as they like.
bool alignment_is_checked(const OpInfo& row) {
    for (Operand part : {Operand::M28, Operand::M94, Operand::M512, Operand::VMx, Operand::Ma}) {
        if (has(row, part)) return false;
    }
    return row.mnemonic.find("maskmov") == std::string_view::npos && row.mnemonic != "call";
}

}  // namespace

bool make_case(Op op, CodeSize size, const FeatureSet& features, u64 code_address, Random& random,
               Case& c) {
    const OpInfo& row = op_info(op);
    bool address_matters = can_be_memory(row) || (row.attrs & kString) || row.mnemonic == "xlat" ||
                           row.mnemonic.find("maskmov") != std::string_view::npos ||
                           starts_with(row.mnemonic, "loop") || row.mnemonic == "jrcxz";
    for (unsigned attempt = 0; attempt < 60; ++attempt) {
        Form form = random_form(row, size, random);
        if (address_matters && size != CodeSize::k16) {
            form.addrsize = random.one_in(size == CodeSize::k64 ? 12 : 40);
        }
        c.size = size;
        c.code_base = size == CodeSize::k16 ? align_down(code_address, kSegmentSize) : 0;
        c.data_base = size == CodeSize::k16 ? kData16Base : 0;
        if (address_matters && random.one_in(10)) {
            form.segment = random.pick<u8>({0x64, 0x65, 0x64, 0x65, 0x2e, 0x36, 0x3e, 0x26});
            if (size != CodeSize::k64 && form.segment >= 0x64) form.segment = 0x3e;
        }
        form.disp = has(row, Operand::Ob) || has(row, Operand::Ov)
                        ? static_cast<s64>(choose_address(random, 8, 8) - c.data_base)
                        : random.between(-128, 127);
        // CPUs of AMD and Intel differ: the interpreter ignores 66 there, as Intel's do.
        if (size == CodeSize::k64 && (row.attrs & kForce64) && (row.attrs & kEndsBlock))
            form.opsize = false;
        // AMD's take F2 and F3 before LOOPcc for the condition; nobody documents that.
        if (starts_with(row.mnemonic, "loop")) form.repeat = 0;
        if (form.disp_size == 4) form.disp = static_cast<s32>(random.next());
        Encoded encoded = encode(row, form, random);
        c.op = op;
        c.code_address = code_address;
        std::memcpy(c.code, encoded.bytes, sizeof c.code);
        if (row.mnemonic == "enter" && c.code[encoded.opcode_end + 1] > 8)
            continue;  // a frame that fits
        if (decode({c.code, sizeof c.code}, size, features, c.insn) != DecodeStatus::kOk) continue;
        if (c.insn.op != op) continue;

        UserState& s = c.before;
        s = {};
        for (u64& value : s.gpr) value = random_integer(random);
        if (size != CodeSize::k64) {
            for (u64& value : s.gpr) value = static_cast<u32>(value);
            for (unsigned n = 8; n < 16; ++n) s.gpr[n] = 0;
        }
        s.rip = code_address - c.code_base;
        s.rflags = 2 | (random.next() & (kFlagStatus));
        if (random.one_in(16)) s.rflags |= kFlagD;
        if (random.one_in(40) && alignment_is_checked(row)) s.rflags |= kFlagAc;
        if (size == CodeSize::k64) {
            s.fs_base = random.one_in(2) ? random.below(1 << 20) : random.next() & 0x7fffffff0000;
            s.gs_base = random.one_in(2) ? random.below(1 << 20) : random.next() & 0x7fffffff0000;
        }
        random_fpu(random, s, row);
        random_data(random, c);
        aim_implicit(random, c);
        if (c.insn.has_mem && c.insn.has_modrm) {
            unsigned bytes = memory_size(c.insn);
            u64 alignment = bytes == 0 ? 1 : std::bit_floor(u64{bytes > 64 ? 16 : bytes});
            u64 target = choose_address(random, bytes, alignment);
            if (size == CodeSize::k16 && random.one_in(16)) {  // over the end of the segment
                target = kData16Base + kSegmentSize - random.below(bytes + 1);
            }
            // Locked accesses that are not aligned may be slow, or trapped, on the host.
            if (c.insn.prefixes & kPrefixLock || starts_with(row.mnemonic, "xchg"))
                target = align_down(target, alignment);
            aim(random, c, encoded, target);
            if (has(row, Operand::VMx)) aim_gather(random, c);
        }
        if (size != CodeSize::k64) {
            for (u64& value : s.gpr) value = static_cast<u32>(value);
        }
        c.memory_address = c.insn.has_mem ? effective(c) : 0;
        care(random, c);
        if (size != CodeSize::k64) {
            for (u64& value : s.gpr) value = static_cast<u32>(value);
        }
        c.memory_address = c.insn.has_mem ? effective(c) : 0;
        // The offset in FS or GS is canonical too: AMD's CPUs look at that before they add the
        // base.
        if (size == CodeSize::k64 && c.insn.has_mem) {
            u64 offset = c.memory_address - segment_base(c);
            if (static_cast<u64>(sign_extend(offset, 48)) != offset && segment_base(c) != 0)
                continue;
        }
        // SHA with memory that is not aligned is #GP on Intel's CPUs and done on AMD's.
        if (row.feature == Feature::kSha && c.memory_address % 16 != 0) continue;
        return true;
    }
    return false;
}

}  // namespace pvtest
