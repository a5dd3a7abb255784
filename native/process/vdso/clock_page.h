/* The page that the monitor keeps and the vDSO reads: how to make the time of day out of the TSC.
 * C, for both sides. It lies in the supervisor's half of the address space, where no program can
 * unmap it, and every program may read it. */
#pragma once

#include <stdint.h>

#define PV_CLOCK_PAGE UINT64_C(0xffffffff80004000)

/* Nanoseconds: base + (tsc - reference) * multiplier / 2^32 */
struct pv_clock_line {
    uint64_t reference, base, multiplier;
};

struct pv_clock_page {
    uint32_t sequence; /* odd while the monitor writes; a reader starts again when it changed */
    uint32_t shown;    /* not 0: somebody looks at the calls, all of which are to be made */
    uint64_t
        valid; /* a line is to be used for so many ticks from its reference on; 0: not at all */
    struct pv_clock_line monotonic, raw;
    int64_t realtime, boottime, tai; /* ns that these are ahead of CLOCK_MONOTONIC */
};
