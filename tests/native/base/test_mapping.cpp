#include "base/mapping.hpp"

#include <sys/mman.h>

#include <cerrno>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "check.hpp"

using namespace polyvisor;

// mincore() fails with ENOMEM for addresses that are not mapped.
static bool is_mapped(u8* at) {
    unsigned char residency;
    return ::mincore(at, kPageSize, &residency) == 0;
}

static void anonymous_memory_is_zero_and_unmapped_once() {
    u8* at;
    {
        Mapping memory(-1, 0, 4 * kPageSize);
        at = memory.data();
        CHECK_EQ(memory.size(), 4 * kPageSize);
        CHECK_EQ(at[0], 0);
        at[4 * kPageSize - 1] = 7;
        Mapping moved = std::move(memory);
        CHECK(memory.data() == nullptr);
        CHECK(moved.data() == at);
        CHECK_EQ(moved.data()[4 * kPageSize - 1], 7);
    }
    CHECK(!is_mapped(at));
}

static void a_file_is_shared() {
    OwnedFd fd(::memfd_create("test", MFD_CLOEXEC));
    CHECK(fd);
    CHECK_EQ(::ftruncate(fd.get(), 2 * kPageSize), 0);
    Mapping one(fd.get(), 0, 2 * kPageSize);
    Mapping second_page(fd.get(), kPageSize, kPageSize);
    one.data()[kPageSize] = 0x5a;
    CHECK_EQ(second_page.data()[0], 0x5a);
}

static void a_size_that_cannot_be_is_a_host_error() {
    try {
        Mapping absurd(-1, 0, u64{1} << 62);
        CHECK(false);
    } catch (const HostError& error) {
        CHECK_EQ(error.code, ENOMEM);
    }
}

int main() {
    anonymous_memory_is_zero_and_unmapped_once();
    a_file_is_shared();
    a_size_that_cannot_be_is_a_host_error();
    return pvtest::finish("mapping");
}
