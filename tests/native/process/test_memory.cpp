// Memory of processes against a model that knows each page by itself: mapping, protecting, moving,
// writing, forking and resetting in random order. What a program could see is asked from the page
// walker, and what system calls see from the address space.
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>

#include "check.hpp"
#include "memory_model.hpp"
#include "random.hpp"

using namespace pvtest;

namespace {

constexpr u64 kBase = 0x1000'0000, kWindow = 3000;  // pages
constexpr u64 kFilePages = 700;

std::shared_ptr<OwnedFd> make_file(u64 pages, u64 seed, std::vector<std::shared_ptr<Page>>& into) {
    auto file = std::make_shared<OwnedFd>(::memfd_create("test", MFD_CLOEXEC));
    Random random(seed);
    for (u64 n = 0; n < pages; ++n) {
        auto page = std::make_shared<Page>();
        for (u64 at = 0; at < kPageSize; at += 64) (*page)[at] = static_cast<u8>(random.next());
        CHECK(::pwrite(file->get(), page->data(), kPageSize, static_cast<off_t>(n * kPageSize)) ==
              static_cast<ssize_t>(kPageSize));
        into.push_back(page);
    }
    return file;
}

class Walk {
  public:
    Walk(u64 seed, AddressSpace::Files files)
        : random_(seed),
          files_(files),
          read_file_(make_file(kFilePages, seed, read_pages_)),
          shared_file_(make_file(kFilePages, seed + 1, shared_pages_)) {
        worlds_.push_back(std::make_unique<World>(files));
    }
    void run(int steps) {
        for (int n = 0; n < steps && pvtest::failures == 0; ++n) {
            World& world = *worlds_[random_.below(static_cast<u32>(worlds_.size()))];
            const u32 what = random_.below(100);
            if (what < 22)
                map(world);
            else if (what < 28)
                unmap(world);
            else if (what < 40)
                protect(world);
            else if (what < 48)
                remap(world);
            else if (what < 52)
                discard(world);
            else if (what < 54)
                advise_fork(world);
            else if (what < 90)
                touch(world);
            else if (what < 93)
                fork(world);
            else if (what < 94)
                freeze(world);
            else if (what < 99)
                reset(world);
            else
                clear(world);
            if (n % 64 == 0) {
                for (auto& one : worlds_) compare(*one);
            }
            if (pvtest::failures != 0) std::fprintf(stderr, "step %d, choice %u\n", n, what);
        }
        for (auto& one : worlds_) compare(*one);
    }

  private:
    struct World {
        explicit World(AddressSpace::Files files) : memory(files) {}
        Memory memory;
        Model model;
        std::optional<Memory::State> frozen;
        Model frozen_model;
    };
    struct Range {
        u64 address, size;
    };
    Range range() {
        const u64 most = random_.one_in(8) ? 700 : 24;
        const u64 page = random_.below(kWindow);
        const u64 size = 1 + random_.below(static_cast<u32>(std::min(most, kWindow - page)));
        return {kBase + page * kPageSize, size * kPageSize};
    }
    u8 rights() {
        return random_.pick<u8>({0, kReadable, kReadable | kWritable, kReadable | kWritable,
                                 kReadable | kExecutable, kReadable | kWritable | kExecutable});
    }
    static void erase(Model& model, u64 address, u64 size) {
        model.pages.erase(model.pages.lower_bound(address >> kPageShift),
                          model.pages.lower_bound((address + size) >> kPageShift));
    }

    void map(World& world) {
        const Range at = range();
        AddressSpace::Request request;
        request.address = at.address;
        request.size = at.size;
        request.fixed = true;
        request.rights = rights();
        const u32 kind = random_.below(8);
        const u64 pages = at.size >> kPageShift;
        const u64 first =
            pages < kFilePages ? random_.below(static_cast<u32>(kFilePages - pages)) : 0;
        const bool file = kind <= 2 && pages <= kFilePages;
        const std::vector<std::shared_ptr<Page>>* content = nullptr;
        if (file) {
            const bool shared = kind == 2;
            request.file = shared ? shared_file_ : read_file_;
            request.shared = shared;
            request.offset = first * kPageSize;
            content = shared ? &shared_pages_ : &read_pages_;
        } else if (kind == 3) {
            request.shared = true;
        }
        CHECK_EQ(world.memory.space->map(request), static_cast<s64>(at.address));
        erase(world.model, at.address, at.size);
        ++mapping_;
        for (u64 n = 0; n < pages; ++n) {
            ModelPage page;
            page.rights = request.rights;
            page.mapping = mapping_;
            page.shared = request.shared;
            if (content != nullptr) page.data = (*content)[first + n];
            if (!content && request.shared) page.data = std::make_shared<Page>();
            page.original = page.data;
            world.model.pages[(at.address >> kPageShift) + n] = page;
        }
    }

    void unmap(World& world) {
        const Range at = range();
        CHECK_EQ(world.memory.space->unmap(at.address, at.size), s64{0});
        erase(world.model, at.address, at.size);
    }

    void protect(World& world) {
        const Range at = range();
        const u8 wanted = rights();
        const bool all = world.model.mapped(at.address, at.size);
        CHECK_EQ(world.memory.space->protect(at.address, at.size, wanted), all ? 0 : s64{-ENOMEM});
        if (!all) return;
        for (u64 n = 0; n < at.size >> kPageShift; ++n) {
            world.model.pages.at((at.address >> kPageShift) + n).rights = wanted;
        }
    }

    void remap(World& world) {
        Range at = range();
        // What is of one mapping, since neighbours may be one to the other and not to us.
        auto first = world.model.pages.find(at.address >> kPageShift);
        if (first == world.model.pages.end()) return;
        u64 pages = 0;
        for (auto page = first; page != world.model.pages.end(); ++page, ++pages) {
            if (page->first != first->first + pages || pages == at.size >> kPageShift ||
                page->second.mapping != first->second.mapping ||
                page->second.rights != first->second.rights ||
                page->second.on_fork != first->second.on_fork) {
                break;
            }
        }
        AddressSpace::Remap request;
        request.address = at.address;
        request.old_size = pages * kPageSize;
        request.may_move = request.fixed = true;
        request.new_size = request.old_size;
        const bool zeroes = !first->second.shared && !first->second.original;
        if (zeroes && random_.one_in(3)) request.new_size += random_.below(9) * kPageSize;
        if (random_.one_in(3)) request.new_size = (1 + random_.below(pages)) * kPageSize;
        request.keep = zeroes && request.new_size == request.old_size && random_.one_in(4);
        request.target = range().address;
        const u64 end = kBase + kWindow * kPageSize;
        if (request.target + request.new_size > end) return;
        const bool overlaps = request.target < request.address + request.old_size &&
                              request.address < request.target + request.new_size;
        const s64 made = world.memory.space->remap(request);
        CHECK_EQ(made, overlaps ? s64{-EINVAL} : static_cast<s64>(request.target));
        if (overlaps) return;
        std::vector<ModelPage> moved;
        for (u64 n = 0; n < request.new_size >> kPageShift; ++n) {
            if (n < pages) {
                moved.push_back(world.model.pages.at((at.address >> kPageShift) + n));
                continue;
            }
            moved.push_back(moved.back());
            moved.back().data = nullptr;
        }
        if (request.keep) {
            for (u64 n = 0; n < pages; ++n) {
                world.model.pages.at((at.address >> kPageShift) + n).data = nullptr;
            }
        } else {
            erase(world.model, at.address, request.old_size);
        }
        for (u64 n = 0; n < moved.size(); ++n) {
            world.model.pages[(request.target >> kPageShift) + n] = moved[n];
        }
    }

    void discard(World& world) {
        const Range at = range();
        const bool all = world.model.mapped(at.address, at.size);
        CHECK_EQ(world.memory.space->discard(at.address, at.size), all ? 0 : s64{-ENOMEM});
        for (u64 n = 0; n < at.size >> kPageShift; ++n) {
            auto page = world.model.pages.find((at.address >> kPageShift) + n);
            if (page == world.model.pages.end() || page->second.shared) continue;
            page->second.data = page->second.original;
        }
    }

    void advise_fork(World& world) {
        const Range at = range();
        const auto what = random_.pick({AddressSpace::OnFork::kCopied, AddressSpace::OnFork::kGone,
                                        AddressSpace::OnFork::kWiped});
        if (!world.model.mapped(at.address, at.size)) return;
        for (u64 n = 0; n < at.size >> kPageShift; ++n) {  // only of what is private and no file's
            const ModelPage& page = world.model.pages.at((at.address >> kPageShift) + n);
            if (what == AddressSpace::OnFork::kWiped && (page.shared || page.original)) return;
        }
        CHECK_EQ(world.memory.space->set_on_fork(at.address, at.size, what), s64{0});
        for (u64 n = 0; n < at.size >> kPageShift; ++n) {
            world.model.pages.at((at.address >> kPageShift) + n).on_fork = what;
        }
    }

    // An access as the CPU makes it, or as a system call does.
    void touch(World& world) {
        for (int n = 0; n < 8; ++n) {
            const Range at = range();
            const u64 address = at.address + random_.below(kPageSize / 64) * 64;
            const u8 may = world.model.rights(address);
            const u8 value = static_cast<u8>(random_.next());
            const bool there = world.model.pages.contains(address >> kPageShift);
            switch (random_.below(5)) {
                case 0:
                case 1: {
                    u8* host = world.memory.access(address, true);
                    CHECK_EQ(host != nullptr, (may & kWritable) != 0);
                    if (host == nullptr) {
                        CHECK(world.memory.last == (there ? AddressSpace::Fault::kForbidden
                                                          : AddressSpace::Fault::kNotMapped));
                        break;
                    }
                    *host = value;
                    world.model.write(address, value);
                    break;
                }
                case 2: {
                    CHECK_EQ(world.memory.space->store(address, value), (may & kWritable) != 0);
                    if (may & kWritable) world.model.write(address, value);
                    break;
                }
                case 3: {
                    const bool fetch = random_.one_in(2);
                    const u8* host = world.memory.access(address, false, fetch);
                    CHECK_EQ(host != nullptr, (may & (fetch ? kExecutable : kReadable)) != 0);
                    if (host != nullptr) CHECK_EQ(*host, world.model.read(address));
                    break;
                }
                default: {
                    u8 got = 0;
                    CHECK_EQ(world.memory.space->load(address, got), (may & kReadable) != 0);
                    if (may & kReadable) CHECK_EQ(got, world.model.read(address));
                }
            }
        }
    }

    void fork(World& parent) {
        if (worlds_.size() >= 5) worlds_.erase(worlds_.begin() + random_.below(5));
        // (`parent` may have been that one.)
        World& from = *worlds_[random_.below(static_cast<u32>(worlds_.size()))];
        (void)parent;
        auto child = std::make_unique<World>(files_);
        child->memory.arena.fork(from.memory.arena, random_.one_in(2));
        child->memory.restore(from.memory.state(), true);
        child->model = from.model;
        from.frozen.reset();  // its arena may have another image
        for (auto page = child->model.pages.begin(); page != child->model.pages.end();) {
            if (page->second.on_fork == AddressSpace::OnFork::kWiped) page->second.data = nullptr;
            const bool gone = page->second.on_fork == AddressSpace::OnFork::kGone;
            page = gone ? child->model.pages.erase(page) : std::next(page);
        }
        worlds_.push_back(std::move(child));
    }

    // As a template: everything it has, but what it shares, is in the image.
    void freeze(World& world) {
        const auto files = random_.pick({Arena::Files::kKept, Arena::Files::kCopied});
        world.memory.arena.adopt(world.memory.arena.freeze(files));
        world.memory.restore(world.memory.state());
        world.frozen = world.memory.state();
        world.frozen_model = world.model;
        if (random_.one_in(2) && worlds_.size() < 5) {
            auto child = std::make_unique<World>(files_);
            child->memory.arena.adopt(world.memory.arena.image());
            child->memory.restore(*world.frozen);
            child->frozen = world.frozen;
            child->model = child->frozen_model = world.frozen_model;
            worlds_.push_back(std::move(child));
        }
    }

    void reset(World& world) {
        if (!world.frozen) return;
        world.memory.arena.reset();
        world.memory.restore(*world.frozen);
        world.model = world.frozen_model;
    }

    void clear(World& world) {
        world.memory.space->clear();
        CHECK_EQ(world.memory.space->used(), u64{0});
        CHECK_EQ(world.memory.arena.allocated(), u64{0});
        if (random_.one_in(2)) {
            world.memory.arena.clear();
            world.memory.start();
            world.frozen.reset();
        }
        world.model = {};
    }

    void compare(World& world) {
        const AddressSpace& space = *world.memory.space;
        u64 mapped = 0;
        for (const auto& [start, area] : space.areas()) mapped += area.end - start;
        CHECK_EQ(mapped, world.model.pages.size() * kPageSize);
        static const Page kZeroes{};
        for (const auto& [number, page] : world.model.pages) {
            if (page.rights == 0) continue;
            Page got;
            const bool good = space.copy_in(number * kPageSize, got);
            CHECK(good);
            if (good) CHECK((page.data ? *page.data : kZeroes) == got);
            if (pvtest::failures != 0) {
                std::fprintf(stderr, "page %llx of seed\n", (unsigned long long)number);
                return;
            }
        }
    }

    Random random_;
    AddressSpace::Files files_;
    std::vector<std::shared_ptr<Page>> read_pages_, shared_pages_;
    std::shared_ptr<OwnedFd> read_file_, shared_file_;
    std::vector<std::unique_ptr<World>> worlds_;
    int mapping_ = 0;
};

}  // namespace

int main() {
    const u64 first = environment_number("PV_SEED", 1), count = environment_number("PV_RUNS", 12);
    for (u64 seed = first; seed < first + count && pvtest::failures == 0; ++seed) {
        for (auto files : {AddressSpace::Files::kMapped, AddressSpace::Files::kCopied}) {
            Walk(seed, files).run(1500);
            if (pvtest::failures != 0)
                std::fprintf(stderr, "seed %llu\n", (unsigned long long)seed);
        }
    }
    return pvtest::finish("memory");
}
