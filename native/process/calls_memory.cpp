// Memory: mmap() and its kin.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "process/calls.hpp"

namespace polyvisor::process {

namespace {

// Of newer headers.
constexpr u64 kMapSharedValidate = 3, kRemapDontUnmap = 4;
constexpr u64 kPopulateRead = 22, kPopulateWrite = 23;

u8 rights_of(u64 protection) {
    // (x86 pages that can be written or executed can be read.)
    return static_cast<u8>((protection & (PROT_READ | PROT_WRITE | PROT_EXEC) ? kReadable : 0) |
                           (protection & PROT_WRITE ? kWritable : 0) |
                           (protection & PROT_EXEC ? kExecutable : 0));
}

// What a file's mapping is, as far as the file decides; 0 or -errno.
s64 take_file(Thread& thread, const Arguments& a, AddressSpace::Request& request) {
    auto* entry = thread.process().descriptors.find(a[4]);
    if (entry == nullptr) return -EBADF;
    if (a[5] % kPageSize != 0) return -EINVAL;
    constexpr u64 kLongestFile = ~u64{0} >> 1;
    if (a[1] > kLongestFile || a[5] > kLongestFile - a[1]) return -EOVERFLOW;
    const OwnedFd& fd = entry->file->fd;
    const int mode = ::fcntl(fd.get(), F_GETFL);
    struct stat about{};
    if (mode < 0 || ::fstat(fd.get(), &about) != 0) return -ENODEV;
    if ((mode & O_PATH) != 0) return -EBADF;
    if ((mode & O_ACCMODE) == O_WRONLY) return -EACCES;
    if (S_ISCHR(about.st_mode) && about.st_rdev == makedev(1, 5)) return 0;  // /dev/zero
    const bool may_write = (mode & O_ACCMODE) == O_RDWR;
    if (request.shared && (request.rights & kWritable) && !may_write) return -EACCES;
    if (!S_ISREG(about.st_mode)) return -ENODEV;
    if (request.shared) {
        if (!may_write) request.most_rights = kReadable | kExecutable;
        // Nobody writes to it here: a private one shows the same.
        request.shared = may_write;
    }
    request.file = {entry->file, &fd};
    request.offset = a[5];
    request.name = entry->file->path;
    return 0;
}

s64 sys_mmap(Thread& thread, const Arguments& a) {
    constexpr u64 kKnown = MAP_TYPE | MAP_FIXED | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_DENYWRITE |
                           MAP_EXECUTABLE | MAP_LOCKED | MAP_NORESERVE | MAP_POPULATE |
                           MAP_NONBLOCK | MAP_STACK | MAP_FIXED_NOREPLACE | MAP_32BIT;
    const u64 flags = a[3], type = flags & MAP_TYPE;
    if (type != MAP_PRIVATE && type != MAP_SHARED && type != kMapSharedValidate) return -EINVAL;
    if (type == kMapSharedValidate && (flags & ~kKnown)) return -EOPNOTSUPP;
    if (flags & MAP_HUGETLB) return -ENOMEM;  // none are set aside
    AddressSpace::Request request;
    request.address = a[0];
    request.size = a[1];
    request.rights = rights_of(a[2]);
    request.fixed = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE);
    request.no_replace = flags & MAP_FIXED_NOREPLACE;
    request.low = flags & MAP_32BIT;
    request.reserved = !(flags & MAP_NORESERVE);
    request.shared = type != MAP_PRIVATE;
    if (a[1] == 0) return -EINVAL;
    if (!(flags & MAP_ANONYMOUS)) {
        if (s64 error = take_file(thread, a, request); error != 0) return error;
    }
    const s64 address = thread.space().map(request);
    if (address >= 0 && (flags & (MAP_POPULATE | MAP_LOCKED))) {
        thread.space().populate(static_cast<u64>(address), align_up(a[1], kPageSize));
    }
    return address;
}

s64 sys_munmap(Thread& thread, const Arguments& a) {
    return thread.space().unmap(a[0], a[1]);
}

s64 sys_mprotect(Thread& thread, const Arguments& a) {
    if (a[2] & ~u64{PROT_READ | PROT_WRITE | PROT_EXEC}) return -EINVAL;
    return thread.space().protect(a[0], a[1], rights_of(a[2]));
}

s64 sys_mremap(Thread& thread, const Arguments& a) {
    if (a[3] & ~u64{MREMAP_MAYMOVE | MREMAP_FIXED | kRemapDontUnmap}) return -EINVAL;
    AddressSpace::Remap request;
    request.address = a[0];
    request.old_size = a[1];
    request.new_size = a[2];
    request.may_move = a[3] & MREMAP_MAYMOVE;
    request.fixed = a[3] & MREMAP_FIXED;
    request.keep = a[3] & kRemapDontUnmap;
    request.target = a[4];
    return thread.space().remap(request);
}

s64 sys_brk(Thread& thread, const Arguments& a) {
    return static_cast<s64>(thread.space().brk(a[0]));
}

// [address, address + size) as whole pages; 0, or what the call answers.
s64 take_range(u64 address, u64& size) {
    const u64 bytes = align_up(size, kPageSize);
    if (address % kPageSize != 0 || bytes < size) return -EINVAL;
    if (address > ~u64{0} - bytes) return -EINVAL;
    if (address > AddressSpace::kEnd || bytes > AddressSpace::kEnd - address) return -ENOMEM;
    size = bytes;
    return 0;
}

s64 sys_madvise(Thread& thread, const Arguments& a) {
    AddressSpace& space = thread.space();
    u64 size = a[1];
    const s64 error = take_range(a[0], size);
    switch (a[2]) {
        case MADV_NORMAL:
        case MADV_RANDOM:
        case MADV_SEQUENTIAL:
        case MADV_WILLNEED:
        case MADV_FREE:  // (it may be freed, and need not)
        case MADV_HUGEPAGE:
        case MADV_NOHUGEPAGE:
        case MADV_DONTDUMP:
        case MADV_DODUMP:
        case MADV_COLD:
        case MADV_PAGEOUT:
            if (error != 0 || size == 0) return error;
            return space.is_mapped(a[0], size) ? 0 : -ENOMEM;
        case MADV_DONTNEED:
            return error != 0 || size == 0 ? error : space.discard(a[0], size);
        case kPopulateRead:
        case kPopulateWrite:
            return error != 0 || size == 0 ? error : space.populate(a[0], size);
        case MADV_DONTFORK:
            return error != 0 || size == 0
                       ? error
                       : space.set_on_fork(a[0], size, AddressSpace::OnFork::kGone);
        case MADV_WIPEONFORK:
            return error != 0 || size == 0
                       ? error
                       : space.set_on_fork(a[0], size, AddressSpace::OnFork::kWiped);
        case MADV_DOFORK:
        case MADV_KEEPONFORK:
            return error != 0 || size == 0
                       ? error
                       : space.set_on_fork(a[0], size, AddressSpace::OnFork::kCopied);
        default:
            return -EINVAL;
    }
}

s64 sys_msync(Thread& thread, const Arguments& a) {
    u64 size = a[1];
    if (a[2] & ~u64{MS_ASYNC | MS_INVALIDATE | MS_SYNC}) return -EINVAL;
    if ((a[2] & MS_ASYNC) && (a[2] & MS_SYNC)) return -EINVAL;
    if (s64 error = take_range(a[0], size)) return error;
    if (a[2] & MS_SYNC) return thread.space().sync(a[0], size);
    return thread.space().is_mapped(a[0], size) ? 0 : -ENOMEM;
}

// A page is there as soon as it has memory.
s64 sys_mincore(Thread& thread, const Arguments& a) {
    const AddressSpace& space = thread.space();
    u64 size = a[1];
    if (s64 error = take_range(a[0], size)) return error;
    if (!space.is_mapped(a[0], size)) return -ENOMEM;
    std::vector<u8> pages;
    for (u64 at = a[0], to = a[2]; at < a[0] + size;) {
        auto area = std::prev(space.areas().upper_bound(at));
        const u64 here = std::min({a[0] + size, area->second.end, at + (u64{1} << 28)}) - at;
        pages.assign(here / kPageSize, area->second.gpa.has_value());
        if (!thread.space().copy_out(to, pages)) return -EFAULT;
        at += here;
        to += pages.size();
    }
    return 0;
}

// Nothing is ever swapped by the monitor.
s64 sys_mlock(Thread& thread, const Arguments& a) {
    u64 size = a[1] + (a[0] & kPageMask);
    if (s64 error = take_range(align_down(a[0], kPageSize), size)) return error;
    return thread.space().is_mapped(align_down(a[0], kPageSize), size) ? 0 : -ENOMEM;
}

s64 sys_mlock2(Thread& thread, const Arguments& a) {
    return a[2] > 1 ? -EINVAL : sys_mlock(thread, a);
}

s64 sys_mlockall(Thread&, const Arguments& a) {
    constexpr u64 kOnFault = 4;
    const u64 flags = a[0];
    if (flags == 0 || flags == kOnFault || (flags & ~u64{MCL_CURRENT | MCL_FUTURE | kOnFault})) {
        return -EINVAL;
    }
    return 0;
}

s64 sys_munlockall(Thread&, const Arguments&) {
    return 0;
}

constexpr Call kCalls[] = {
    {SYS_mmap, sys_mmap},
    {SYS_munmap, sys_munmap},
    {SYS_mprotect, sys_mprotect},
    {SYS_mremap, sys_mremap},
    {SYS_brk, sys_brk},
    {SYS_madvise, sys_madvise},
    {SYS_msync, sys_msync},
    {SYS_mincore, sys_mincore},
    {SYS_mlock, sys_mlock},
    {SYS_munlock, sys_mlock},
    {SYS_mlock2, sys_mlock2},
    {SYS_mlockall, sys_mlockall},
    {SYS_munlockall, sys_munlockall},
};

}  // namespace

std::span<const Call> memory_calls() {
    return kCalls;
}

}  // namespace polyvisor::process
