#include "process/elf.hpp"

#include <elf.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "process/page_tables.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kHighest = 0x7fff'0000'0000;
constexpr unsigned kMostHeaders = 64;

bool read_all(int fd, void* into, std::size_t size, u64 offset) {
    return ::pread(fd, into, size, static_cast<off_t>(offset)) == static_cast<ssize_t>(size);
}

u8 rights_of(u32 flags) {
    return static_cast<u8>((flags & PF_R ? kReadable : 0) | (flags & PF_W ? kWritable : 0) |
                           (flags & PF_X ? kExecutable : 0));
}

}  // namespace

u64 Elf::highest() const {
    u64 most = 0;
    for (const Segment& segment : segments) most = std::max(most, segment.address + segment.memory);
    return most;
}

int read_elf(int fd, Elf& elf) {
    elf = {};
    Elf64_Ehdr header;
    if (!read_all(fd, &header, sizeof header, 0)) return ENOEXEC;
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
        header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB ||
        header.e_machine != EM_X86_64 || (header.e_type != ET_EXEC && header.e_type != ET_DYN) ||
        header.e_phentsize != sizeof(Elf64_Phdr) || header.e_phnum == 0 ||
        header.e_phnum > kMostHeaders) {
        return ENOEXEC;
    }
    std::vector<Elf64_Phdr> headers(header.e_phnum);
    if (!read_all(fd, headers.data(), headers.size() * sizeof(Elf64_Phdr), header.e_phoff)) {
        return ENOEXEC;
    }
    elf.entry = header.e_entry;
    elf.relocatable = header.e_type == ET_DYN;
    elf.header_count = header.e_phnum;
    for (const Elf64_Phdr& part : headers) {
        if (part.p_type == PT_INTERP) {
            if (part.p_filesz < 2 || part.p_filesz > 4096) return ENOEXEC;
            elf.interpreter.resize(part.p_filesz);
            if (!read_all(fd, elf.interpreter.data(), part.p_filesz, part.p_offset)) return ENOEXEC;
            if (elf.interpreter.back() != 0) return ENOEXEC;
            elf.interpreter.resize(std::strlen(elf.interpreter.c_str()));
        } else if (part.p_type == PT_GNU_STACK) {
            elf.executable_stack = part.p_flags & PF_X;
        } else if (part.p_type == PT_LOAD && part.p_memsz != 0) {
            if (part.p_filesz > part.p_memsz || part.p_vaddr > kHighest ||
                part.p_memsz > kHighest - part.p_vaddr || part.p_offset > kHighest ||
                (part.p_vaddr - part.p_offset) % kPageSize != 0) {
                return ENOEXEC;
            }
            const bool ascends =
                elf.segments.empty() ||
                part.p_vaddr >= elf.segments.back().address + elf.segments.back().memory;
            if (!ascends) return ENOEXEC;
            elf.segments.push_back({part.p_vaddr, part.p_memsz, part.p_offset, part.p_filesz,
                                    rights_of(part.p_flags)});
            if (header.e_phoff >= part.p_offset && header.e_phoff < part.p_offset + part.p_filesz) {
                elf.headers = part.p_vaddr + (header.e_phoff - part.p_offset);
            }
        }
    }
    return elf.segments.empty() ? ENOEXEC : 0;
}

}  // namespace polyvisor::process
