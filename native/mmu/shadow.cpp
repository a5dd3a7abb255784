// Filling shadow tables, and walking them.
#include "mmu/shadow.hpp"

#include <algorithm>

#include "mmu/walk_generic.hpp"

namespace polyvisor {
namespace {

constexpr u64 kSeen = kPteAccessed | kPteDirty;
constexpr unsigned kPathPages = 8;      // more than one fill can need
constexpr std::size_t kMaxRoles = 256;  // PKRU alone has 2^32 values: now and then all are dropped

/// What must be the same for anything at all to be kept.
bool same_machine(const PagingState& a, const PagingState& b) {
    return a.a20_mask == b.a20_mask && a.physical_mask == b.physical_mask &&
           a.pages_1gb == b.pages_1gb && a.reserved_large32 == b.reserved_large32;
}

/// Enough for what a fill needs, and few enough for names of entries in 32 bits.
u32 page_budget(const ShadowOptions& options) {
    return std::clamp(options.max_pages, 32u, 1u << 22);
}

u64 entry_address(u64 raw, PagingMode mode) {
    return raw & (mode == PagingMode::k32Bit ? u64{0xffff'f000} : kPteAddress);
}

}  // namespace

std::optional<ShadowHost::Page> HostMemory::host_page(u64 gpa, bool write, u8 shift) {
    const GuestMemory::Region* region = memory_.find(Gpa(gpa));
    if (!region) return {};
    Page page{.address = reinterpret_cast<u64>(region->host(gpa))};
    u8 flags = region->flags(gpa).load(std::memory_order_seq_cst);
    if (write && (flags & kPageDirtyTrack) && !region->read_only) {
        region->note_first_store(gpa);
        flags &= static_cast<u8>(~kPageDirtyTrack);
    }
    page.writable = !region->read_only && !(flags & kPageWriteTraps);
    for (u8 larger : {30, 21}) {
        u64 size = bit(larger), base = align_down(gpa, size);
        if (larger > shift || !region->contains(base) || !region->contains(base + size - 1)) {
            continue;
        }
        if ((page.address ^ gpa) & (size - 1)) continue;
        const auto* first = &region->flags(base);
        auto traps = [](const std::atomic<u8>& of) {
            return (of.load(std::memory_order_relaxed) & kPageWriteTraps) != 0;
        };
        if (std::any_of(first, first + (size >> kPageShift), traps)) continue;
        page.shift = larger;
        break;
    }
    return page;
}

ShadowMmu::ShadowMmu(GuestMemory& memory, ShadowHost& host, ShadowOptions options)
    : host_(host),
      reader_(memory),
      pool_(-1, 0, u64{page_budget(options)} * 2 * kPageSize),
      tables_(reinterpret_cast<u64*>(pool_.data())),
      copies_(tables_ + u64{page_budget(options)} * 512),
      pages_(page_budget(options)) {
    for (u32 n = static_cast<u32>(pages_.size()); n-- != 0;) {
        pages_[n].next = free_;
        free_ = n;
    }
    find_roots();
}

void ShadowMmu::load(const PagingState& paging) {
    if (!same_machine(paging_, paging)) forget();
    paging_ = paging;
    sync_all(true);
    find_roots();
    flush_now();
}

void ShadowMmu::set_keys(u32 pkru, u32 pkrs) {
    paging_.pkru = pkru;
    paging_.pkrs = pkrs;
    find_roots();
    flush_now();
}

void ShadowMmu::clear() {
    for (u32 n = 0; n < pages_.size(); ++n) {
        if (pages_[n].kind != Kind::kFree) zap_page(n);
    }
    unsync_.clear();
    flush_now();
}

void ShadowMmu::forget() {
    clear();
    roles_.clear();
}

// ---- roles and roots

u16 ShadowMmu::intern_role(ShadowView view) {
    const PagingState& s = paging_;
    bool user = view == ShadowView::kUser;
    Role role;
    role.view = view;
    role.paging = s;
    // Only what makes a difference to the view, so that tables are shared across the rest.
    bool user_keys = s.pke && view != ShadowView::kSupervisorNoUser;
    bool supervisor_keys = s.pks && !user;
    role.flags = static_cast<u32>(s.mode) | static_cast<u32>(view) << 3 |
                 (s.wp && !user ? 1u << 5 : 0) | (s.smep && !user ? 1u << 6 : 0) |
                 (s.nxe ? 1u << 7 : 0) | (s.pse ? 1u << 8 : 0) | (user_keys ? 1u << 9 : 0) |
                 (supervisor_keys ? 1u << 10 : 0);
    role.paging.smap = true;  // whether it forbids anything is what tells the views apart
    role.paging.pke = user_keys;
    role.paging.pks = supervisor_keys;
    if (user_keys) role.pkru = s.pkru;
    if (supervisor_keys) role.pkrs = s.pkrs;
    auto found = std::find_if(roles_.begin(), roles_.end(),
                              [&](const Role& other) { return other.same(role); });
    if (found == roles_.end()) found = roles_.insert(found, role);
    return static_cast<u16>(found - roles_.begin());
}

void ShadowMmu::find_roots() {
    if (roles_.size() + kShadowViews > kMaxRoles) forget();
    for (unsigned n = 0; n < kShadowViews; ++n) {
        auto view = static_cast<ShadowView>(n);
        role_[n] = intern_role(view);
        roots_[n] = root_page(view, false);
    }
}

u32 ShadowMmu::root_page(ShadowView view, bool create) {
    u32& root = roots_[static_cast<unsigned>(view)];
    u16 role = role_[static_cast<unsigned>(view)];
    if (create && root != kNone) return root;
    u8 level = static_cast<u8>(root_level());
    u64 cr3 = entry_address(paging_.cr3, paging_.mode) & paging_.a20_mask;
    switch (paging_.mode) {
        case PagingMode::k4Level:
        case PagingMode::k5Level:
            root = create ? get_table(cr3, level, 0, kUser | kWrite, role)
                          : find_table(cr3, level, 0, kUser | kWrite, role);
            break;
        case PagingMode::kNone:
            root = get_untracked(Kind::kDirect, 0, level, kLeafRead | kLeafWrite | kLeafExecute, 0,
                                 create);
            break;
        case PagingMode::kPae:
        case PagingMode::k32Bit: {
            if (paging_.mode == PagingMode::kPae) cr3 = align_down(paging_.cr3, 32);
            root = get_untracked(Kind::kTop, cr3, level, 0, role, create);
            if (paging_.mode == PagingMode::k32Bit) break;
            // The registers may have been loaded with something else from the same address.
            u32 below = get_untracked(Kind::kTop, cr3, 3, 0, role, false);
            for (unsigned n = 0; below != kNone && n < 4; ++n) {
                if (copy(below, n) != paging_.pdpte[n]) drop_entry(below, n);
            }
            break;
        }
    }
    return root;
}

u64 ShadowMmu::root(ShadowView view) const {
    u32 page = roots_[static_cast<unsigned>(view)];
    return page == kNone ? 0 : address_of(page);
}

// ---- rights and entries

// What the view may do with a page of these rights: the walker's own rule, asked once per use.
u8 ShadowMmu::leaf_rights(const Role& role, const Translation& page) {
    if (role.paging.mode == PagingMode::kNone) return kLeafRead | kLeafWrite | kLeafExecute;
    PageAccess access{.user = role.view == ShadowView::kUser,
                      .ac = role.view == ShadowView::kSupervisor};
    auto allowed = [&](PageAccess use) {
        Translation copy = page;
        return mmu_detail::check_rights(role.paging, use, copy) == 0;
    };
    u8 rights = allowed(access) ? kLeafRead : 0;
    access.write = true;
    if (rights && allowed(access)) rights |= kLeafWrite;
    access.write = false;
    access.fetch = true;
    if (allowed(access)) rights |= kLeafExecute;
    return rights;
}

u64 ShadowMmu::make_leaf(u64 address, u8 rights, unsigned level) {
    if (!(rights & (kLeafRead | kLeafExecute))) return 0;
    return address | kPtePresent | kPteUser | kPteAccessed | kPteDirty |
           (rights & kLeafWrite ? u64{kPteWritable} : 0) |
           (rights & kLeafExecute ? 0 : u64{kPteNoExecute}) |
           (rights & kLeafRead ? 0 : kShadowExecuteOnlyKey << 59) |
           (level > 1 ? u64{kPtePageSize} : 0);
}

u64 ShadowMmu::read_entry(const Page& page, unsigned index) {
    bool narrow = roles_[page.role].paging.mode == PagingMode::k32Bit;
    u64 gpa = page.gpa + index * 8;
    if (narrow) {  // an entry of a directory is two of ours: each maps 4 MB
        unsigned n =
            page.level == 1 ? page.quadrant * 512u + index : page.quadrant * 256u + index / 2;
        gpa = page.gpa + n * 4;
    }
    const u8* host = reader_.entry(gpa);
    if (!host) return narrow ? 0xffff'ffff : ~u64{0};
    return narrow ? __atomic_load_n(reinterpret_cast<const u32*>(host), __ATOMIC_RELAXED)
                  : __atomic_load_n(reinterpret_cast<const u64*>(host), __ATOMIC_RELAXED);
}

u64 ShadowMmu::leaf_gpa(u32 id, unsigned index) const {
    const Page& page = pages_[id];
    unsigned shift = level_shift(page.level);
    if (page.kind == Kind::kDirect) return (page.gpa + (u64{index} << shift)) & paging_.a20_mask;
    u64 raw = copies_[u64{id} * 512 + index];
    PagingMode mode = roles_[page.role].paging.mode;
    u64 address = entry_address(raw, mode);
    if (mode == PagingMode::k32Bit && page.level == 2) {  // PSE-36, and which half of the 4 MB
        address = (raw & 0xffc0'0000) | bits(raw, 20, 13) << 32 | u64{index & 1} << 21;
    }
    return align_down(address, bit(shift)) & paging_.a20_mask;
}

// ---- faults

ShadowFault ShadowMmu::fault(u64 gva, PageAccess access) {
    if (unsync_.size() > 4 * pages_.size()) sync_all(true);
    for (;;) {  // again when another vCPU changed the tables meanwhile
        make_room(kPathPages);
        WalkResult seen = walk(reader_, paging_, gva, access);
        std::optional<ShadowFault> done;
        if (seen.fault) {
            done = {ShadowFault::kGuestFault, seen.error, 0};
        } else {
            WalkTrace trace;
            seen = walk_trace(reader_, paging_, gva, access, trace);
            if (!seen.fault) done = fill(gva, access, seen.page, trace);
        }
        flush_now();
        if (done) return *done;
    }
}

/// The largest shadow page that may map `gpa`.
unsigned ShadowMmu::leaf_level(u64 gpa, unsigned guest_shift, unsigned host_shift,
                               bool write) const {
    unsigned level = (std::min(guest_shift, host_shift) - 3) / 9;
    if (paging_.a20_mask != ~u64{0}) return 1;  // a block of 2 MB is not contiguous
    // Stores to tables must be seen, those to the rest of the block need not.
    while (write && level > 1 && tables_within_.find(rmap_key(gpa, level)) != kNone) --level;
    return level;
}

// Builds the path and the leaf for what a walk found. Nothing when a table has changed since: each
// is tracked before its entry is read again here, so what is installed is what was there later.
std::optional<ShadowFault> ShadowMmu::fill(u64 gva, PageAccess access, const Translation& found,
                                           const WalkTrace& trace) {
    ShadowView view = shadow_view(paging_, access);
    u16 role = role_[static_cast<unsigned>(view)];
    unsigned guest_shift = paging_.mode == PagingMode::kNone ? 30 : found.shift;
    auto place = host_.host_page(found.gpa, access.write, static_cast<u8>(guest_shift));
    if (!place) return ShadowFault{ShadowFault::kNotMemory, 0, found.gpa};
    if (access.write && !place->writable) return ShadowFault{ShadowFault::kStore, 0, found.gpa};

    u8 guest_rights = leaf_rights(roles_[role], found);
    // D is set by now, unless the table is in ROM.
    if (!found.dirty && !access.write) guest_rights &= static_cast<u8>(~kLeafWrite);
    u8 rights = guest_rights & static_cast<u8>(place->writable ? ~0 : ~kLeafWrite);
    unsigned target = leaf_level(found.gpa, guest_shift, place->shift, rights & kLeafWrite);

    u32 page = root_page(view, true);
    u8 above = kUser | kWrite;
    const WalkTrace::Step* step = trace.steps.data();
    const WalkTrace::Step* last = step + trace.count - 1;
    for (unsigned level = root_level();; --level) {
        pages_[page].used = true;
        const Page p = pages_[page];
        unsigned index = gva >> level_shift(level) & 511;
        bool direct = p.kind == Kind::kDirect;
        u64 raw = 0;
        if (p.kind == Kind::kTable) {
            table_of(p.gpa)->writes = 0;
            raw = read_entry(p, index);
            if ((raw ^ step->entry) & ~(raw & kSeen)) return {};
            direct = step == last;
            if (!(raw & kPteUser)) above &= static_cast<u8>(~kUser);
            if (!(raw & kPteWritable)) above &= static_cast<u8>(~kWrite);
            if (paging_.nxe && (raw & kPteNoExecute)) above |= kNoExecute;
            ++step;
        }
        if (level == target) {
            u64 base = align_down(found.gpa, bit(level_shift(level)));
            if (rights & kLeafWrite) {
                if (level > 1) {  // the path itself may have put a table there
                    if (tables_within_.find(rmap_key(base, level)) != kNone) return {};
                } else if (GuestTable* table = table_of(base); table && !table->unsync) {
                    if (!access.write) {
                        rights &= static_cast<u8>(~kLeafWrite);
                    } else if (table->upper != 0) {
                        return ShadowFault{ShadowFault::kStore, 0, found.gpa};
                    } else {
                        make_unsync(*table);
                    }
                }
            }
            set_leaf(page, index, make_leaf(place->address - (found.gpa - base), rights, level),
                     raw);
            ++stats_.fills;
            return ShadowFault{ShadowFault::kInstalled, 0, found.gpa};
        }
        u8 below = static_cast<u8>(level - 1);
        u32 child;
        if (direct) {
            child = get_untracked(Kind::kDirect, align_down(found.gpa, bit(level_shift(level))),
                                  below, guest_rights, 0);
        } else if (p.kind == Kind::kTop && level == 4) {
            child = get_untracked(Kind::kTop, p.gpa, below, 0, role);
        } else {
            u8 quadrant = 0;
            if (p.kind == Kind::kTop) {
                bool pae = paging_.mode == PagingMode::kPae;
                raw = pae ? (step++)->entry : paging_.cr3;
                if (!pae) quadrant = static_cast<u8>(index);
            } else if (paging_.mode == PagingMode::k32Bit) {
                quadrant = index & 1;
            }
            u64 gpa = entry_address(raw, paging_.mode) & paging_.a20_mask;
            child = get_table(gpa, below, quadrant, above, role);
        }
        link(page, index, child, raw);
        page = child;
    }
}

ShadowHit ShadowMmu::lookup(u64 gva, PageAccess access) {
    u32 page = roots_[static_cast<unsigned>(shadow_view(paging_, access))];
    if (page == kNone) return {};
    for (unsigned level = root_level();; --level) {
        u64& entry = table(page)[gva >> level_shift(level) & 511];
        if (!(entry & kPtePresent)) return {};
        if (!(entry & kPteAccessed)) entry |= kPteAccessed;
        if (!is_leaf(entry, level)) {
            page = page_at(entry & kPteAddress);
            continue;
        }
        ShadowHit hit;
        hit.shift = static_cast<u8>(level_shift(level));
        u64 offset = bit(hit.shift) - 1;
        hit.address = (entry & kPteAddress & ~offset) | (gva & offset);
        hit.readable = bits(entry, 62, 59) != kShadowExecuteOnlyKey;
        hit.writable = hit.readable && (entry & kPteWritable);
        hit.executable = !(entry & kPteNoExecute);
        hit.ok = access.fetch ? hit.executable : access.write ? hit.writable : hit.readable;
        return hit;
    }
}

}  // namespace polyvisor
