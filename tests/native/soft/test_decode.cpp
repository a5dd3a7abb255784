// The decoder against Zydis: random bytes in all three code sizes, every truncation, and the code
// of a real kernel when POLYVISOR_TEST_VMLINUX names one.
//
//   POLYVISOR_TEST_SEED=n   another random sequence (the seed is printed)
//   POLYVISOR_TEST_COUNT=n  instructions per code size (default 1500000)
#include <elf.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <vector>

#include "check.hpp"
#include "random.hpp"
#include "zydis_compare.hpp"

namespace {

using namespace polyvisor;
using namespace polyvisor::soft;

using pvtest::environment_number;
using pvtest::Random;

/// Bytes that look like an instruction: some prefixes, an escape or VEX, then noise.
void make_bytes(Random& random, CodeSize size, u8 (&bytes)[16]) {
    static constexpr u8 kPrefixes[] = {0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x26, 0x2e,
                                       0x36, 0x3e, 0x64, 0x65, 0x66, 0xf2, 0xf3};
    for (u8& byte : bytes) byte = static_cast<u8>(random.next() >> 40);
    unsigned at = 0;
    unsigned count = random.one_in(3) ? random.below(4) : 0;
    if (random.one_in(200)) count = random.below(14);
    for (unsigned n = 0; n < count; ++n) bytes[at++] = kPrefixes[random.below(sizeof kPrefixes)];
    if (size == CodeSize::k64 && random.one_in(3) && at < 14)
        bytes[at++] = static_cast<u8>(0x40 | random.below(16));
    if (at > 9) return;
    switch (random.below(10)) {
        case 0:
        case 1:
        case 2:
            break;
        case 3:
        case 4:
        case 5:
            bytes[at++] = 0x0f;
            break;
        case 6:
            bytes[at++] = 0x0f;
            bytes[at++] = random.one_in(3) ? 0x3a : 0x38;
            break;
        case 7:
            bytes[at++] = 0xc5;
            if (size != CodeSize::k64) bytes[at] |= 0xc0;
            break;
        case 8:
            bytes[at++] = 0xc4;
            bytes[at] = static_cast<u8>((bytes[at] & 0xe0) | (1 + random.below(3)));
            if (size != CodeSize::k64) bytes[at] |= 0xc0;
            if (random.one_in(2)) bytes[at + 1] |= 0x78;
            break;
        default:
            bytes[at++] = static_cast<u8>(0xd8 + random.below(8));
            break;
    }
}

struct Disagreements {
    std::map<std::string, std::pair<unsigned, std::string>> list;

    void note(const std::string& key, const std::string& example) {
        auto& [count, first] = list[key];
        if (count++ == 0) first = example;
    }
    void report(const char* where) {
        for (const auto& [key, value] : list) {
            ++pvtest::failures;
            std::fprintf(stderr, "%s: %s (%u times), e.g. %s\n", where, key.c_str(), value.first,
                         value.second.c_str());
        }
    }
};

const char* const kSizeNames[] = {"16-bit code", "32-bit code", "64-bit code"};

void random_bytes(u64 seed, u64 count) {
    for (unsigned n = 0; n < 3; ++n) {
        auto size = static_cast<CodeSize>(n);
        pvtest::ZydisPeer peer(size);
        Random random(seed + n);
        Disagreements disagreements;
        u8 bytes[16];
        for (u64 k = 0; k < count; ++k) {
            make_bytes(random, size, bytes);
            std::string key = peer.compare(bytes);
            if (!key.empty()) disagreements.note(key, peer.disassemble(bytes));
        }
        pvtest::checks += static_cast<int>(count);
        std::fprintf(stderr, "%s: %lu valid, %lu invalid for both, %lu known differences\n",
                     kSizeNames[n], peer.both_valid, peer.both_invalid, peer.excused);
        CHECK(peer.both_valid > count / 3);
        disagreements.report(kSizeNames[n]);
    }
}

/// A prefix of a valid instruction is truncated at every length, and decodes to the same when more
/// bytes than needed follow.
void truncation(u64 seed) {
    Random random(seed);
    FeatureSet features = pvtest::all_features();
    for (unsigned n = 0; n < 60000; ++n) {
        auto size = static_cast<CodeSize>(random.below(3));
        u8 bytes[16];
        make_bytes(random, size, bytes);
        Insn whole;
        if (decode(bytes, size, features, whole) != DecodeStatus::kOk) continue;
        bool good = true;
        for (unsigned length = 0; length < whole.length; ++length) {
            // An exact-size heap copy, so that an address sanitizer sees any read beyond it.
            std::vector<u8> part(bytes, bytes + length);
            Insn insn;
            good &= decode(part, size, features, insn) == DecodeStatus::kTruncated &&
                    insn.length <= length;
        }
        Insn exact;
        good &= decode({bytes, whole.length}, size, features, exact) == DecodeStatus::kOk;
        good &= exact == whole;
        ++pvtest::checks;
        if (!good) {
            pvtest::fail(__FILE__, __LINE__,
                         "truncation of " + pvtest::ZydisPeer(size).disassemble(bytes));
        }
    }
}

void length_limit() {
    FeatureSet features = pvtest::all_features();
    Insn insn;
    std::vector<u8> bytes(16, 0x66);
    bytes[14] = 0x90;
    CHECK(decode(bytes, CodeSize::k64, features, insn) == DecodeStatus::kOk);
    CHECK_EQ(+insn.length, 15);
    bytes[14] = 0x66;
    bytes[15] = 0x90;
    CHECK(decode(bytes, CodeSize::k64, features, insn) == DecodeStatus::kTooLong);
    bytes.resize(15);
    CHECK(decode(bytes, CodeSize::k64, features, insn) == DecodeStatus::kTooLong);
    bytes.resize(14);
    CHECK(decode(bytes, CodeSize::k64, features, insn) == DecodeStatus::kTruncated);
}

/// Rows whose feature is absent do not exist; an older one may match.
void absent_features() {
    FeatureSet features = pvtest::all_features();
    const u8 lzcnt[] = {0xf3, 0x0f, 0xbd, 0xc1};
    Insn insn;
    CHECK(decode(lzcnt, CodeSize::k64, features, insn) == DecodeStatus::kOk &&
          insn.op == Op::LZCNT_Gv_Ev);
    features.set(Feature::kLzcnt, false);
    CHECK(decode(lzcnt, CodeSize::k64, features, insn) == DecodeStatus::kOk &&
          insn.op == Op::BSR_Gv_Ev);
    const u8 popcnt[] = {0xf3, 0x0f, 0xb8, 0xc1};
    features.set(Feature::kPopcnt, false);
    CHECK(decode(popcnt, CodeSize::k64, features, insn) == DecodeStatus::kUndefined);
}

/// Linear sweep over the executable sections of an ELF file.
template <class Header, class Section>
void sweep(const char* path, const std::vector<char>& image, CodeSize size) {
    Header header;
    std::memcpy(&header, image.data(), sizeof header);
    bool usable = header.e_shoff < image.size() &&
                  header.e_shnum * sizeof(Section) <= image.size() - header.e_shoff;
    CHECK(usable);
    if (!usable) return;
    pvtest::ZydisPeer peer(size);
    Disagreements disagreements;
    FeatureSet features = pvtest::all_features();
    u64 instructions = 0;
    for (unsigned n = 0; n < header.e_shnum; ++n) {
        Section section;
        std::memcpy(&section, image.data() + header.e_shoff + n * sizeof section, sizeof section);
        if (section.sh_type != SHT_PROGBITS || !(section.sh_flags & SHF_EXECINSTR)) continue;
        if (section.sh_offset > image.size() || section.sh_size > image.size() - section.sh_offset)
            continue;
        auto* at = reinterpret_cast<const u8*>(image.data() + section.sh_offset);
        for (u64 left = section.sh_size; left > 0;) {
            std::span<const u8> bytes(at, std::min<u64>(left, 15));
            std::string key = peer.compare(bytes);
            if (!key.empty()) disagreements.note(key, peer.disassemble(bytes));
            Insn insn;
            u64 step = decode(bytes, size, features, insn) == DecodeStatus::kOk ? insn.length : 1;
            at += step;
            left -= std::min<u64>(step, left);
            ++instructions;
        }
    }
    std::fprintf(stderr, "%s: %llu instructions\n", path,
                 static_cast<unsigned long long>(instructions));
    CHECK(instructions > 10000);
    disagreements.report(path);
}

void kernel(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> image((std::istreambuf_iterator<char>(file)), {});
    bool elf = image.size() > sizeof(Elf64_Ehdr) && std::memcmp(image.data(), ELFMAG, SELFMAG) == 0;
    CHECK(elf);
    if (!elf) return;
    if (image[EI_CLASS] == ELFCLASS64) {
        sweep<Elf64_Ehdr, Elf64_Shdr>(path, image, CodeSize::k64);
    } else {
        sweep<Elf32_Ehdr, Elf32_Shdr>(path, image, CodeSize::k32);
    }
}

}  // namespace

int main() {
    u64 seed = environment_number("POLYVISOR_TEST_SEED", 1);
    std::fprintf(stderr, "seed %llu\n", static_cast<unsigned long long>(seed));
    length_limit();
    absent_features();
    truncation(seed);
    random_bytes(seed, environment_number("POLYVISOR_TEST_COUNT", 1500000));
    if (const char* path = std::getenv("POLYVISOR_TEST_VMLINUX")) kernel(path);
    return pvtest::finish("test_decode");
}
