// Memslots over GuestMemory: what KVM is told, what it is told only once, and its refusals.
#include "kvm/memslots.hpp"

#include <fcntl.h>

#include "base/error.hpp"
#include "flat_guest.hpp"
#include "kvm/ioctl.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;

namespace {

// A VM without anything else.
struct SmallVm {
    System system;
    OwnedFd fd = system.create_vm();
    GuestMemory memory;

    /// Whether KVM has a slot of this number that logs writes: only then it has a bitmap to give.
    bool logs(u32 slot, const GuestMemory::Region& region) const {
        std::vector<u64> bitmap(region.bitmap_words());
        kvm_dirty_log request{};
        request.slot = slot;
        request.dirty_bitmap = bitmap.data();
        return try_ioctl(fd.get(), KVM_GET_DIRTY_LOG, &request) == 0;
    }
    /// Whether KVM has a slot at these addresses: another one is refused then.
    bool has_slot_at(u64 gpa) const {
        auto mapping = Mapping(-1, 0, kPageSize);
        kvm_userspace_memory_region region{};
        region.slot = 500;
        region.guest_phys_addr = gpa;
        region.memory_size = kPageSize;
        region.userspace_addr = reinterpret_cast<u64>(mapping.data());
        int result = try_ioctl(fd.get(), KVM_SET_USER_MEMORY_REGION, &region);
        if (result == -EEXIST) return true;
        CHECK_EQ(result, 0);
        region.memory_size = 0;
        CHECK_EQ(try_ioctl(fd.get(), KVM_SET_USER_MEMORY_REGION, &region), 0);
        return false;
    }
};

void one_per_region() {
    SmallVm vm;
    auto& high = vm.memory.add(Gpa(u64{1} << 32), 0x200000, "high");
    auto& rom = vm.memory.add(Gpa(0xfffe0000), 0x20000, "rom", true);
    Memslots slots(vm.fd.get(), vm.memory, 8);
    CHECK(slots.slots().empty());
    CHECK(!vm.has_slot_at(0xfffe0000));
    slots.sync();
    auto made = slots.slots();
    CHECK_EQ(made.size(), 2u);
    CHECK(made[0].region == &rom && made[0].flags == KVM_MEM_READONLY);
    CHECK(made[1].region == &high && made[1].flags == 0);
    CHECK(vm.has_slot_at(0xfffff000));
    CHECK(!vm.has_slot_at(0xfffdf000));
    CHECK(vm.has_slot_at((u64{1} << 32) + 0x1ff000));

    // One more, below them: the others keep their ids.
    auto& low = vm.memory.add(Gpa(0), 0xa0000, "low");
    slots.sync();
    slots.sync();
    made = slots.slots();
    CHECK_EQ(made.size(), 3u);
    CHECK(made[1].region == &high && made[2].region == &low);
    for (u32 id = 0; id < made.size(); ++id) CHECK_EQ(made[id].id, id);
    CHECK(vm.has_slot_at(0x9f000));
}

void logging() {
    SmallVm vm;
    auto& ram = vm.memory.add(Gpa(0), 0x100000, "ram");
    auto& rom = vm.memory.add(Gpa(0xf0000000), 0x10000, "rom", true);
    Memslots slots(vm.fd.get(), vm.memory, 8);
    slots.sync();
    CHECK(!vm.logs(0, ram));
    slots.log_dirty(true);
    slots.log_dirty(true);
    CHECK(vm.logs(0, ram));
    CHECK(!vm.logs(1, rom));  // nobody can write it
    CHECK_EQ(slots.slots()[0].flags, static_cast<u32>(KVM_MEM_LOG_DIRTY_PAGES));
    CHECK_EQ(slots.slots()[1].flags, static_cast<u32>(KVM_MEM_READONLY));
    auto& more = vm.memory.add(Gpa(0x200000), 0x1000, "more");
    slots.sync();
    CHECK(vm.logs(2, more));
    slots.log_dirty(false);
    CHECK(!vm.logs(0, ram));
    CHECK(!vm.logs(2, more));
}

void refusals() {
    SmallVm vm;
    for (u64 n = 0; n < 4; ++n) vm.memory.add(Gpa(n * 0x2000), 0x1000, "piece");
    Memslots few(vm.fd.get(), vm.memory, 3);
    try {
        few.sync();
        CHECK(false);
    } catch (const ConfigError& error) {
        CHECK_EQ(error.field, std::string("memory"));
        CHECK(std::string(error.what()).find("4 regions") != std::string::npos);
        CHECK(std::string(error.what()).find("only 3") != std::string::npos);
    }
    CHECK(few.slots().empty());

    // What KVM itself refuses says which region it was.
    OwnedFd closed(::open("/dev/null", O_RDWR));
    Memslots wrong(closed.get(), vm.memory, 8);
    try {
        wrong.sync();
        CHECK(false);
    } catch (const HostError& error) {
        CHECK_EQ(error.code, ENOTTY);
        CHECK(std::string(error.what()).find("'piece' at 0x0+0x1000, slot 0") != std::string::npos);
    }
    CHECK(wrong.slots().empty());
    Memslots right(vm.fd.get(), vm.memory, 4);
    right.sync();
    CHECK_EQ(right.slots().size(), 4u);
}

}  // namespace

int main() {
    if (!pvtest::have_kvm()) return 77;
    one_per_region();
    logging();
    refusals();
    return pvtest::finish("test_memslots");
}
