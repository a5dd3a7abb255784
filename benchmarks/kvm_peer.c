/* The least that a program must do to run a guest on /dev/kvm, as a measure for what polyvisor adds:
 * one VM, one vCPU, one loop around KVM_RUN, no checks that are not needed.
 *
 *     kvm_peer exits port|memory COUNT   serves COUNT accesses of a guest that does nothing else;
 *                                        prints wall and CPU nanoseconds of the loop
 *     kvm_peer start COUNT               from KVM_CREATE_VM to the first exit, COUNT times; prints
 *                                        wall and CPU nanoseconds of each
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (2u << 20)
#define ORIGIN 0x7c00
#define PORT 0x3ff
#define ADDRESS 0xe00f8000ull
#define EXIT_PORT 0xf4

struct vm {
    int fd, vcpu;
    uint8_t *memory;
    struct kvm_run *run;
};

static int kvm;
static size_t run_size;
static struct kvm_cpuid2 *cpuid;

static int check(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(2);
    }
    return result;
}

static uint64_t now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void open_kvm(void) {
    kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    run_size = (size_t)check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    cpuid = calloc(1, sizeof *cpuid + 256 * sizeof *cpuid->entries);
    cpuid->nent = 256;
    check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
}

static struct vm make(const uint8_t *code, size_t size) {
    struct vm vm;
    vm.fd = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    uint64_t identity_map = 0xfeffc000;
    check(ioctl(vm.fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    check(ioctl(vm.fd, KVM_SET_TSS_ADDR, 0xfeffd000), "KVM_SET_TSS_ADDR");
    check(ioctl(vm.fd, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    struct kvm_pit_config pit = {0};
    check(ioctl(vm.fd, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
    vm.memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (vm.memory == MAP_FAILED) check(-1, "mmap");
    struct kvm_userspace_memory_region region = {0, 0, 0, MEMORY, (uintptr_t)vm.memory};
    check(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    memcpy(vm.memory + ORIGIN, code, size);

    vm.vcpu = check(ioctl(vm.fd, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    vm.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm.vcpu, 0);
    if (vm.run == MAP_FAILED) check(-1, "mmap of kvm_run");
    check(ioctl(vm.vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    struct kvm_sregs sregs;
    check(ioctl(vm.vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    /* Flat 4 GiB data segments in real mode, as after a visit to protected mode. */
    sregs.ds.limit = 0xffffffff;
    sregs.ds.g = 1;
    check(ioctl(vm.vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = ORIGIN, .rflags = 2};
    check(ioctl(vm.vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    return vm;
}

static void destroy(struct vm *vm) {
    munmap(vm->run, run_size);
    close(vm->vcpu);
    close(vm->fd);
    munmap(vm->memory, MEMORY);
}

static volatile uint8_t device;

static void exits(int port, uint32_t count) {
    uint8_t code[64];
    size_t at = 0;
#define BYTES(...)                                       \
    do {                                                 \
        static const uint8_t bytes[] = {__VA_ARGS__};    \
        memcpy(code + at, bytes, sizeof bytes);          \
        at += sizeof bytes;                              \
    } while (0)
    BYTES(0x66, 0xb9); /* mov ecx, count */
    memcpy(code + at, &count, 4);
    at += 4;
    if (port) {
        BYTES(0xba, PORT & 0xff, PORT >> 8); /* mov dx, PORT */
        BYTES(0xee);                         /* out dx, al */
        BYTES(0x66, 0x49, 0x75, 0xfb);       /* dec ecx; jnz to the access */
    } else {
        uint32_t address = ADDRESS;
        BYTES(0x66, 0xbb); /* mov ebx, ADDRESS */
        memcpy(code + at, &address, 4);
        at += 4;
        BYTES(0x67, 0x88, 0x03);       /* mov [ebx], al */
        BYTES(0x66, 0x49, 0x75, 0xf9); /* dec ecx; jnz to the access */
    }
    BYTES(0xe6, EXIT_PORT, 0xf4); /* out EXIT_PORT, al; hlt */

    struct vm vm = make(code, at);
    struct kvm_run *run = vm.run;
    uint32_t served = 0;
    uint64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    for (;;) {
        check(ioctl(vm.vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO && run->io.port == PORT) {
            device = *((uint8_t *)run + run->io.data_offset);
            ++served;
        } else if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr == ADDRESS) {
            device = run->mmio.data[0];
            ++served;
        } else {
            break;
        }
    }
    cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    wall = now(CLOCK_MONOTONIC) - wall;
    if (run->exit_reason != KVM_EXIT_IO || run->io.port != EXIT_PORT || served != count) {
        fprintf(stderr, "the guest ended with exit %u after %u accesses\n", run->exit_reason, served);
        exit(2);
    }
    printf("%llu %llu\n", (unsigned long long)wall, (unsigned long long)cpu);
    destroy(&vm);
}

static void start(uint32_t count) {
    static const uint8_t code[] = {0xe6, EXIT_PORT, 0xf4};
    for (uint32_t i = 0; i < count; ++i) {
        uint64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
        struct vm vm = make(code, sizeof code);
        check(ioctl(vm.vcpu, KVM_RUN, 0), "KVM_RUN");
        cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        wall = now(CLOCK_MONOTONIC) - wall;
        printf("%llu %llu\n", (unsigned long long)wall, (unsigned long long)cpu);
        destroy(&vm);
    }
}

int main(int argc, char **argv) {
    open_kvm();
    if (argc == 4 && strcmp(argv[1], "exits") == 0) {
        exits(strcmp(argv[2], "port") == 0, (uint32_t)strtoul(argv[3], NULL, 0));
    } else if (argc == 3 && strcmp(argv[1], "start") == 0) {
        start((uint32_t)strtoul(argv[2], NULL, 0));
    } else {
        return 64;
    }
    return 0;
}
