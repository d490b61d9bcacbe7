/* The vocabulary of the loops: one 64-byte line, in the widest registers the compiler may use.
 *
 * Compiled once for each instruction set (see setup.py); XFAST_PLAIN forces portable C, which is
 * also what other architectures get. Unaligned unless a name says otherwise.
 */
#ifndef XFAST_SIMD_H
#define XFAST_SIMD_H

#include <stdint.h>
#include <string.h>

#define LINE 64
#define FORCED static inline __attribute__((always_inline)) /* where a call would cost most */

#if defined(XFAST_PLAIN) || !defined(__SSE2__)

enum { PORTABLE = 1 }; /* runs of lines go through memcpy and memset, which know the CPU */

/* Four registers of 16 bytes in the compiler's own vector type: NEON, SSE2, VSX, or two words. */
typedef uint64_t vec_t __attribute__((vector_size(16)));
typedef struct { vec_t v[4]; } line_t;

#define EACH(expression) \
    line_t r; \
    for (int i = 0; i < 4; i++) r.v[i] = (expression); \
    return r

FORCED line_t line_load(const void *p) { line_t r; memcpy(&r, p, LINE); return r; }
FORCED void line_store(void *p, line_t a) { memcpy(p, &a, LINE); }
FORCED void line_stream(void *p, line_t a) { memcpy(p, &a, LINE); }
FORCED line_t line_zero(void) { EACH((vec_t){0}); }
FORCED line_t line_or(line_t a, line_t b) { EACH(a.v[i] | b.v[i]); }
FORCED line_t line_and(line_t a, line_t b) { EACH(a.v[i] & b.v[i]); }
FORCED line_t line_xor(line_t a, line_t b) { EACH(a.v[i] ^ b.v[i]); }
FORCED int line_any(line_t a)
{
    vec_t any = a.v[0] | a.v[1] | a.v[2] | a.v[3];
    return (any[0] | any[1]) != 0;
}
static inline void stream_fence(void) {}
static inline void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }
#undef EACH

#else /* x86 */

#include <immintrin.h>

enum { PORTABLE = 0 };

#if defined(__AVX512BW__) && defined(__AVX512VL__)

typedef __m512i line_t;

FORCED line_t line_load(const void *p) { return _mm512_loadu_si512(p); }
FORCED void line_store(void *p, line_t a) { _mm512_storeu_si512(p, a); }
FORCED void line_stream(void *p, line_t a) { _mm512_stream_si512((__m512i *)p, a); }
FORCED line_t line_zero(void) { return _mm512_setzero_si512(); }
FORCED line_t line_or(line_t a, line_t b) { return _mm512_or_si512(a, b); }
FORCED line_t line_and(line_t a, line_t b) { return _mm512_and_si512(a, b); }
FORCED line_t line_xor(line_t a, line_t b) { return _mm512_xor_si512(a, b); }
FORCED int line_any(line_t a) { return _mm512_test_epi64_mask(a, a) != 0; }

#else /* 2 x AVX2 or 4 x SSE2 registers a line */

#ifdef __AVX2__
#define N 2
typedef __m256i vec_t;
#define V(op) _mm256_##op##_si256
#else
#define N 4
typedef __m128i vec_t;
#define V(op) _mm_##op##_si128
#endif

typedef struct { vec_t v[N]; } line_t;

#define EACH(expression) \
    line_t r; \
    for (int i = 0; i < N; i++) r.v[i] = (expression); \
    return r

FORCED line_t line_load(const void *p) { EACH(V(loadu)((const vec_t *)p + i)); }
FORCED void line_store(void *p, line_t a)
{
    for (int i = 0; i < N; i++) V(storeu)((vec_t *)p + i, a.v[i]);
}
FORCED void line_stream(void *p, line_t a)
{
    for (int i = 0; i < N; i++) V(stream)((vec_t *)p + i, a.v[i]);
}
FORCED line_t line_zero(void) { EACH(V(setzero)()); }
FORCED line_t line_or(line_t a, line_t b) { EACH(V(or)(a.v[i], b.v[i])); }
FORCED line_t line_and(line_t a, line_t b) { EACH(V(and)(a.v[i], b.v[i])); }
FORCED line_t line_xor(line_t a, line_t b) { EACH(V(xor)(a.v[i], b.v[i])); }
FORCED int line_any(line_t a)
{
#ifdef __AVX2__
    vec_t any = _mm256_or_si256(a.v[0], a.v[1]);
    return !_mm256_testz_si256(any, any);
#else
    vec_t any = _mm_or_si128(_mm_or_si128(a.v[0], a.v[1]), _mm_or_si128(a.v[2], a.v[3]));
    return _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) != 0xFFFF;
#endif
}
#undef EACH
#undef V
#undef N

#endif

static inline void stream_fence(void) { _mm_sfence(); }
static inline void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

#endif

/* The next line, some cycles later. Zen 4 drops prefetches that come faster than memory answers:
 * with two multiplications between, a row is fetched in four fifths of the time.
 */
FORCED const uint8_t *line_later(const uint8_t *p)
{
#if defined(__x86_64__)
    __asm__ volatile("imul $1, %0, %0\n\timul $1, %0, %0" : "+r"(p));
#endif
    return p + LINE;
}

/* Parts of a line: only the bytes whose bit in `taken` is set, which are neighbours, are read or
 * written. line_merge() takes them from `p` and the others from `a`; `whole` says that reading
 * the whole line does no harm.
 */
#if !defined(XFAST_PLAIN) && defined(__AVX512BW__) && defined(__AVX512VL__)

FORCED line_t line_merge(line_t a, const uint8_t *p, uint64_t taken, int whole)
{
    (void)whole;
    return _mm512_mask_loadu_epi8(a, taken, p);
}
FORCED void line_store_part(uint8_t *p, line_t a, unsigned to)
{
    _mm512_mask_storeu_epi8(p, _bzhi_u64(~0ull, to), a);
}
FORCED void line_copy_part(uint8_t *to, const uint8_t *from, uint64_t taken)
{
    _mm512_mask_storeu_epi8(to, taken, _mm512_maskz_loadu_epi8(taken, from));
}

#else

static inline unsigned first_of(uint64_t taken) { return __builtin_ctzll(taken); }
static inline unsigned end_of(uint64_t taken) { return LINE - __builtin_clzll(taken); }

static __attribute__((noinline)) line_t line_of_part(const uint8_t *p, uint64_t taken)
{
    uint8_t bytes[LINE] = {0};
    unsigned first = first_of(taken);
    memcpy(bytes + first, p + first, end_of(taken) - first);
    return line_load(bytes);
}
FORCED line_t line_merge(line_t a, const uint8_t *p, uint64_t taken, int whole)
{
    static const uint8_t step[3 * LINE] = {[LINE ... 2 * LINE - 1] = 0xFF};
    if (!taken)
        return a;
    line_t b = whole ? line_load(p) : line_of_part(p, taken);
    line_t from = line_load(step + LINE - first_of(taken));
    line_t to = line_load(step + 2 * LINE - end_of(taken));
    return line_xor(a, line_and(line_and(from, to), line_xor(a, b)));
}
FORCED void line_store_part(uint8_t *p, line_t a, unsigned to)
{
    uint8_t bytes[LINE];
    line_store(bytes, a);
    memcpy(p, bytes, to);
}
FORCED void line_copy_part(uint8_t *to, const uint8_t *from, uint64_t taken)
{
    unsigned first = first_of(taken);
    memcpy(to + first, from + first, end_of(taken) - first);
}

#endif

/* Ownership of a pointer that several threads may want: who gets non-NULL has it. */
static inline void *pointer_exchange(void **p, void *value)
{
    return __atomic_exchange_n(p, value, __ATOMIC_ACQ_REL);
}

/* The same where every thread that comes here holds the GIL, if there is one. */
static inline void *pointer_exchange_gil(void **p, void *value)
{
#ifdef Py_GIL_DISABLED
    return pointer_exchange(p, value);
#else
    void *old = *p;
    *p = value;
    return old;
#endif
}

/* The widest of the instruction sets that the CPU has and the kernel has enabled. */
static inline const char *widest_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("bmi2"))
        return "avx512";
    if (__builtin_cpu_supports("avx2"))
        return "avx2";
    return "baseline";
#else
    return "plain";
#endif
}

static inline int cpu_is_amd(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_is("amd") != 0;
#else
    return 0;
#endif
}

#endif
