#include "process/loader.hpp"

#include <elf.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "process/elf.hpp"
#include "process/vdso.hpp"

namespace polyvisor::process {

namespace {

constexpr u64 kProgramBase = 0x5555'5555'4000, kStackBytes = 8 << 20;
constexpr u64 kStackTop = 0x7fff'ffff'e000;
// How far from these a program's are, at the most, as Linux has it (arch/x86/mm/mmap.c).
constexpr u64 kProgramRange = u64{1} << 40, kMappingRange = u64{1} << 40;
constexpr u64 kStackRange = u64{1} << 34, kHeapRange = u64{1} << 25;
constexpr u64 kSignalFrame = 2048;  // with the extended state that CPUs have here, and room
constexpr int kMostScripts = 4;
constexpr std::size_t kMostArguments = 2 << 20;

// Opens an executable file of the tree.
int open_program(const Tree& tree, const std::string& directory, const std::string& path,
                 OwnedFd& fd, std::string& where) {
    Tree::Place place;
    if (int error = tree.walk(directory, path, Tree::kFollow, place)) return error;
    if (!place.file) return ENOENT;
    if (!S_ISREG(place.mode) || !(place.mode & 0111)) return EACCES;
    const int opened = tree.open(place, O_RDONLY, 0);
    if (opened < 0) return -opened;
    fd = OwnedFd(opened);
    where = place.path;
    return 0;
}

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
  public:
    explicit Random(u64 seed) : state_(seed) {}
    u64 next() {
        u64 z = state_ += 0x9e37'79b9'7f4a'7c15;
        z = (z ^ z >> 30) * 0xbf58'476d'1ce4'e5b9;
        z = (z ^ z >> 27) * 0x94d0'49bb'1331'11eb;
        return z ^ z >> 31;
    }

  private:
    u64 state_;
};

// Where things are, in one program.
struct Layout {
    u64 program = kProgramBase, top = AddressSpace::kTop, stack = kStackTop, heap = 0;
    u64 words[2] = {};  // AT_RANDOM
};

int make_layout(const std::optional<u64>& seed, Layout& layout) {
    if (::getrandom(layout.words, sizeof layout.words, 0) != sizeof layout.words) return EIO;
    if (!seed) return 0;
    Random random(*seed);
    const auto below = [&random](u64 range) { return random.next() % range & ~kPageMask; };
    layout.program += below(kProgramRange);
    layout.stack -= below(kStackRange);
    layout.top -= kStackRange + below(kMappingRange);
    layout.heap = below(kHeapRange);
    for (u64& word : layout.words) word = random.next();
    return 0;
}

using File = std::shared_ptr<const OwnedFd>;

int map_segment(AddressSpace& space, const File& file, const std::string& name, u64 base,
                const Elf::Segment& segment) {
    const u64 start = base + segment.address;
    const u64 first = start & ~kPageMask, lead = start & kPageMask;
    const u64 file_end = align_up(start + segment.file, kPageSize);
    const u64 end = align_up(start + segment.memory, kPageSize);
    AddressSpace::Request request;
    request.fixed = true;
    request.rights = segment.rights;
    if (segment.file != 0) {
        request.address = first;
        request.size = file_end - first;
        request.file = file;
        request.offset = segment.offset - lead;
        request.name = name;
        if (s64 made = space.map(request); made < 0) return static_cast<int>(-made);
        // Behind the file's part its last page is zero.
        const u64 tail = file_end - (start + segment.file);
        if (tail != 0 && (segment.rights & kWritable)) {
            const std::vector<u8> zeroes(tail);
            if (!space.copy_out(start + segment.file, zeroes)) return EFAULT;
        }
    }
    const u64 rest = segment.file != 0 ? file_end : first;
    if (end > rest) {
        request = {};
        request.fixed = true;
        request.rights = segment.rights;
        request.address = rest;
        request.size = end - rest;
        if (s64 made = space.map(request); made < 0) return static_cast<int>(-made);
    }
    return 0;
}

// The whole range is taken first, so that what is mapped meanwhile does not get in between.
int map_image(AddressSpace& space, const File& file, const std::string& name, const Elf& elf,
              u64 hint, u64& base) {
    const u64 low = elf.lowest(), size = align_up(elf.highest(), kPageSize) - low;
    base = 0;
    AddressSpace::Request request;
    request.size = size;
    if (elf.relocatable) {
        request.address = hint;
    } else {
        request.address = low;
        request.fixed = request.no_replace = true;
    }
    const s64 made = space.map(request);
    if (made < 0) return static_cast<int>(-made);
    if (elf.relocatable) base = static_cast<u64>(made) - low;
    for (const Elf::Segment& segment : elf.segments) {
        if (int error = map_segment(space, file, name, base, segment)) return error;
    }
    return 0;
}

// Downwards, as it lies in memory.
class Stack {
  public:
    Stack(AddressSpace& space, u64 top) : space_(space), at_(top) {}
    u64 at() const { return at_; }
    bool good() const { return good_; }
    void align(u64 to) { at_ &= ~(to - 1); }
    u64 push(std::span<const u8> bytes) {
        at_ -= bytes.size();
        good_ = good_ && space_.copy_out(at_, bytes);
        return at_;
    }
    u64 push(const std::string& text) {
        return push({reinterpret_cast<const u8*>(text.c_str()), text.size() + 1});
    }
    void push(const std::vector<u64>& words) {
        push({reinterpret_cast<const u8*>(words.data()), words.size() * 8});
    }

  private:
    AddressSpace& space_;
    u64 at_;
    bool good_ = true;
};

int make_stack(AddressSpace& space, const LoadRequest& request, const Elf& elf, u64 base,
               u64 interpreter_base, u64 vdso, const std::string& path, const Layout& layout,
               Start& start) {
    AddressSpace::Request area;
    area.address = layout.stack - kStackBytes;
    area.size = kStackBytes;
    area.fixed = true;
    area.rights = kReadable | kWritable;
    if (elf.executable_stack) area.rights |= kExecutable;
    area.name = "[stack]";
    if (s64 made = space.map(area); made < 0) return static_cast<int>(-made);
    std::size_t bytes = 0;
    for (const auto& text : request.arguments) bytes += text.size() + 9;
    for (const auto& text : request.environment) bytes += text.size() + 9;
    if (bytes > kMostArguments) return E2BIG;

    Stack stack(space, layout.stack);
    const u64 name = stack.push(path);
    std::vector<u64> words{request.arguments.size()};
    for (const auto& text : request.arguments) words.push_back(stack.push(text));
    words.push_back(0);
    for (const auto& text : request.environment) words.push_back(stack.push(text));
    words.push_back(0);
    const u64 platform = stack.push(std::string("x86_64"));
    const u64 seed = stack.push({reinterpret_cast<const u8*>(layout.words), sizeof layout.words});
    auto add = [&words](u64 type, u64 value) {
        words.push_back(type);
        words.push_back(value);
    };
    if (elf.headers != 0) add(AT_PHDR, base + elf.headers);
    if (vdso != 0) add(AT_SYSINFO_EHDR, vdso);
    add(AT_PHENT, sizeof(Elf64_Phdr));
    add(AT_PHNUM, elf.header_count);
    add(AT_PAGESZ, kPageSize);
    add(AT_BASE, interpreter_base);
    add(AT_FLAGS, 0);
    add(AT_ENTRY, base + elf.entry);
    for (u64 type : {AT_UID, AT_EUID, AT_GID, AT_EGID}) add(type, 0);
    add(AT_SECURE, 0);
    add(AT_RANDOM, seed);
    add(AT_HWCAP, request.hardware);
    add(AT_HWCAP2, 0);  // no FSGSBASE: CR4 has it off
    add(AT_MINSIGSTKSZ, kSignalFrame);
    add(AT_CLKTCK, 100);
    add(AT_PLATFORM, platform);
    add(AT_EXECFN, name);
    add(AT_NULL, 0);
    stack.align(16);
    if (words.size() % 2 != 0) stack.push(std::vector<u64>{0});
    stack.push(words);
    if (!stack.good()) return E2BIG;
    start.rsp = stack.at();
    return 0;
}

// "#!/bin/sh -e": the interpreter becomes the program. False: it is no script.
bool take_script(int fd, LoadRequest& request) {
    char line[256];
    const ssize_t size = ::pread(fd, line, sizeof line, 0);
    if (size < 3 || line[0] != '#' || line[1] != '!') return false;
    std::string text(line + 2, static_cast<std::size_t>(size) - 2);
    text.resize(std::min(text.find('\n'), text.size()));
    const std::size_t begin = text.find_first_not_of(" \t");
    if (begin == std::string::npos) return false;
    const std::size_t end = std::min(text.find_first_of(" \t", begin), text.size());
    std::vector<std::string> arguments{text.substr(begin, end - begin)};
    const std::size_t option = text.find_first_not_of(" \t", end);
    if (option != std::string::npos) {
        arguments.push_back(text.substr(option, text.find_last_not_of(" \t") + 1 - option));
    }
    arguments.push_back(std::exchange(request.program, arguments.front()));
    if (!request.arguments.empty()) {
        arguments.insert(arguments.end(), request.arguments.begin() + 1, request.arguments.end());
    }
    request.arguments = std::move(arguments);
    return true;
}

}  // namespace

namespace {

// The ELF file that is run in the end, and the request as its scripts' interpreters want it.
int find_program(const Tree& tree, LoadRequest& request, OwnedFd& fd, std::string& path, Elf& elf) {
    for (int scripts = 0;; ++scripts) {
        if (int error = open_program(tree, request.directory, request.program, fd, path)) {
            return error;
        }
        const int error = read_elf(fd.get(), elf);
        if (error == 0) return 0;
        if (scripts == kMostScripts) return ELOOP;
        if (!take_script(fd.get(), request)) return error;
    }
}

int open_interpreter(const Tree& tree, const Elf& elf, OwnedFd& fd, std::string& path, Elf& found) {
    if (int error = open_program(tree, "/", elf.interpreter, fd, path)) return error;
    const int error = read_elf(fd.get(), found);
    return error == ENOEXEC ? ELIBBAD : error;
}

}  // namespace

int check_program(const Tree& tree, const LoadRequest& wanted) {
    LoadRequest request = wanted;
    OwnedFd fd;
    std::string path;
    Elf elf, interpreter;
    if (int error = find_program(tree, request, fd, path, elf)) return error;
    std::size_t bytes = 0;
    for (const auto& text : request.arguments) bytes += text.size() + 9;
    for (const auto& text : request.environment) bytes += text.size() + 9;
    if (bytes > kMostArguments) return E2BIG;
    return elf.interpreter.empty() ? 0 : open_interpreter(tree, elf, fd, path, interpreter);
}

int load_program(const Tree& tree, AddressSpace& space, const LoadRequest& wanted, Start& start) {
    LoadRequest request = wanted;
    OwnedFd fd;
    std::string path;
    Elf elf;
    if (int error = find_program(tree, request, fd, path, elf)) return error;
    Layout layout;
    if (int error = make_layout(request.seed, layout)) return error;
    space.set_top(layout.top);
    u64 base = 0, interpreter_base = 0;
    if (int error = map_image(space, std::make_shared<OwnedFd>(std::move(fd)), path, elf,
                              layout.program, base))
        return error;
    space.set_heap(align_up(base + elf.highest(), kPageSize) + layout.heap);
    start.path = path;
    start.base = base;
    start.rip = base + elf.entry;
    if (!elf.interpreter.empty()) {
        Elf interpreter;
        OwnedFd file;
        std::string name;
        if (int error = open_interpreter(tree, elf, file, name, interpreter)) return error;
        if (int error = map_image(space, std::make_shared<OwnedFd>(std::move(file)), name,
                                  interpreter, 0, interpreter_base)) {
            return error;
        }
        start.rip = interpreter_base + interpreter.entry;
    }
    s64 vdso = 0;
    if (request.vdso && (vdso = map_vdso(space)) < 0) return static_cast<int>(-vdso);
    return make_stack(space, request, elf, base, interpreter_base, static_cast<u64>(vdso), path,
                      layout, start);
}

}  // namespace polyvisor::process
