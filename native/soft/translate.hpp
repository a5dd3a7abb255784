// From guest bytes to a Block's uops.
#pragma once

#include <span>

#include "soft/block_cache.hpp"

namespace polyvisor::soft {

/// What one instruction is translated with.
struct TranslateContext {
    u32 mode;
    u64 ip;           ///< of the instruction
    u64 block_ip;     ///< of the block
    u8 number;        ///< instructions before it
    bool flags_live;  ///< its status flags may be read before they are overwritten
};

/// Appends uops for a specialised form of the instruction; false when there is none.
bool emit_fast(const Insn& insn, const OpInfo& row, const TranslateContext& context,
               std::vector<Uop>& uops);
/// Appends the uop(s) for two instructions that are better run as one (CMP or TEST and Jcc).
bool emit_fused(const Insn& first, const Insn& second, const TranslateContext& context,
                std::vector<Uop>& uops);

/// Collects instructions of one block and turns them into uops.
class BlockBuilder {
  public:
    /// `fast` false: only generic operations (the reference that tests compare with).
    BlockBuilder(BlockCache& cache, const FeatureSet& features, u32 mode, u64 ip, u32 cs_limit,
                 bool fast)
        : cache_(cache),
          features_(features),
          mode_(mode),
          ip_(ip),
          cs_limit_(cs_limit),
          fast_(fast) {}

    enum class Step {
        kMore,       ///< taken
        kEnd,        ///< taken, and it ends the block
        kTruncated,  ///< needs bytes beyond those given
        kStop,       ///< not taken: it cannot be part of this block (limit, size)
    };
    /// Looks at the instruction at the current end of the block.
    Step add(std::span<const u8> bytes);
    /// Makes the uops. The block is to be inserted with them.
    void finish(Block& block, std::vector<Uop>& uops);
    u32 bytes() const { return size_; }
    bool empty() const { return insns_.empty(); }

  private:
    struct Item {
        Insn insn;
        u16 offset;
        u8 vector = 0;  ///< != 0: raise this instead (#UD, #GP, #NM)
        bool live = true;
    };
    void check(Item& item) const;
    void mark_live_flags();
    void emit(const Item& item, u8 number, std::vector<Uop>& uops);
    static bool ends_block(const Item& item);

    BlockCache& cache_;
    const FeatureSet& features_;
    u32 mode_;
    u64 ip_;
    u32 cs_limit_;
    bool fast_;
    u32 size_ = 0;
    std::vector<Item> insns_;
};

}  // namespace polyvisor::soft
