#include "process/symbols.hpp"

#include <elf.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace polyvisor::process {

namespace {

constexpr u64 kMostBytes = 256 << 20;  // of a table
constexpr std::size_t kLongestName = 4096;

template <class T>
std::vector<T> read_table(int fd, u64 offset, u64 size) {
    if (size > kMostBytes) return {};
    std::vector<T> table(size / sizeof(T));
    const ssize_t wanted = static_cast<ssize_t>(table.size() * sizeof(T));
    if (::pread(fd, table.data(), static_cast<std::size_t>(wanted), static_cast<off_t>(offset)) !=
        wanted) {
        return {};
    }
    return table;
}

}  // namespace

Symbols::Symbols(int fd) {
    Elf64_Ehdr header;
    if (::pread(fd, &header, sizeof header, 0) != sizeof header ||
        std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
        header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_shentsize != sizeof(Elf64_Shdr)) {
        return;
    }
    const auto sections =
        read_table<Elf64_Shdr>(fd, header.e_shoff, u64{header.e_shnum} * sizeof(Elf64_Shdr));
    const Elf64_Shdr* best = nullptr;
    for (const Elf64_Shdr& section : sections) {
        if (section.sh_type == SHT_SYMTAB || (section.sh_type == SHT_DYNSYM && best == nullptr)) {
            best = &section;
        }
    }
    if (best == nullptr || best->sh_link >= sections.size()) return;
    const Elf64_Shdr& names_section = sections[best->sh_link];
    const auto symbols = read_table<Elf64_Sym>(fd, best->sh_offset, best->sh_size);
    names_ = read_table<char>(fd, names_section.sh_offset, names_section.sh_size);
    for (const Elf64_Sym& symbol : symbols) {
        const unsigned type = ELF64_ST_TYPE(symbol.st_info);
        if (symbol.st_shndx == SHN_UNDEF || symbol.st_name >= names_.size()) continue;
        if (type != STT_FUNC && type != STT_OBJECT && type != STT_NOTYPE) continue;
        const bool local = ELF64_ST_BIND(symbol.st_info) == STB_LOCAL;
        const Value value{symbol.st_value, local};
        // (All of a hostile file's names may be the rest of its table.)
        const char* name = names_.data() + symbol.st_name;
        const std::size_t room =
            std::min<std::size_t>(kLongestName, names_.size() - symbol.st_name);
        const std::size_t length = ::strnlen(name, room);
        if (length == room) continue;
        auto [known, is_new] = values_.try_emplace(std::string_view(name, length), value);
        if (!is_new && known->second.local && !local) known->second = value;
    }
}

std::optional<u64> Symbols::find(const std::string& name) const {
    auto found = values_.find(name);
    if (found == values_.end()) return std::nullopt;
    return found->second.address;
}

}  // namespace polyvisor::process
