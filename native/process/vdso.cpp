#include "process/vdso.hpp"

#include <cerrno>

// image.S
extern "C" const polyvisor::u8 pv_vdso_start[], pv_vdso_end[];

namespace polyvisor::process {

std::span<const u8> vdso_image() {
    return {pv_vdso_start, pv_vdso_end};
}

s64 map_vdso(AddressSpace& space) {
    AddressSpace::Request request;
    request.size = vdso_image().size();
    request.rights = kReadable | kWritable;
    request.name = "[vdso]";
    request.counted = false;
    const s64 made = space.map(request);
    if (made < 0) return made;
    const u64 at = static_cast<u64>(made);
    if (!space.copy_out(at, vdso_image())) return -EFAULT;
    const s64 error = space.protect(at, request.size, kReadable | kExecutable);
    return error != 0 ? error : made;
}

}  // namespace polyvisor::process
