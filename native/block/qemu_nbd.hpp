// Images in formats that are QEMU's, through its qemu-nbd: a child process with the image, and an
// NBD connection to it on a private socket that has no name any more once it is connected.
#pragma once

#include <memory>
#include <string>

#include "block/file_store.hpp"
#include "block/store.hpp"

namespace polyvisor::block {

/// A store on the image. The child ends with the store, and also when this process dies. Throws
/// HostError: qemu-nbd is missing (ENOENT), or refuses the image, with its own words.
std::shared_ptr<Store> open_with_qemu_nbd(const std::string& path, const std::string& format,
                                          const FileStore::Options& options);

}  // namespace polyvisor::block
