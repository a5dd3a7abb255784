// Every row of the instruction table can be reached: bytes made from the row decode to that row, in
// every code size and operand form that it has. A row that another one shadows fails here.
#include <vector>

#include "check.hpp"
#include "row_encoder.hpp"

namespace {

using namespace polyvisor;
using namespace polyvisor::soft;
using pvtest::can_be_memory;
using pvtest::can_be_register;

const char* const kSizeNames[] = {"16-bit", "32-bit", "64-bit"};

FeatureSet all_features() {
    FeatureSet features;
    for (unsigned n = 0; n < static_cast<unsigned>(Feature::kCount); ++n) {
        features.set(static_cast<Feature>(n));
    }
    return features;
}

/// How many of `count` random encodings of the row decode to it.
unsigned hits(Op op, CodeSize size, bool memory, unsigned count, pvtest::Random& random) {
    const OpInfo& row = op_info(op);
    FeatureSet features = all_features();
    unsigned found = 0;
    for (unsigned n = 0; n < count; ++n) {
        pvtest::Form form = random_form(row, size, random);
        if (form.memory != memory) continue;
        pvtest::Encoded encoded = encode(row, form, random);
        Insn insn;
        if (decode(encoded.bytes, size, features, insn) != DecodeStatus::kOk || insn.op != op)
            continue;
        ++found;
        bool moffs = false;
        for (Operand operand : row.operands)
            moffs |= operand == Operand::Ob || operand == Operand::Ov;
        CHECK_EQ(insn.has_mem, memory || moffs);
        CHECK(insn.length >= encoded.opcode_end);
        if (memory && insn.addrsize != 2) {
            CHECK_EQ(+insn.base, +form.base);
            CHECK_EQ(+insn.index, +form.index);
        }
        if (pvtest::failures > 20) return found;
    }
    return found;
}

void reachable() {
    pvtest::Random random(pvtest::environment_number("POLYVISOR_TEST_SEED", 1));
    for (unsigned n = 0; n < kOpCount; ++n) {
        auto op = static_cast<Op>(n);
        const OpInfo& row = op_info(op);
        for (unsigned s = 0; s < 3; ++s) {
            auto size = static_cast<CodeSize>(s);
            if ((row.attrs & kNo64) && size == CodeSize::k64) continue;
            if ((row.attrs & kOnly64) && size != CodeSize::k64) continue;
            // W is not encodable for legacy rows outside 64-bit mode, and means nothing to VMOVQ
            // and its like there: the row with W 0 is taken.
            if ((row.attrs & kW1) && size != CodeSize::k64) continue;
            for (bool memory : {false, true}) {
                if (memory ? !can_be_memory(row) : !can_be_register(row)) continue;
                ++pvtest::checks;
                if (hits(op, size, memory, 40, random) == 0) {
                    pvtest::fail(__FILE__, __LINE__,
                                 std::string(row.id) + (memory ? " (memory)" : "") +
                                     " is never decoded in " + kSizeNames[s] + " code");
                }
            }
        }
    }
}

/// What the table itself must keep to.
void consistent() {
#define PV_OP(row, ...) CHECK(op_info(Op::row).id == #row);
#include "soft/optab_int.inc"
#include "soft/optab_simd.inc"
#include "soft/optab_x87.inc"
#undef PV_OP
    for (unsigned n = 0; n < kOpCount; ++n) {
        const OpInfo& row = op_info(static_cast<Op>(n));
        auto expect = [&](bool good, const char* what) {
            ++pvtest::checks;
            if (!good) pvtest::fail(__FILE__, __LINE__, std::string(row.id) + ": " + what);
        };
        u32 a = row.attrs;
        expect(!((a & kNo64) && (a & kOnly64)), "valid in no mode");
        expect(!((a & kW0) && (a & kW1)), "W both 0 and 1");
        expect(!((a & kL0) && (a & kL1)), "L both 0 and 1");
        expect(!((a & kDef64) && (a & kForce64)), "two default operand sizes");
        expect(!((a & kReadOnlyDst) && (a & kWriteOnlyDst)),
               "first operand only read and only written");
        expect(!(a & kLockable) || can_be_memory(row), "LOCK without a memory operand");
        expect(!((a & kCpl0) && (a & kNative)), "privileged, yet run by the native oracle");
        bool vex = row.map == Map::V0F || row.map == Map::V0F38 || row.map == Map::V0F3A;
        expect(!vex || row.prefix != Mandatory::Any || row.ext.kind == OpExt::kNone,
               "a VEX row says which prefix it has");
        expect(
            row.mnemonic.find_first_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ_") == std::string_view::npos ||
                row.mnemonic.find('_') != std::string_view::npos,
            "the mnemonic is lower case");
    }
}

/// flags_read() and flags_written() know when a count is zero and when a string is not repeated.
void exact_flags() {
    auto flags = [](std::initializer_list<u8> bytes) {
        Insn insn;
        std::vector<u8> code(bytes);
        CHECK(decode(code, CodeSize::k64, all_features(), insn) == DecodeStatus::kOk);
        return std::pair{flags_read(insn), flags_written(insn)};
    };
    using Pair = std::pair<u8, u8>;
    CHECK((flags({0xc1, 0xe0, 3}) == Pair{0, kAllFlags}));         // shl eax, 3
    CHECK((flags({0xc1, 0xe0, 32}) == Pair{0, 0}));                // shl eax, 32: a count of zero
    CHECK((flags({0x48, 0xc1, 0xe0, 32}) == Pair{0, kAllFlags}));  // shl rax, 32
    CHECK((flags({0x48, 0xc0, 0xe0, 32}) == Pair{0, 0}));          // shl al, 32 with REX.W
    CHECK((flags({0xd3, 0xe0}) == Pair{kAllFlags, kAllFlags}));    // shl eax, cl
    CHECK((flags({0xc1, 0xd0, 3}) == Pair{kC, kC | kO}));          // rcl eax, 3
    CHECK((flags({0xa6}) == Pair{kD, kAllFlags}));                 // cmpsb
    CHECK((flags({0xf3, 0xa6}) == Pair{kAllFlags | kD, kAllFlags}));  // repe cmpsb
}

}  // namespace

int main() {
    consistent();
    exact_flags();
    reachable();
    return pvtest::finish("test_decode_rows");
}
