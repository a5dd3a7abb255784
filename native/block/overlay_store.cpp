#include "block/overlay_store.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "base/error.hpp"

namespace polyvisor::block {

namespace {

OwnedFd temporary_file(std::string folder, u64 size) {
    if (folder.empty()) {
        const char* given = std::getenv("TMPDIR");
        folder = given != nullptr && *given != 0 ? given : "/var/tmp";
    }
    OwnedFd fd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (!fd) {  // some file systems have none
        std::string path = folder + "/polyvisor-XXXXXX";
        fd = OwnedFd(::mkostemp(path.data(), O_CLOEXEC));
        if (fd) ::unlink(path.c_str());
    }
    if (!fd) throw_errno("cannot make a temporary file for a disk's snapshot", folder);
    if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) {
        throw_errno("cannot give a disk's snapshot its size", folder);
    }
    return fd;
}

}  // namespace

OverlayStore::OverlayStore(std::shared_ptr<Store> base, const std::string& folder)
    : base_(std::move(base)), info_(base_->info()) {
    file_ = std::make_unique<FileStore>(temporary_file(folder, info_.size), name(), Cache::kUnsafe);
    // Of a page per 128 MiB of disk, the host gives what is touched.
    bits_ = Mapping(-1, 0, align_up(info_.size / kSectorSize / 8 + 8, kPageSize));
}

Store::Info OverlayStore::info() const {
    Info info = info_;
    info.read_only = false;
    return info;
}

// How far what is at `offset` comes from the same place.
u64 OverlayStore::run_end(u64 offset, u64 end) const {
    const bool here = written(offset / kSectorSize);
    u64 at = align_down(offset, kSectorSize) + kSectorSize;
    while (at < end && written(at / kSectorSize) == here) at += kSectorSize;
    return std::min(at, end);
}

void OverlayStore::mark(u64 offset, u64 size) {
    for (u64 sector = offset / kSectorSize; sector < (offset + size) / kSectorSize; ++sector) {
        words()[sector / 64].fetch_or(bit(sector % 64), std::memory_order_release);
    }
}

bool OverlayStore::try_now(Request& request) {
    if (request.operation == Operation::kFlush) return true;
    if (request.operation != Operation::kRead) return false;
    const u64 end = request.offset + request.size;
    if (run_end(request.offset, end) != end) return false;
    Store& store = written(request.offset / kSectorSize) ? *file_ : *base_;
    return store.try_now(request);
}

int OverlayStore::perform(Request& request) {
    switch (request.operation) {
        case Operation::kRead:
            return read(request);
        case Operation::kFlush:
            return 0;
        case Operation::kWrite:
        case Operation::kDiscard:
        case Operation::kWriteZeroes:
            break;
    }
    Request ours = request;
    ours.may_unmap = true;
    // A hole in the file reads as zeroes: what was discarded does not come back from below.
    if (ours.operation == Operation::kDiscard) ours.operation = Operation::kWriteZeroes;
    const int error = file_->perform(ours);
    if (error == 0) mark(request.offset, request.size);
    return error;
}

int OverlayStore::read(Request& request) {
    while (request.size != 0) {
        const u64 size = run_end(request.offset, request.offset + request.size) - request.offset;
        std::vector<iovec> parts = request.first_bytes(size);
        Request piece{.offset = request.offset, .size = size, .buffers = parts};
        Store& store = written(request.offset / kSectorSize) ? *file_ : *base_;
        if (const int error = store.perform(piece)) return error;
        request.advance(size);
    }
    return 0;
}

}  // namespace polyvisor::block
