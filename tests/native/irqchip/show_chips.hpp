// What differs between two States of a chip, by the fields' names.
#pragma once

#include <cstdio>
#include <string>

#include "irqchip/ioapic.hpp"
#include "irqchip/lapic.hpp"
#include "irqchip/pic.hpp"
#include "irqchip/pit.hpp"

namespace pvtest {

class Differences {
  public:
    template <class T>
    void field(const char* name, const T& a, const T& b) {
        if (a == b) return;
        char line[96];
        std::snprintf(line, sizeof line, "%s%s: %llx, %llx\n", prefix.c_str(), name,
                      static_cast<unsigned long long>(a), static_cast<unsigned long long>(b));
        text += line;
    }
    template <class T, std::size_t n>
    void array(const char* name, const T (&a)[n], const T (&b)[n]) {
        for (std::size_t i = 0; i < n; ++i) {
            field((std::string(name) + "[" + std::to_string(i) + "]").c_str(), a[i], b[i]);
        }
    }
    std::string prefix, text;
};

#define PV_FIELD(name) d.field(#name, a.name, b.name)
#define PV_ARRAY(name) d.array(#name, a.name, b.name)

/// "" when they are equal.
inline std::string difference(const polyvisor::irqchip::Lapic::State& a,
                              const polyvisor::irqchip::Lapic::State& b) {
    Differences d;
    PV_FIELD(apic_base), PV_FIELD(icr), PV_FIELD(timer_start), PV_FIELD(timer_deadline);
    PV_FIELD(tsc_deadline), PV_FIELD(id), PV_FIELD(tpr), PV_FIELD(ldr), PV_FIELD(dfr);
    PV_FIELD(svr), PV_ARRAY(isr), PV_ARRAY(tmr), PV_ARRAY(irr), PV_FIELD(esr);
    PV_FIELD(esr_pending), PV_ARRAY(lvt), PV_FIELD(initial_count), PV_FIELD(divide);
    PV_FIELD(lint), PV_FIELD(ext_int);
    return d.text;
}

inline std::string difference(const polyvisor::irqchip::Ioapic::State& a,
                              const polyvisor::irqchip::Ioapic::State& b) {
    Differences d;
    PV_ARRAY(redirection), PV_FIELD(lines), PV_FIELD(index), PV_FIELD(id);
    return d.text;
}

inline std::string difference(const polyvisor::irqchip::Pic::State& x,
                              const polyvisor::irqchip::Pic::State& y) {
    Differences d;
    for (unsigned which = 0; which < 2; ++which) {
        const auto &a = x.chips[which], &b = y.chips[which];
        d.prefix = which == 0 ? "master." : "slave.";
        PV_FIELD(irr), PV_FIELD(imr), PV_FIELD(isr), PV_FIELD(lines), PV_FIELD(elcr);
        PV_FIELD(vector_base), PV_FIELD(lowest), PV_FIELD(init_step), PV_FIELD(icw4_needed);
        PV_FIELD(single), PV_FIELD(level_mode), PV_FIELD(auto_eoi), PV_FIELD(rotate_on_auto_eoi);
        PV_FIELD(fully_nested), PV_FIELD(special_mask), PV_FIELD(poll), PV_FIELD(read_isr);
    }
    return d.text;
}

inline std::string difference(const polyvisor::irqchip::Pit::State& x,
                              const polyvisor::irqchip::Pit::State& y) {
    Differences d;
    for (unsigned which = 0; which < 3; ++which) {
        const auto &a = x.channels[which], &b = y.channels[which];
        d.prefix = "channel " + std::to_string(which) + ".";
        PV_FIELD(start), PV_FIELD(held), PV_FIELD(switch_at), PV_FIELD(reload);
        PV_FIELD(next_reload), PV_FIELD(latch), PV_FIELD(mode), PV_FIELD(access);
        PV_FIELD(status_latch), PV_FIELD(write_low), PV_FIELD(bcd), PV_FIELD(gate);
        PV_FIELD(running), PV_FIELD(latched), PV_FIELD(status_latched);
        PV_FIELD(write_high_next), PV_FIELD(read_high_next), PV_FIELD(programmed);
    }
    d.prefix = "";
    const auto &a = x, &b = y;
    PV_FIELD(next_edge), PV_FIELD(backlog), PV_FIELD(port61);
    return d.text;
}

#undef PV_FIELD
#undef PV_ARRAY

}  // namespace pvtest
