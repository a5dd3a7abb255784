// The smallest program that can be loaded: a page of code, one of data, and memory behind it.
#pragma once

#include <elf.h>

#include <cstring>
#include <string>

#include "base/types.hpp"

namespace pvtest {

inline std::string small_elf() {
    using polyvisor::kPageSize;
    constexpr polyvisor::u64 kText = 0x400000;
    std::string file(2 * kPageSize, '\0');
    Elf64_Ehdr header{};
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = ELFCLASS64;
    header.e_ident[EI_DATA] = ELFDATA2LSB;
    header.e_ident[EI_VERSION] = EV_CURRENT;
    header.e_type = ET_EXEC;
    header.e_machine = EM_X86_64;
    header.e_version = EV_CURRENT;
    header.e_entry = kText + sizeof(Elf64_Ehdr) + 2 * sizeof(Elf64_Phdr);
    header.e_phoff = sizeof header;
    header.e_ehsize = sizeof header;
    header.e_phentsize = sizeof(Elf64_Phdr);
    header.e_phnum = 2;
    std::memcpy(file.data(), &header, sizeof header);
    const Elf64_Phdr parts[] = {
        {PT_LOAD, PF_R | PF_X, 0, kText, kText, kPageSize, kPageSize, kPageSize},
        {PT_LOAD, PF_R | PF_W, kPageSize, kText + kPageSize, kText + kPageSize, kPageSize,
         2 * kPageSize, kPageSize},
    };
    std::memcpy(file.data() + sizeof header, parts, sizeof parts);
    return file;
}

}  // namespace pvtest
