/* CRC-64/Jones (reflected, nothing inverted): by carry-less products where the CPU has them.
 *
 * A block of 16 bytes is moved along by D bits with two products: its lower half (the higher powers)
 * by x^(D+63), its upper half by x^(D-1), modulo the polynomial. What is left at the end, 16 bytes
 * that leave the same remainder, goes through the tables.
 *
 * Source: Intel, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", 2009.
 */
#ifndef XFAST_CRC64_H
#define XFAST_CRC64_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define CRC64_POLYNOMIAL 0x95AC9329AC4BC9B5ULL

static uint64_t crc64_tables[8][256];

static void crc64_fill(void)
{
    for (int byte = 0; byte < 256; byte++) {
        uint64_t crc = (uint64_t)byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? CRC64_POLYNOMIAL : 0);
        crc64_tables[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++) {
            uint64_t crc = crc64_tables[k - 1][byte];
            crc64_tables[k][byte] = crc64_tables[0][crc & 0xFF] ^ crc >> 8;
        }
}

static uint64_t crc64_by_tables(uint64_t crc, const uint8_t *at, size_t n)
{
    for (; n >= 8; n -= 8, at += 8) {
        uint64_t word = 0;
        for (int i = 0; i < 8; i++)
            word |= (uint64_t)at[i] << 8 * i;
        crc ^= word;
        word = 0;
        for (int i = 0; i < 8; i++)
            word ^= crc64_tables[7 - i][crc >> 8 * i & 0xFF];
        crc = word;
    }
    for (; n; n--, at++)
        crc = crc64_tables[0][(crc ^ *at) & 0xFF] ^ crc >> 8;
    return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define CRC64_FOLDS __attribute__((target("pclmul,sse2")))

static uint64_t crc64_powers[3][2]; /* for D = 128, 512 and 2048: of the lower and upper half */

static uint64_t crc64_power(int n)
{
    uint64_t power = 1ULL << 63;
    while (n--)
        power = power >> 1 ^ (power & 1 ? CRC64_POLYNOMIAL : 0);
    return power;
}

/* Tell how far the CPU can fold: 0 not, 1 blocks of 16 bytes, 2 four of them at a time. */
static int crc64_folding(void)
{
    for (int i = 0; i < 3; i++) {
        crc64_powers[i][0] = crc64_power((128 << 2 * i) + 63);
        crc64_powers[i][1] = crc64_power((128 << 2 * i) - 1);
    }
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("pclmul"))
        return 0;
    return __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f") ? 2 : 1;
}

CRC64_FOLDS static inline __m128i crc64_moved(__m128i block, __m128i powers, __m128i next)
{
    __m128i lower = _mm_clmulepi64_si128(block, powers, 0x00);
    __m128i upper = _mm_clmulepi64_si128(block, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(lower, upper), next);
}

CRC64_FOLDS static uint64_t crc64_by_folding(const uint8_t *at, size_t n)
{
    if (n < 128)
        return crc64_by_tables(0, at, n);
    __m128i near = _mm_loadu_si128((const __m128i *)crc64_powers[0]);
    __m128i far = _mm_loadu_si128((const __m128i *)crc64_powers[1]);
    __m128i block[4];
    for (int i = 0; i < 4; i++)
        block[i] = _mm_loadu_si128((const __m128i *)at + i);
    for (at += 64, n -= 64; n >= 64; at += 64, n -= 64)
        for (int i = 0; i < 4; i++)
            block[i] = crc64_moved(block[i], far, _mm_loadu_si128((const __m128i *)at + i));
    for (int i = 1; i < 4; i++)
        block[i] = crc64_moved(block[i - 1], near, block[i]);
    for (; n >= 16; at += 16, n -= 16)
        block[3] = crc64_moved(block[3], near, _mm_loadu_si128((const __m128i *)at));
    uint8_t left[16];
    _mm_storeu_si128((__m128i *)left, block[3]);
    return crc64_by_tables(crc64_by_tables(0, left, 16), at, n);
}

#define CRC64_WIDE __attribute__((target("avx512f,vpclmulqdq")))

CRC64_WIDE static inline __m512i crc64_moved_wide(__m512i blocks, __m512i powers, __m512i next)
{
    __m512i lower = _mm512_clmulepi64_epi128(blocks, powers, 0x00);
    __m512i upper = _mm512_clmulepi64_epi128(blocks, powers, 0x11);
    return _mm512_xor_si512(_mm512_xor_si512(lower, upper), next);
}

CRC64_WIDE static uint64_t crc64_by_wide(const uint8_t *at, size_t n)
{
    if (n < 512)
        return crc64_by_folding(at, n);
    __m512i near = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)crc64_powers[1]));
    __m512i far = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)crc64_powers[2]));
    __m512i blocks[4];
    for (int i = 0; i < 4; i++)
        blocks[i] = _mm512_loadu_si512(at + 64 * i);
    for (at += 256, n -= 256; n >= 256; at += 256, n -= 256)
        for (int i = 0; i < 4; i++)
            blocks[i] = crc64_moved_wide(blocks[i], far, _mm512_loadu_si512(at + 64 * i));
    for (int i = 1; i < 4; i++)
        blocks[i] = crc64_moved_wide(blocks[i - 1], near, blocks[i]);
    uint8_t left[64 + 256];
    _mm512_storeu_si512(left, blocks[3]);
    memcpy(left + 64, at, n);
    return crc64_by_folding(left, 64 + n);
}

#else

static int crc64_folding(void) { return 0; }

static uint64_t crc64_by_folding(const uint8_t *at, size_t n) { return crc64_by_tables(0, at, n); }

static uint64_t crc64_by_wide(const uint8_t *at, size_t n) { return crc64_by_tables(0, at, n); }

#endif
#endif
