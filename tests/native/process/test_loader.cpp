// Programs that are nearly ELF files: whatever their headers say, they are loaded or refused, and
// what is loaded lies where programs lie. PV_FUZZ: how many; PV_SEED.
#include "process/loader.hpp"

#include <elf.h>
#include <fcntl.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "check.hpp"
#include "process/elf.hpp"
#include "process/symbols.hpp"
#include "random.hpp"
#include "small_elf.hpp"

using namespace polyvisor;
using namespace polyvisor::process;
using namespace pvtest;
namespace fs = std::filesystem;

namespace {

constexpr u64 kLimit = 16 << 20, kTables = 8 << 20;

void write_program(const fs::path& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
    fs::permissions(path, fs::perms::owner_all);
}

std::string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// The smallest program, with an interpreter: itself.
std::string interpreted_elf(u16 type) {
    std::string file = small_elf();
    auto* header = reinterpret_cast<Elf64_Ehdr*>(file.data());
    auto* parts = reinterpret_cast<Elf64_Phdr*>(file.data() + header->e_phoff);
    header->e_type = type;
    header->e_phnum = 3;
    parts[2] = {};
    parts[2].p_type = PT_INTERP;
    parts[2].p_offset = 512;
    parts[2].p_filesz = parts[2].p_memsz = sizeof "/bin/program";
    std::memcpy(file.data() + 512, "/bin/program", sizeof "/bin/program");
    return file;
}

struct Loaded {
    int error = 0;
    Start start;
    u64 areas = 0;
};

Loaded load(const Tree& tree) {
    GuestMemory memory;
    Arena arena(memory, kLimit + (64 << 20) + kTables, kTables);
    PageTables tables(arena);
    AddressSpace space(arena, tables, kLimit);
    LoadRequest request;
    request.program = "/bin/program";
    request.directory = "/";
    request.arguments = {"program", "argument"};
    Loaded result;
    const int expected = check_program(tree, request);
    result.error = load_program(tree, space, request, result.start);
    CHECK(result.error >= 0 && result.error < 134);
    if (expected != 0) CHECK(result.error != 0);
    for (const auto& [start, area] : space.areas()) {
        CHECK(start >= AddressSpace::kFirst && area.end <= AddressSpace::kEnd && start < area.end);
        ++result.areas;
    }
    CHECK(space.used() <= kLimit);
    if (result.error == 0) {
        // What both find on the stack.
        u64 count = 0;
        CHECK(space.load(result.start.rsp, count));
        CHECK_EQ(count, u64{2});
        CHECK_EQ(result.start.rsp % 16, u64{0});
    }
    return result;
}

void mutate(Random& random, std::string& file) {
    constexpr u64 kWords[] = {
        0,       1,       7,           4095,    4096,    0x10000, bit(31),        0xffffffff,
        bit(32), bit(46), bit(47) - 1, bit(47), bit(63), ~u64{0}, ~u64{0} - 4095, 0x7fff'0000'0000};
    auto* header = reinterpret_cast<Elf64_Ehdr*>(file.data());
    const u64 table = header->e_phoff;
    for (u32 changes = 1 + random.below(4); changes > 0; --changes) {
        // Headers of the program mostly, in which a field is 4 or 8 bytes; or a byte anywhere.
        u64 at = random.below(sizeof(Elf64_Ehdr));
        u64 size = 1;
        if (random.below(4) != 0 && table + 12 * sizeof(Elf64_Phdr) < file.size()) {
            at = table + random.below(12 * sizeof(Elf64_Phdr) / 8) * 8;
            size = random.one_in(3) ? 4 : 8;
        } else if (random.one_in(4)) {
            at = header->e_shoff < file.size() ? header->e_shoff : 0;  // and the sections
            at += random.below(static_cast<u32>(file.size() - at));
        }
        u64 value = random.one_in(2) ? random.next() : kWords[random.below(std::size(kWords))];
        if (random.one_in(4)) {  // nearly what it was
            std::memcpy(&value, file.data() + at, std::min<u64>(size, file.size() - at));
            value += random.pick<u64>({1, ~u64{0}, 4096, ~u64{0} - 4095});
        }
        std::memcpy(file.data() + at, &value, std::min<u64>(size, file.size() - at));
    }
    if (random.one_in(10)) file.resize(random.below(static_cast<u32>(file.size())));
}

void symbols_of(const fs::path& path) {
    OwnedFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    const Symbols symbols(fd.get());
    CHECK(!symbols.find("no such symbol"));
}

}  // namespace

int main() {
    Random random(environment_number("PV_SEED", 1));
    std::string name = fs::exists("/dev/shm") ? "/dev/shm" : fs::temp_directory_path().string();
    name += "/polyvisor-loader-XXXXXX";
    const fs::path top = ::mkdtemp(name.data());
    fs::create_directories(top / "bin");
    fs::create_directories(top / "lib64");
    const fs::path program = top / "bin/program";
    const Tree tree({{"/", top, false}});

    // Those that are right.
    write_program(program, small_elf());
    const Loaded fixed = load(tree);
    CHECK_EQ(fixed.error, 0);
    CHECK_EQ(fixed.start.base, u64{0});
    for (u16 type : {ET_EXEC, ET_DYN}) {
        write_program(program, interpreted_elf(type));
        // An interpreter's own interpreter is nobody's. A fixed one would lie where the program is.
        CHECK_EQ(load(tree).error, type == ET_EXEC ? EEXIST : 0);
    }
    write_program(program, "#!/bin/program\n");
    CHECK_EQ(load(tree).error, ELOOP);
    write_program(program, "");
    CHECK_EQ(load(tree).error, ENOEXEC);

    std::vector<std::string> files{small_elf(), interpreted_elf(ET_DYN), interpreted_elf(ET_EXEC)};
    for (const char* real : {"/bin/true", "/lib64/ld-linux-x86-64.so.2"}) {
        if (fs::exists(real)) files.push_back(read_file(real));
    }
    if (fs::exists("/lib64/ld-linux-x86-64.so.2")) {
        write_program(top / "lib64/ld-linux-x86-64.so.2", read_file("/lib64/ld-linux-x86-64.so.2"));
    }
    u64 loaded = 0, refused = 0;
    for (u64 n = environment_number("PV_FUZZ", 3000); n > 0; --n) {
        std::string file = files[random.below(static_cast<u32>(files.size()))];
        mutate(random, file);
        write_program(program, file);
        (load(tree).error == 0 ? loaded : refused) += 1;
        symbols_of(program);
    }
    CHECK(loaded > 0 && refused > 0);
    fs::remove_all(top);
    std::fprintf(stderr, "%llu loaded, %llu refused\n", static_cast<unsigned long long>(loaded),
                 static_cast<unsigned long long>(refused));
    return pvtest::finish("loader");
}
