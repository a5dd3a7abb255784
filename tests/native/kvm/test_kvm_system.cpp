// What is told of a /dev/kvm that cannot be used: each reason, and what it says to do. None of it
// needs a KVM: device files are made here, and the kernel's answers are played.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

#include <cstdlib>
#include <cstring>

#include "base/error.hpp"
#include "check.hpp"
#include "fake_ioctl.hpp"
#include "kvm/system.hpp"

using namespace polyvisor;
using namespace polyvisor::kvm;

namespace {

struct Refusal {
    std::string reason, message;
    bool says(const char* text) const { return message.find(text) != std::string::npos; }
};

template <class Call>
Refusal refusal(Call call) {
    try {
        call();
    } catch (const EngineUnavailable& error) {
        CHECK_EQ(error.engine, std::string("kvm"));
        return {error.reason, error.what()};
    }
    return {};
}

Refusal open(const std::string& path) {
    return refusal([&] { System system(path); });
}

/// A directory that is gone at the end.
struct Scratch {
    char path[32] = "/tmp/pv-system-XXXXXX";
    Scratch() { CHECK(::mkdtemp(path) != nullptr); }
    ~Scratch() {
        ::unlink(file("kvm").c_str());
        ::rmdir(path);
    }
    std::string file(const char* name) const { return std::string(path) + "/" + name; }
};

void no_device() {
    Scratch scratch;
    Refusal missing = open(scratch.file("kvm"));
    CHECK_EQ(missing.reason, std::string("missing"));
    CHECK(missing.says("there is no /tmp/pv-system-") && missing.says("nested virtualization"));
    CHECK_EQ(open("/dev/null/kvm").reason, std::string("missing"));
}

// A device file that no driver serves.
bool no_driver() {
    Scratch scratch;
    if (::mknod(scratch.file("kvm").c_str(), S_IFCHR | 0600, makedev(10, 251)) != 0) return false;
    Refusal refused = open(scratch.file("kvm"));
    if (refused.reason == "permission") return false;  // a file system mounted nodev
    CHECK_EQ(refused.reason, std::string("missing"));
    CHECK(refused.says("no driver behind it") && refused.says("kvm_amd"));
    return true;
}

/// Runs `body` as a user who is not root; its result.
template <class Body>
bool as_somebody(Body body) {
    pid_t child = ::fork();
    if (child == 0) {
        bool dropped = ::geteuid() != 0 || ::setresuid(65534, 65534, 65534) == 0;
        std::_Exit(dropped && body() ? 0 : 1);
    }
    int status = 1;
    ::waitpid(child, &status, 0);
    return status == 0;
}

void no_permission() {
    Scratch scratch;
    std::string path = scratch.file("kvm");
    ::chmod(scratch.path, 0755);
    ::close(::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0));
    CHECK(as_somebody([&] {
        Refusal refused = open(path);
        return refused.reason == "permission" && refused.says("chgrp kvm") && refused.says("chmod");
    }));
    if (::geteuid() != 0) return;
    // A group that may: it is named, by number when it has no name.
    CHECK_EQ(::chown(path.c_str(), 0, 12), 0);  // man, on Debian
    ::chmod(path.c_str(), 0060);
    CHECK(as_somebody([&] {
        Refusal refused = open(path);
        return refused.reason == "permission" && refused.says("usermod -aG") &&
               (refused.says("group man") || refused.says("group 12"));
    }));
    CHECK_EQ(::chown(path.c_str(), 0, 54321), 0);
    CHECK(as_somebody([&] { return open(path).says("group 54321"); }));
}

void something_else() {
    Scratch scratch;
    ::close(::open(scratch.file("kvm").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
    for (const std::string& path : {scratch.file("kvm"), std::string("/dev/null")}) {
        Refusal refused = open(path);
        CHECK_EQ(refused.reason, std::string("broken"));
        CHECK(refused.says("is not KVM's device"));
    }
    CHECK_EQ(open(scratch.path).reason, std::string("broken"));
}

/// A KVM that answers on /dev/null.
struct FakeKvm {
    bool vm_tells_tsc = true;
    int create_error = 0;
    unsigned vms = 0;
    bool little_room = false;

    FakeKvm() {
        auto& answers = pvtest::fake_answers;
        answers[KVM_GET_API_VERSION] = [](int, void*) { return 12; };
        answers[KVM_GET_VCPU_MMAP_SIZE] = [](int, void*) { return 12288; };
        answers[KVM_CHECK_EXTENSION] = [](int, void*) { return 0; };
        answers[KVM_GET_SUPPORTED_CPUID] = [this](int, void* argument) -> long {
            auto* list = static_cast<kvm_cpuid2*>(argument);
            if (little_room && list->nent < 300) return -E2BIG;
            list->nent = 1;
            list->entries[0] = {1, 0, 0, 0xa, 0xb, 0xc, 0xd};
            return 0;
        };
        answers[KVM_GET_MSR_INDEX_LIST] = [this](int, void* argument) -> long {
            auto* list = static_cast<kvm_msr_list*>(argument);
            if (little_room && list->nmsrs < 1000) return -E2BIG;
            list->nmsrs = 3;
            list->indices[0] = 0x10a, list->indices[1] = 0x10, list->indices[2] = 0xc0000080;
            return 0;
        };
        answers[KVM_CREATE_VM] = [this](int, void*) -> long {
            if (create_error != 0) return -create_error;
            ++vms;
            return ::open("/dev/null", O_RDWR | O_CLOEXEC);
        };
        answers[KVM_CREATE_VCPU] = [](int, void*) -> long {
            return ::open("/dev/zero", O_RDWR | O_CLOEXEC);
        };
        answers[KVM_GET_TSC_KHZ] = [this](int fd, void*) -> long {
            struct stat info{};
            ::fstat(fd, &info);
            return vm_tells_tsc || minor(info.st_rdev) == 5 ? 2500000 : -ENOTTY;
        };
    }
    ~FakeKvm() { pvtest::fake_answers.clear(); }
};

void wrong_answers() {
    FakeKvm kvm;
    pvtest::fake_answers[KVM_GET_API_VERSION] = [](int, void*) { return 11; };
    Refusal refused = open("/dev/null");
    CHECK_EQ(refused.reason, std::string("version"));
    CHECK(refused.says("API version 11") && refused.says("12"));
    pvtest::fake_answers[KVM_GET_API_VERSION] = [](int, void*) { return 12; };
    CHECK_EQ(open("/dev/null").reason, std::string());

    pvtest::fake_answers[KVM_GET_VCPU_MMAP_SIZE] = [](int, void*) { return 16; };
    CHECK_EQ(open("/dev/null").reason, std::string("broken"));
    pvtest::fake_answers[KVM_GET_VCPU_MMAP_SIZE] = [](int, void*) { return -EIO; };
    refused = open("/dev/null");
    CHECK_EQ(refused.reason, std::string("broken"));
    CHECK(refused.says("KVM_GET_VCPU_MMAP_SIZE"));
}

void answers() {
    FakeKvm kvm;
    kvm.little_room = true;  // lists that are longer than was thought
    System system("/dev/null");
    CHECK_EQ(system.supported(1, 0, 2), 0xcu);
    CHECK_EQ(system.supported(7, 0, 2), 0u);
    CHECK(system.has_msr(0x10) && system.has_msr(0x10a) && !system.has_msr(0x11));
    CHECK_EQ(system.feature_msr(0x10a), 0u);  // an old kernel

    // The VM that tells the frequency is the first that is asked for.
    CHECK_EQ(system.tsc_khz(), 2'500'000u);
    CHECK_EQ(system.tsc_khz(), 2'500'000u);
    CHECK_EQ(kvm.vms, 1u);
    OwnedFd first = system.create_vm();
    CHECK(static_cast<bool>(first));
    CHECK_EQ(kvm.vms, 1u);
    OwnedFd second = system.create_vm();
    CHECK_EQ(kvm.vms, 2u);

    // Older kernels tell it of vCPUs only; then the VM has one, and is used up.
    kvm.vm_tells_tsc = false;
    System older("/dev/null");
    CHECK_EQ(older.tsc_khz(), 2'500'000u);
    CHECK_EQ(kvm.vms, 3u);
    older.create_vm();
    CHECK_EQ(kvm.vms, 4u);
}

// A child of fork() gets a VM of its own, never its parent's.
void after_fork() {
    FakeKvm kvm;
    System system("/dev/null");
    system.tsc_khz();
    pid_t child = ::fork();
    if (child == 0) {
        system.create_vm();
        std::_Exit(kvm.vms == 2 ? 0 : 1);
    }
    int status = 1;
    ::waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
}

void no_machines() {
    FakeKvm kvm;
    System system("/dev/null");
    kvm.create_error = EBUSY;
    Refusal refused = refusal([&] { system.create_vm(); });
    CHECK_EQ(refused.reason, std::string("busy"));
    CHECK(refused.says("VirtualBox"));
    kvm.create_error = EOPNOTSUPP;
    refused = refusal([&] { make_offer(system); });
    CHECK_EQ(refused.reason, std::string("broken"));
    CHECK(refused.says("makes no virtual machine"));
    // Out of descriptors or memory is no property of the engine.
    kvm.create_error = EMFILE;
    CHECK_THROWS(system.create_vm(), HostError);
}

}  // namespace

int main() {
    no_device();
    if (!no_driver()) std::puts("not root, so no device file without a driver was tried");
    no_permission();
    something_else();
    wrong_answers();
    answers();
    after_fork();
    no_machines();
    return pvtest::finish("test_kvm_system");
}
