// A throw-away overlay: reads come from another store, which nobody writes to, until the guest has
// written there itself. What it writes is in a temporary file without a name, at the same places,
// and gone with the store. A bit per sector says where it has written; a write needs no copy of
// what was there before, however small it is.
#pragma once

#include <atomic>
#include <memory>

#include "base/mapping.hpp"
#include "block/file_store.hpp"

namespace polyvisor::block {

class OverlayStore final : public Store {
  public:
    /// The temporary file is in `folder`; empty: in $TMPDIR or /var/tmp. Throws HostError.
    explicit OverlayStore(std::shared_ptr<Store> base, const std::string& folder = {});

    Info info() const override;
    int perform(Request& request) override;
    bool try_now(Request& request) override;
    std::string name() const override { return base_->name() + " (snapshot)"; }

  private:
    bool written(u64 sector) const {
        return (words()[sector / 64].load(std::memory_order_acquire) >> (sector % 64)) & 1;
    }
    std::atomic<u64>* words() const { return reinterpret_cast<std::atomic<u64>*>(bits_.data()); }
    u64 run_end(u64 offset, u64 end) const;
    void mark(u64 offset, u64 size);
    int read(Request& request);

    std::shared_ptr<Store> base_;
    const Info info_;
    std::unique_ptr<FileStore> file_;
    Mapping bits_;
};

}  // namespace polyvisor::block
