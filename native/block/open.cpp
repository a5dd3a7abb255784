#include "block/open.hpp"

#include "block/overlay_store.hpp"
#include "block/qemu_nbd.hpp"

namespace polyvisor::block {

std::shared_ptr<Store> open_image(const std::string& path, const ImageOptions& options) {
    const FileStore::Options file{.read_only = options.read_only || options.snapshot,
                                  .cache = options.cache};
    std::shared_ptr<Store> store;
    if (options.format == "raw") {
        store = std::make_shared<FileStore>(path, file);
    } else {
        store = open_with_qemu_nbd(path, options.format, file);
    }
    if (options.snapshot) store = std::make_shared<OverlayStore>(std::move(store));
    return store;
}

}  // namespace polyvisor::block
