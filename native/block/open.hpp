// A disk image by name: what most users of this folder need.
#pragma once

#include <memory>
#include <string>

#include "block/file_store.hpp"
#include "block/store.hpp"

namespace polyvisor::block {

struct ImageOptions {
    std::string format = "raw";  ///< anything else is served by qemu-nbd
    bool read_only = false;
    Cache cache = Cache::kWriteback;
    bool snapshot = false;  ///< the image is opened read-only, writes go to an OverlayStore
};

/// Throws HostError.
std::shared_ptr<Store> open_image(const std::string& path, const ImageOptions& options);

}  // namespace polyvisor::block
