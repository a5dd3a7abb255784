// String instructions: MOVS, STOS, LODS, CMPS, SCAS, alone and repeated.
//
// A repeated one works in runs: as many elements as lie in one page of RAM at either end, done with
// host memory functions where they cannot be told from one element at a time. What no run covers
// (page crossings, MMIO, a limit in the middle, anything that faults) is done one element at a
// time, which is the exact reference: rSI, rDI and rCX are written after every run or element, so a
// fault finds them as the architecture wants. After 64 KiB, or each element while single-stepping,
// the instruction restarts itself so that interrupts (and the trap) are taken between elements.
#include <algorithm>

#include "soft/bindings.hpp"
#include "soft/operands.hpp"

namespace polyvisor::soft {
namespace {

constexpr u64 kBytesAtOnce = 64 * 1024;
constexpr u64 kElementCost = 64;  ///< in bytes of the above: an element outside runs is that slow

template <class T>
bool load_at(VcpuFrame& f, u8 segment, u64 offset, T& value) {
    Insn place;
    place.segment = segment;
    return load(f, place, offset, value);
}
template <class T>
bool store_at(VcpuFrame& f, u8 segment, u64 offset, T value) {
    Insn place;
    place.segment = segment;
    return store(f, place, offset, value);
}

/// The indexes, count and direction of one execution.
template <class T>
struct Cursor {
    Cursor(VcpuFrame& f, const Insn& i)
        : f(f), i(i), mask(address_mask(i)), backward(f.rflags_rest & kFlagD) {}

    u64 source() const { return f.gpr[kRsi] & mask; }
    u64 destination() const { return f.gpr[kRdi] & mask; }
    u64 count() const { return f.gpr[kRcx] & mask; }
    bool repeated() const { return i.prefixes & (kPrefixRep | kPrefixRepne); }

    void advance(u8 index, u64 elements) {
        u64 bytes = elements * sizeof(T);
        write_address_reg(f, i, index, f.gpr[index] + (backward ? u64{0} - bytes : bytes));
    }
    void consume(u64 elements) { write_address_reg(f, i, kRcx, f.gpr[kRcx] - elements); }
    const u8* at(const u8* first, u64 n) const {
        return backward ? first - n * sizeof(T) : first + n * sizeof(T);
    }

    VcpuFrame& f;
    const Insn& i;
    const u64 mask;
    const bool backward;
};

/// The number of elements, at most `count`, from `offset` on in the direction of the cursor that
/// lie in one page of RAM; `first` is the host address of the first. 0: none, or it would fault.
template <bool Write, class T>
u64 find_run(const Cursor<T>& cursor, u8 segment, u64 offset, u64 count, u8*& first) {
    VcpuFrame& f = cursor.f;
    constexpr u64 size = sizeof(T);
    u64 linear;
    if (!linear_address(f, segment, offset, size, Write, linear)) {
        f.fault = Fault{};  // the element will raise it again, in its turn
        return 0;
    }
    u64 in_page = linear & kPageMask;
    u64 n;
    if (cursor.backward) {
        n = in_page + size <= kPageSize ? std::min(in_page / size, offset / size) + 1 : 0;
    } else {
        n = std::min((kPageSize - in_page) / size, (cursor.mask - offset) / size + 1);
    }
    n = std::min(n, count);
    if (n == 0) return 0;
    u64 back = cursor.backward ? (n - 1) * size : 0;
    u32 bytes = static_cast<u32>(n * size);
    linear -= back;
    if (!f.long64() && !linear_address(f, segment, offset - back, bytes, Write, linear)) {
        f.fault = Fault{};
        return 0;
    }
    u64 entry = (linear >> 12) & 255;
    u64 tag = Write ? f.tlb_now->neg_w[entry] : f.tlb_now->neg_r[entry];
    u8* low;
    if (linear + tag <= kPageSize - bytes) {
        low = reinterpret_cast<u8*>(linear + f.tlb_now->addend[entry]);
    } else {
        low = Write
                  ? writable_host(f, linear, bytes, Privilege::kCurrent, segment)
                  : const_cast<u8*>(readable_host(f, linear, bytes, Privilege::kCurrent, segment));
        if (!low) {
            f.fault = Fault{};
            return 0;
        }
    }
    first = low + back;
    return n;
}

template <class T>
T element(const u8* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

/// Runs `step` until rCX is 0. step(count) does up to `count` elements with the host's functions
/// and returns how many; one() does exactly one element and returns false when it faulted. `stop`
/// is set by either to end the repetition.
template <class T, class Step, class One>
bool repeat(Cursor<T>& cursor, const bool& stop, Step&& step, One&& one) {
    VcpuFrame& f = cursor.f;
    bool stepping = f.mode & kModeStep;
    bool runs = !stepping && !(f.mode & kModeAlignCheck);
    u64 left = kBytesAtOnce;
    for (u64 count = cursor.count(); count != 0; count = cursor.count()) {
        if (left == 0) return restart(f);
        u64 done = runs ? step(std::min(count, (left + sizeof(T) - 1) / sizeof(T))) : 0;
        u64 cost = done * sizeof(T);
        if (done == 0) {
            if (!one()) return false;
            done = 1;
            cost = stepping ? kBytesAtOnce : kElementCost;
        }
        cursor.consume(done);
        if (stop) return true;
        left -= std::min(left, cost);
    }
    return true;
}

// --- MOVS ----------------------------------------------------------------------------------------

/// Copies n elements as if one by one from `source` to `destination`, which may overlap.
template <class T>
void copy_elements(u8* destination, const u8* source, u64 n, bool backward) {
    constexpr u64 size = sizeof(T);
    u64 bytes = n * size;
    if (backward) {
        u64 distance =
            static_cast<u64>(source - destination);  // > 0 and small: reads what it wrote
        if (distance - 1 >= bytes - 1) {
            u64 back = bytes - size;
            std::memmove(destination - back, source - back, bytes);
            return;
        }
        for (u64 k = 0; k < bytes; k += size) {
            T value = element<T>(source - k);
            std::memcpy(destination - k, &value, size);
        }
        return;
    }
    u64 distance = static_cast<u64>(destination - source);
    if (distance - 1 >= bytes - 1) {  // 0, or no overlap in this direction
        std::memmove(destination, source, bytes);
    } else if (distance >= 32) {  // a pattern of `distance` bytes repeats itself
        for (u64 k = 0; k < bytes; k += distance) {
            std::memcpy(destination + k, source + k, std::min(distance, bytes - k));
        }
    } else {
        for (u64 k = 0; k < bytes; k += size) {
            T value = element<T>(source + k);
            std::memcpy(destination + k, &value, size);
        }
    }
}

template <class T>
bool movs(VcpuFrame& f, const Insn& i, u64) {
    Cursor<T> cursor(f, i);
    auto one = [&] {
        T value;
        if (!load_at(f, i.segment, cursor.source(), value) ||
            !store_at(f, kEs, cursor.destination(), value)) {
            return false;
        }
        cursor.advance(kRsi, 1);
        cursor.advance(kRdi, 1);
        return true;
    };
    if (!cursor.repeated()) return one();
    auto run = [&](u64 count) -> u64 {
        u8* source;
        u8* destination;
        u64 n = find_run<false>(cursor, i.segment, cursor.source(), count, source);
        if (n == 0) return 0;
        n = find_run<true>(cursor, kEs, cursor.destination(), n, destination);
        if (n == 0) return 0;
        copy_elements<T>(destination, source, n, cursor.backward);
        cursor.advance(kRsi, n);
        cursor.advance(kRdi, n);
        return n;
    };
    return repeat(cursor, false, run, one);
}

// --- STOS, LODS ----------------------------------------------------------------------------------

template <class T>
bool stos(VcpuFrame& f, const Insn& i, u64) {
    Cursor<T> cursor(f, i);
    T value = static_cast<T>(f.gpr[kRax]);
    auto one = [&] {
        if (!store_at(f, kEs, cursor.destination(), value)) return false;
        cursor.advance(kRdi, 1);
        return true;
    };
    if (!cursor.repeated()) return one();
    u8 byte = static_cast<u8>(value);
    T same;
    std::memset(&same, byte, sizeof(T));
    auto run = [&](u64 count) -> u64 {
        u8* first;
        u64 n = find_run<true>(cursor, kEs, cursor.destination(), count, first);
        if (n == 0) return 0;
        u8* low = cursor.backward ? first - (n - 1) * sizeof(T) : first;
        if (value == same) {
            std::memset(low, byte, n * sizeof(T));
        } else {
            for (u64 k = 0; k < n; ++k) std::memcpy(low + k * sizeof(T), &value, sizeof(T));
        }
        cursor.advance(kRdi, n);
        return n;
    };
    return repeat(cursor, false, run, one);
}

template <class T>
bool lods(VcpuFrame& f, const Insn& i, u64) {
    Cursor<T> cursor(f, i);
    auto one = [&] {
        T value;
        if (!load_at(f, i.segment, cursor.source(), value)) return false;
        set_accumulator(f, value);
        cursor.advance(kRsi, 1);
        return true;
    };
    if (!cursor.repeated()) return one();
    auto run = [&](u64 count) -> u64 {
        u8* first;
        u64 n = find_run<false>(cursor, i.segment, cursor.source(), count, first);
        if (n == 0) return 0;
        set_accumulator(f, element<T>(cursor.at(first, n - 1)));
        cursor.advance(kRsi, n);
        return n;
    };
    return repeat(cursor, false, run, one);
}

// --- CMPS, SCAS ----------------------------------------------------------------------------------
// Repeated, they end after the element that makes ZF differ from the prefix's wish (REPE: set).
// When an element faults, the flags are those of the element before it, as AMD CPUs leave them;
// Intel's restore the flags of before the instruction. Nobody can tell after the restart, which
// sets them anew.

template <class T>
u16 compare_flags(T a, T b) {
    u16 flags;
    asm("cmp %[b], %[a]" PV_FLAGS_OUT : "=&a"(flags) : [a] "r"(a), [b] "r"(b) : "cc");
    return flags;
}

template <class T>
bool cmps(VcpuFrame& f, const Insn& i, u64) {
    Cursor<T> cursor(f, i);
    bool wish = !(i.prefixes & kPrefixRepne);
    bool stop = false;
    bool compared = false;
    T a{}, b{};
    auto one = [&] {
        T new_a, new_b;
        // No manual says which operand faults first. Zen reads the destination first, but for REP
        // CMPSB.
        bool source_first = sizeof(T) == 1 && cursor.repeated();
        if ((source_first && !load_at(f, i.segment, cursor.source(), new_a)) ||
            !load_at(f, kEs, cursor.destination(), new_b) ||
            (!source_first && !load_at(f, i.segment, cursor.source(), new_a))) {
            return false;
        }
        a = new_a;
        b = new_b;
        compared = true;
        stop = (a == b) != wish;
        cursor.advance(kRsi, 1);
        cursor.advance(kRdi, 1);
        return true;
    };
    if (!cursor.repeated()) {
        if (!one()) return false;
        f.oszapc = compare_flags(a, b);
        return true;
    }
    auto run = [&](u64 count) -> u64 {
        u8* first_a;
        u8* first_b;
        u64 n = find_run<false>(cursor, i.segment, cursor.source(), count, first_a);
        if (n == 0) return 0;
        n = find_run<false>(cursor, kEs, cursor.destination(), n, first_b);
        if (n == 0) return 0;
        u64 done = 0;
        do {
            a = element<T>(cursor.at(first_a, done));
            b = element<T>(cursor.at(first_b, done));
            ++done;
        } while ((a == b) == wish && done < n);
        stop = (a == b) != wish;
        compared = true;
        cursor.advance(kRsi, done);
        cursor.advance(kRdi, done);
        return done;
    };
    bool ok = repeat(cursor, stop, run, one);
    if (compared) f.oszapc = compare_flags(a, b);
    return ok;
}

template <class T>
bool scas(VcpuFrame& f, const Insn& i, u64) {
    Cursor<T> cursor(f, i);
    bool wish = !(i.prefixes & kPrefixRepne);
    bool stop = false;
    bool compared = false;
    const T a = static_cast<T>(f.gpr[kRax]);
    T b{};
    auto one = [&] {
        T value;
        if (!load_at(f, kEs, cursor.destination(), value)) return false;
        b = value;
        compared = true;
        stop = (a == b) != wish;
        cursor.advance(kRdi, 1);
        return true;
    };
    if (!cursor.repeated()) {
        if (!one()) return false;
        f.oszapc = compare_flags(a, b);
        return true;
    }
    auto run = [&](u64 count) -> u64 {
        u8* first;
        u64 n = find_run<false>(cursor, kEs, cursor.destination(), count, first);
        if (n == 0) return 0;
        u64 done = 0;
        do {
            b = element<T>(cursor.at(first, done));
            ++done;
        } while ((a == b) == wish && done < n);
        stop = (a == b) != wish;
        compared = true;
        cursor.advance(kRdi, done);
        return done;
    };
    bool ok = repeat(cursor, stop, run, one);
    if (compared) f.oszapc = compare_flags(a, b);
    return ok;
}

#define PV_SIZED_STRING(name)                            \
    bool name##_v(VcpuFrame& f, const Insn& i, u64 ea) { \
        return PV_BY_OPSIZE(name);                       \
    }
PV_SIZED_STRING(movs)
PV_SIZED_STRING(stos)
PV_SIZED_STRING(lods)
PV_SIZED_STRING(cmps)
PV_SIZED_STRING(scas)
#undef PV_SIZED_STRING

const OpBinding kStringOps[] = {
    bind<Op::MOVSB_Yb_Xb, movs<u8>>(), bind<Op::MOVSV_Yv_Xv, movs_v>(),
    bind<Op::STOSB_Yb_AL, stos<u8>>(), bind<Op::STOSV_Yv_rAX, stos_v>(),
    bind<Op::LODSB_AL_Xb, lods<u8>>(), bind<Op::LODSV_rAX_Xv, lods_v>(),
    bind<Op::CMPSB_Xb_Yb, cmps<u8>>(), bind<Op::CMPSV_Xv_Yv, cmps_v>(),
    bind<Op::SCASB_AL_Yb, scas<u8>>(), bind<Op::SCASV_rAX_Yv, scas_v>(),
};

}  // namespace

std::span<const OpBinding> string_ops() {
    return kStringOps;
}

}  // namespace polyvisor::soft
