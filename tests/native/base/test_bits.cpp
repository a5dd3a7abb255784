#include "base/types.hpp"
#include "check.hpp"

using namespace polyvisor;

int main() {
    CHECK_EQ(bit(0), 1u);
    CHECK_EQ(bit(63), 0x8000000000000000u);

    CHECK_EQ(bits(0xabcd, 15, 12), 0xau);
    CHECK_EQ(bits(0xabcd, 3, 0), 0xdu);
    CHECK_EQ(bits(~u64{0}, 63, 0), ~u64{0});
    CHECK_EQ(bits(u64{1} << 63, 63, 63), 1u);

    CHECK_EQ(align_down(0x1fff, 0x1000), 0x1000u);
    CHECK_EQ(align_down(0x1000, 0x1000), 0x1000u);
    CHECK_EQ(align_up(0x1001, 0x1000), 0x2000u);
    CHECK_EQ(align_up(0x1000, 0x1000), 0x1000u);
    CHECK_EQ(align_up(0, 0x1000), 0u);

    CHECK_EQ(sign_extend(0x80, 8), -128);
    CHECK_EQ(sign_extend(0x7f, 8), 127);
    CHECK_EQ(sign_extend(0x1ff, 8), -1);
    CHECK_EQ(sign_extend(0xffffffff, 32), -1);
    CHECK_EQ(sign_extend(0x0000800000000000, 48), s64{-0x800000000000});
    CHECK_EQ(sign_extend(~u64{0}, 64), -1);
    return pvtest::finish("bits");
}
