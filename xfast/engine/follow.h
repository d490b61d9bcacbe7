/* Following a plan at one go: straight code for an area that stays in the caches.
 *
 * The code of each step leads by one jump to where just its number of lines begins. Copying such
 * an area takes 64 bytes a cycle, so every instruction and load beside the copying shows: weigh
 * each one that you add. In C because Cython has no cases that run on into the next one.
 */
#ifndef XFAST_FOLLOW_H
#define XFAST_FOLLOW_H

#include "simd.h"

enum {
    COPY = 0,   /* COPY + n: copy n lines; up to ZERO */
    ZERO = 32,  /* ZERO + n: zero n lines */
    BLEND = 65, /* BLEND + n: make all blends of the plan, n of them; the last step */
    STEP_LINES = ZERO - COPY, /* at most */
    STEP_BLENDS = 8,          /* at most */
};

typedef struct {
    uint32_t code;
    uint32_t dst_end, src_end; /* bytes into the rows */
    uint32_t lines; /* how many, should they be too many for a code */
} step_t;

typedef struct { /* a line of which only a part comes from the source, or nothing */
    _Alignas(LINE) uint8_t value[LINE]; /* init values and header */
    uint64_t taken; /* one bit for each byte that comes from the source; they are neighbours */
    int64_t src;    /* bytes into the source row to where the line would begin, even before it */
    uint32_t dst;   /* bytes into the target row */
    uint32_t room;  /* bytes of the line that belong to the target row */
    int whole;      /* the source row holds 64 bytes at `src` */
    int opens, closes; /* the first, the last blend of its line */
    int carried;    /* the line begins with the end of the row before */
    int carries;    /* the line is completed by the next row */
} blend_t;

FORCED line_t blend_line(const blend_t *blend, const uint8_t *src)
{
    return line_merge(line_load(blend->value), src + blend->src, blend->taken, blend->whole);
}

static inline void blend_into(const blend_t *blend, const uint8_t *src, uint8_t *dst)
{
    line_copy_part(dst + blend->dst, src + blend->src, blend->taken);
}

#define DOWN_FROM_8(DO, n) \
    DO(n + 8) DO(n + 7) DO(n + 6) DO(n + 5) DO(n + 4) DO(n + 3) DO(n + 2) DO(n + 1)
#define DOWN_FROM_32(DO) \
    DOWN_FROM_8(DO, 24) DOWN_FROM_8(DO, 16) DOWN_FROM_8(DO, 8) DOWN_FROM_8(DO, 0)
#define COPY_LINE(n) case COPY + n: line_store(to - (n) * LINE, line_load(from - (n) * LINE));
#define ZERO_LINE(n) case ZERO + n: line_store(to - (n) * LINE, line_zero());
#define BLEND_LINE(n) \
    case BLEND + n: \
        if (into) \
            blend_into(blend + n - 1, src, dst); \
        else \
            line_store(dst + blend[n - 1].dst, blend_line(blend + n - 1, src));

/* The same with the C library's calls, which beat what a compiler makes of portable lines. */
FORCED void follow_calls(
    const step_t *step, const blend_t *blend, const uint8_t *src, uint8_t *dst, int into)
{
    for (; step->code < BLEND; step++) {
        size_t size = step->lines * (size_t)LINE;
        if (step->code <= ZERO)
            memcpy(dst + step->dst_end - size, src + step->src_end - size, size);
        else
            memset(dst + step->dst_end - size, 0, size);
    }
    for (uint32_t n = step->code - BLEND; n; n--, blend++) {
        if (into)
            blend_into(blend, src, dst);
        else
            line_store(dst + blend->dst, blend_line(blend, src));
    }
}

/* Write an area or, with `into`, only what the plan names of it; `into` is a constant. */
FORCED void follow(
    const step_t *step, const blend_t *blend, const uint8_t *src, uint8_t *dst, int into)
{
    if (PORTABLE) {
        follow_calls(step, blend, src, dst, into);
        return;
    }
    for (;;) {
        const uint8_t *from = src + step->src_end;
        uint8_t *to = dst + step->dst_end;
        switch ((step++)->code) {
        DOWN_FROM_32(COPY_LINE)
            continue;
        DOWN_FROM_32(ZERO_LINE)
            continue;
        DOWN_FROM_8(BLEND_LINE, 0)
        case BLEND:
            return;
        default:
            __builtin_unreachable();
        }
    }
}

#undef DOWN_FROM_8
#undef DOWN_FROM_32
#undef COPY_LINE
#undef ZERO_LINE
#undef BLEND_LINE

#endif
