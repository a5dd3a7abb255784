// Shadow page tables: guest-virtual addresses straight to host addresses, in tables that hardware
// (or lookup(), which walks them as hardware would) can use while the guest believes in its own.
//
//     HostMemory host(memory);
//     ShadowMmu shadow(memory, host);
//     shadow.load(paging);                          // MOV CR0/CR3/CR4/EFER
//     ShadowHit hit = shadow.lookup(gva, access);
//     if (!hit.ok) switch (shadow.fault(gva, access).outcome) ...
//
// How it stays coherent with the guest's tables, and why that is right, is in docs/shadow.md. In
// short: a guest page that serves as a table is write-tracked, so upper levels are always exact;
// last-level tables may become "unsync" (writable, possibly out of date) until the guest's next
// INVLPG or control-register load, which is as long as a TLB may be out of date.
//
// Nobody but the owner calls it, under the owner's lock when it has several vCPUs; vCPUs may store
// to guest memory meanwhile. Bad guest tables give guest faults, never host errors.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/mapping.hpp"
#include "mmu/shadow_map.hpp"
#include "mmu/walker.hpp"

namespace polyvisor {

/// Who looks through a shadow table: entries hold the rights of one kind of access, so each has a
/// root of its own, and the owner runs the guest at one privilege level (CPL 3) throughout.
enum class ShadowView : u8 {
    kUser,
    kSupervisor,        ///< user pages are data too: SMAP off, or EFLAGS.AC set
    kSupervisorNoUser,  ///< SMAP forbids data accesses to user pages
};
inline constexpr unsigned kShadowViews = 3;

constexpr ShadowView shadow_view(const PagingState& paging, PageAccess access) {
    if (access.user) return ShadowView::kUser;
    return paging.smap && (access.implicit || !access.ac) ? ShadowView::kSupervisorNoUser
                                                          : ShadowView::kSupervisor;
}

/// Pages that may be executed but not read carry this protection key; with the key's access-disable
/// bit set in PKRU (kShadowPkru) hardware enforces it. Everything else has key 0.
inline constexpr u64 kShadowExecuteOnlyKey = 15;
inline constexpr u32 kShadowPkru = 1u << (2 * kShadowExecuteOnlyKey);

/// Where the guest's physical pages are, and what hears of changes. The owner implements it.
class ShadowHost {
  public:
    struct Page {
        u64 address = 0;  ///< of the byte at `gpa`: what shadow entries lead to
        u8 shift = 12;    ///< 12, 21 or 30: the aligned block around it is contiguous and aligned
                          ///< there, and is all writable or all not
        bool writable = true;  ///< stores may go there directly
    };

    virtual ~ShadowHost() = default;
    /// Where the guest-physical address is; nothing when it is not memory (a device's register).
    /// `write`: the guest is about to store there, so a dirty log can note it; otherwise `writable`
    /// must be false for a page whose first store somebody wants to know of. `shift` is the largest
    /// that is of use.
    virtual std::optional<Page> host_page(u64 gpa, bool write, u8 shift) = 0;
    /// Stores to the page at `gpa` must (not any more) be told with write_tracked(). Shadow entries
    /// take care of it themselves; this is for stores that go another way.
    virtual void tracked(u64 /*gpa*/, bool /*on*/) {}
    /// Entries lost rights or lead elsewhere: whatever was cached from the tables must go. Returns
    /// when no vCPU uses it any more.
    virtual void flush() {}
};

/// The host's own view of GuestMemory: entries lead to addresses in this process. Respects its
/// page flags (dirty log, translated code) and read-only regions.
class HostMemory : public ShadowHost {
  public:
    explicit HostMemory(GuestMemory& memory) : memory_(memory) {}
    std::optional<Page> host_page(u64 gpa, bool write, u8 shift) override;

  private:
    GuestMemory& memory_;
};

struct ShadowOptions {
    /// The most shadow tables at a time, 32 to 4 million: each costs 4 KiB and, unless it splinters
    /// a large page, as much again.
    u32 max_pages = 4096;
};

/// What a walk of the shadow tables gives.
struct ShadowHit {
    bool ok = false;  ///< the access is allowed
    bool readable = false, writable = false, executable = false;
    u8 shift = 0;     ///< log2 of the shadow page; 0: nothing is there
    u64 address = 0;  ///< of the byte
};

struct ShadowFault {
    enum Outcome : u8 {
        kInstalled,   ///< lookup() succeeds now
        kGuestFault,  ///< #PF with `error` for the guest
        kNotMemory,   ///< the access is the owner's, at `gpa`: a device
        kStore,  ///< the store is the owner's, at `gpa`: to a page table (then write_tracked()), or
                 ///< to a page that the host does not let be written
    };
    Outcome outcome = kInstalled;
    u32 error = 0;
    u64 gpa = 0;
};

class ShadowMmu {
  public:
    /// Throws HostError when there is no memory for the tables.
    ShadowMmu(GuestMemory& memory, ShadowHost& host, ShadowOptions options = {});
    ShadowMmu(const ShadowMmu&) = delete;
    ShadowMmu& operator=(const ShadowMmu&) = delete;

    /// A load of CR0, CR3, CR4 or EFER: from now on the guest's translations are those that its
    /// tables say now. CR3's no-flush bit and global pages allow keeping old ones; nothing has to
    /// be thrown away here that is still right, so they make no difference.
    void load(const PagingState& paging);
    /// WRPKRU, MOV to IA32_PKRS: no translation becomes invalid.
    void set_keys(u32 pkru, u32 pkrs);
    /// INVLPG, INVPCID of one address.
    void invlpg(u64 gva);
    /// INVPCID of more than an address, a change of CR4.PGE.
    void flush();
    const PagingState& paging() const { return paging_; }

    /// What to do about an access that lookup() refused. `gva` is canonical.
    ShadowFault fault(u64 gva, PageAccess access);
    /// Walks the shadow tables as hardware at CPL 3 with kShadowPkru would, setting accessed bits.
    ShadowHit lookup(u64 gva, PageAccess access);
    /// Address of the view's root table (PML4, or PML5 with 57-bit addresses): what hardware's CR3
    /// would be. 0 until a fault made it; asked for again after each call of any of this.
    u64 root(ShadowView view) const;

    /// After a store to [gpa, gpa + size) that did not go through the shadow tables. Costs next to
    /// nothing for pages that are not tracked.
    void write_tracked(u64 gpa, u64 size);
    bool is_tracked(u64 gpa) const;

    /// The host's pages of the range move or go away, or their contents change unseen.
    void unmap(u64 gpa, u64 size);
    /// The next store to each page of the range asks host_page() (dirty logging).
    void write_protect(u64 gpa, u64 size);
    /// Drops every table.
    void clear();

    struct Stats {
        u64 fills = 0, unsyncs = 0, syncs = 0, tracked_stores = 0, floods = 0, evictions = 0;
    };
    const Stats& stats() const { return stats_; }
    u32 pages_used() const { return used_; }
    /// Looks for contradictions between its structures, for tests: "" or what is wrong.
    std::string check() const;

  private:
    static constexpr u32 kNone = ShadowMap::kNone;
    enum class Kind : u8 {
        kFree,
        kTable,   ///< shadows the guest's table at `gpa`
        kDirect,  ///< maps memory from `gpa` on in order: part of a large page, or no paging
        kTop,     ///< above the first table in memory of the formats with fewer levels
    };
    /// Rights that the guest's entries above have together; of kDirect: bits of leaf entries.
    enum Rights : u8 { kUser = 1, kWrite = 2, kNoExecute = 4 };
    enum Leaf : u8 { kLeafRead = 1, kLeafWrite = 2, kLeafExecute = 4 };

    /// What is known of one shadow table. Which tables can stand for each other is its identity:
    /// all fields from `kind` to `gpa`.
    struct Page {
        Kind kind = Kind::kFree;
        u8 level = 0;     ///< 1: entries map 4 KiB
        u8 quadrant = 0;  ///< which part of a 32-bit table, which has more than 512 entries' worth
        u8 rights = 0;    ///< Rights, or Leaf of kDirect
        u16 role = 0;     ///< index of roles_; 0 for kDirect
        bool used = false;  ///< lately, for eviction
        u16 present = 0;    ///< entries
        u64 gpa = 0;
        u32 next = kNone;          ///< of the same guest table; of the free
        std::vector<u32> parents;  ///< entries that lead here
    };
    /// A guest page that serves as a table.
    struct GuestTable {
        u64 gfn = 0;
        u32 first = kNone;  ///< shadow pages, by Page::next
        u32 upper = 0;      ///< how many of them are not of the last level
        bool unsync = false;
        u8 writes = 0;  ///< tracked stores since it was last used
    };
    /// What the meaning of a guest entry depends on beside the entry.
    struct Role {
        u32 flags = 0, pkru = 0, pkrs = 0;
        ShadowView view{};
        PagingState paging;
        bool same(const Role& r) const {
            return flags == r.flags && pkru == r.pkru && pkrs == r.pkrs;
        }
    };
    struct RmapNode {
        u32 entry;
        u32 next;
    };

    // An entry is named by page << 9 | index.
    static constexpr u32 entry_id(u32 page, unsigned index) { return page << 9 | index; }
    static constexpr unsigned level_shift(unsigned level) { return 3 + 9 * level; }
    u64* table(u32 page) const { return tables_ + u64{page} * 512; }
    u64& copy(u32 page, unsigned index) { return copies_[u64{page} * 512 + index]; }
    u64 address_of(u32 page) const { return reinterpret_cast<u64>(table(page)); }
    u32 page_at(u64 address) const {
        return static_cast<u32>((address - reinterpret_cast<u64>(tables_)) >> kPageShift);
    }
    static bool is_leaf(u64 entry, unsigned level) { return level == 1 || entry & kPtePageSize; }
    unsigned root_level() const { return paging_.mode == PagingMode::k5Level ? 5 : 4; }

    // shadow.cpp: filling
    std::optional<ShadowFault> fill(u64 gva, PageAccess access, const Translation& page,
                                    const WalkTrace& trace);
    unsigned leaf_level(u64 gpa, unsigned guest_shift, unsigned host_shift, bool write) const;
    u16 intern_role(ShadowView view);
    static u8 leaf_rights(const Role& role, const Translation& page);
    static u64 make_leaf(u64 address, u8 rights, unsigned level);
    u64 read_entry(const Page& page, unsigned index);
    u64 leaf_gpa(u32 page, unsigned index) const;
    u32 root_page(ShadowView view, bool create);
    void find_roots();
    void forget();

    // shadow_sync.cpp: keeping up with the guest's tables
    void resync_entry(u32 page, unsigned index);
    void resync_page(u32 page);
    void resync_bytes(const GuestTable& table, unsigned offset, u64 size);
    void make_unsync(GuestTable& table);
    void sync_table(GuestTable& table);
    void sync_all(bool zap_empty);
    std::optional<Translation> translate_leaf(const Page& page, u64 raw) const;
    bool is_synced_table(u64 gpa) const;

    // shadow_pages.cpp: the pool, identities, links
    u32 get_table(u64 gpa, u8 level, u8 quadrant, u8 rights, u16 role);
    u32 get_untracked(Kind kind, u64 gpa, u8 level, u8 rights, u16 role, bool create = true);
    u32 find_table(u64 gpa, u8 level, u8 quadrant, u8 rights, u16 role) const;
    static u64 untracked_key(Kind kind, u64 gpa, u8 level, u8 rights, u16 role);
    u32 allocate(Kind kind, u64 gpa, u8 level, u8 rights, u16 role);
    GuestTable* table_of(u64 gpa);
    const GuestTable* table_of(u64 gpa) const;
    void link(u32 parent, unsigned index, u32 child, u64 raw);
    void set_leaf(u32 page, unsigned index, u64 entry, u64 raw);
    void drop_entry(u32 page, unsigned index);
    void zap_page(u32 page);
    void zap_table(u64 gpa);
    void make_room(u32 pages);
    bool recently_used(u32 page);
    void count_tables(u64 gpa, int change);
    void flush_now();

    // shadow_rmap.cpp: from guest-physical pages to the entries that map them
    static u64 rmap_key(u64 gpa, unsigned level) { return gpa >> level_shift(level) << 2 | level; }
    void rmap_add(u64 gpa, unsigned level, u32 entry);
    void rmap_remove(u64 gpa, unsigned level, u32 entry);
    void rmap_protect(u64 gpa, unsigned level);
    void protect_page(u64 gpa);
    std::vector<u32> leaves_in(u64 gpa, u64 size) const;

    ShadowHost& host_;
    TableReader reader_;
    PagingState paging_;
    Stats stats_;

    Mapping pool_;  ///< the tables, then the guest entries that theirs were made from
    u64* tables_;
    u64* copies_;
    std::vector<Page> pages_;
    u32 free_ = kNone, used_ = 0, clock_ = 0;
    u32 roots_[kShadowViews];
    u16 role_[kShadowViews]{};  ///< of the present paging state
    std::vector<Role> roles_;

    std::vector<GuestTable> guest_tables_;
    std::vector<u32> free_tables_;
    ShadowMap by_gfn_;         ///< gfn -> index of guest_tables_
    ShadowMap untracked_;      ///< kDirect and kTop pages by identity
    ShadowMap tables_within_;  ///< rmap_key of levels 2 and 3 -> guest tables in there
    std::vector<u64> unsync_;  ///< gfns, some of which may be in sync again or gone
    ShadowMap rmap_;           ///< rmap_key -> first node
    std::vector<RmapNode> nodes_;
    u32 free_nodes_ = kNone;
    bool stale_ = false;  ///< entries lost rights since the last host_.flush()
};

}  // namespace polyvisor
