/* The real XSAVE family in user mode, one instruction at a time, with faults caught.
 *
 * xfast_hw_run() puts the caller's registers aside, runs a list of steps and puts the registers
 * back. Between steps nothing but general registers is used, so that a step finds the state that
 * the one before it left. Elsewhere than on x86-64 Linux only xfast_hw_available() is of use.
 */
#ifndef XFAST_HW_H
#define XFAST_HW_H

#include <stdint.h>

enum xfast_op {
    XFAST_XSAVE64, XFAST_XSAVEOPT64, XFAST_XSAVEC64, XFAST_XRSTOR64,
    XFAST_XSAVE, XFAST_XSAVEOPT, XFAST_XSAVEC, XFAST_XRSTOR,
    XFAST_FLDCW,        /* from the first two bytes of `area` */
    XFAST_FILL,         /* fill `area` with the byte `mask`, `length` bytes */
    XFAST_SET_XMM15,    /* PCMPEQD XMM15, XMM15: a legacy SSE instruction */
    XFAST_SET_YMM15,    /* VPCMPEQD YMM15, YMM15, YMM15: clears the rest of ZMM15 */
    XFAST_SET_K7,       /* KXNORW K7, K7, K7 */
    XFAST_FLDZ,
    XFAST_XGETBV,       /* XGETBV(1), as a save of what is in use needs it */
    XFAST_SET_PKRU,     /* WRPKRU of `mask` */
};

struct xfast_step {
    uint32_t op;
    uint32_t signal;    /* out: the signal that a fault became, or 0 */
    uint32_t trap;      /* out: the exception's vector */
    uint32_t length;
    uint8_t *area;
    uint64_t mask;      /* EDX:EAX */
    uint64_t xinuse;    /* out: XGETBV(1) after the step, where the CPU has it */
};

#if defined(__x86_64__) && defined(__linux__)

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define XFAST_GENERAL_REGS __attribute__((target("general-regs-only"), noinline, unused))

XFAST_GENERAL_REGS static void
xfast_hw_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *out)
{
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
}

XFAST_GENERAL_REGS static int
xfast_hw_available(void)
{
    uint32_t r[4];
    xfast_hw_cpuid(1, 0, r);
    return r[2] >> 27 & 1;      /* OSXSAVE */
}

XFAST_GENERAL_REGS static uint64_t
xfast_hw_xgetbv(uint32_t index)
{
    uint32_t eax, edx;
    __asm__ volatile ("xgetbv" : "=a"(eax), "=d"(edx) : "c"(index));
    return eax | (uint64_t)edx << 32;
}

static int
xfast_hw_arch_prctl(int code, unsigned long argument)
{
    return (int)syscall(SYS_arch_prctl, code, argument);
}

/* A guarded instruction has its own address in R9, the next one's in R8. */
#ifndef REG_RIP
enum { REG_R8 = 0, REG_R9 = 1, REG_R10 = 2, REG_RIP = 16, REG_TRAPNO = 20 };
#endif

#define XFAST_SIGNALS 4
static struct sigaction xfast_hw_old[XFAST_SIGNALS];
static const int xfast_hw_signals[XFAST_SIGNALS] = {SIGSEGV, SIGILL, SIGBUS, SIGFPE};

static void
xfast_hw_caught(int signal, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)info;
    if (r[REG_RIP] == r[REG_R9]) {
        r[REG_RIP] = r[REG_R8];
        r[REG_R10] = (greg_t)signal << 32 | (r[REG_TRAPNO] & 0xFF);
        return;
    }
    for (int i = 0; i < XFAST_SIGNALS; i++)     /* not ours: fault again under the old handler */
        if (xfast_hw_signals[i] == signal)
            sigaction(signal, &xfast_hw_old[i], NULL);
}

#define XFAST_PKRU (UINT64_C(1) << 9)
#define XFAST_KEY_0 3   /* PKRU's bits for key 0, which is the caller's own memory */

/* Where PKRU lies in the standard format, and the bytes of the components before it. */
static uint32_t xfast_hw_pkru_at, xfast_hw_before[9];

/* Return `mask` without PKRU if the area would load one that forbids key 0 and so ends the
 * process. What a save leaves in an area is harmless: it was loaded before. */
XFAST_GENERAL_REGS static uint64_t
xfast_hw_harmless(const struct xfast_step *s)
{
    uint64_t header[2];
    uint32_t at = xfast_hw_pkru_at;
    if (!(s->mask & XFAST_PKRU))
        return s->mask;
    __builtin_memcpy(header, s->area + 512, sizeof header);
    if (header[1] >> 63) {
        at = 576;
        for (int nr = 2; nr < 9; nr++)
            at += header[1] >> nr & 1 ? xfast_hw_before[nr] : 0;
    }
    if (header[0] & XFAST_PKRU && (at >= s->length || s->area[at] & XFAST_KEY_0))
        return s->mask & ~XFAST_PKRU;
    return s->mask;
}

#define XFAST_GUARDED(INSN)                                                          \
    __asm__ volatile ("lea 1f(%%rip), %%r9\n\tlea 2f(%%rip), %%r8\n\t"               \
                      "xor %%r10d, %%r10d\n1:\t" INSN " (%1)\n2:\tmov %%r10, %0"     \
                      : "=r"(fault) : "r"(s->area), "a"((uint32_t)s->mask),          \
                        "d"((uint32_t)(s->mask >> 32)) : "r8", "r9", "r10", "memory", "cc")

XFAST_GENERAL_REGS static void
xfast_hw_steps(struct xfast_step *steps, int n, uint64_t rounds, int observe, uint8_t *own,
               uint64_t own_mask)
{
    uint32_t low = (uint32_t)own_mask, high = (uint32_t)(own_mask >> 32);
    __asm__ volatile ("xsave64 (%0)" :: "r"(own), "a"(low), "d"(high) : "memory");
    for (uint64_t round = 0; round < rounds; round++) {
        for (int i = 0; i < n; i++) {
            struct xfast_step *s = &steps[i];
            uint64_t fault = 0, given = s->mask;
            switch (s->op) {
            case XFAST_XSAVE64: XFAST_GUARDED("xsave64"); break;
            case XFAST_XSAVEOPT64: XFAST_GUARDED("xsaveopt64"); break;
            case XFAST_XSAVEC64: XFAST_GUARDED("xsavec64"); break;
            case XFAST_XRSTOR64:
                s->mask = xfast_hw_harmless(s);
                XFAST_GUARDED("xrstor64");
                break;
            case XFAST_XSAVE: XFAST_GUARDED("xsave"); break;
            case XFAST_XSAVEOPT: XFAST_GUARDED("xsaveopt"); break;
            case XFAST_XSAVEC: XFAST_GUARDED("xsavec"); break;
            case XFAST_XRSTOR:
                s->mask = xfast_hw_harmless(s);
                XFAST_GUARDED("xrstor");
                break;
            case XFAST_FLDCW: XFAST_GUARDED("fldcw"); break;
            case XFAST_FILL: {
                void *to = s->area;
                uint64_t count = s->length;
                __asm__ volatile ("rep stosb" : "+D"(to), "+c"(count)
                                  : "a"((uint32_t)s->mask) : "memory");
                break;
            }
            case XFAST_SET_XMM15: __asm__ volatile ("pcmpeqd %xmm15, %xmm15"); break;
            case XFAST_SET_YMM15: __asm__ volatile ("vpcmpeqd %ymm15, %ymm15, %ymm15"); break;
            case XFAST_SET_K7: __asm__ volatile ("kxnorw %k7, %k7, %k7"); break;
            case XFAST_FLDZ: __asm__ volatile ("fldz"); break;
            case XFAST_XGETBV: xfast_hw_xgetbv(1); break;
            case XFAST_SET_PKRU:
                __asm__ volatile ("wrpkru" :: "a"((uint32_t)s->mask & ~XFAST_KEY_0), "c"(0), "d"(0)
                                  : "memory");
                break;
            }
            s->mask = given;
            if (observe) {
                s->signal = (uint32_t)(fault >> 32);
                s->trap = (uint32_t)fault;
                if (observe > 1)
                    s->xinuse = xfast_hw_xgetbv(1);
            }
        }
    }
    __asm__ volatile ("xrstor64 (%0)" :: "r"(own), "a"(low), "d"(high) : "memory");
}

/* Run the steps `rounds` times; return the nanoseconds that took, or 0 if signals can't be
 * caught. `own` is zeroed, 64-byte aligned, and has room for the components of `own_mask`. */
static uint64_t
xfast_hw_run(struct xfast_step *steps, int n, uint64_t rounds, int observe, uint8_t *own,
             uint64_t own_mask)
{
    struct sigaction action;
    struct timespec a, b;
    int caught = 0;
    for (uint32_t nr = 2; nr < 10 && !xfast_hw_pkru_at && own_mask & XFAST_PKRU; nr++) {
        uint32_t r[4];
        xfast_hw_cpuid(0xD, nr, r);
        if (nr < 9)
            xfast_hw_before[nr] = r[0];
        else
            xfast_hw_pkru_at = r[1];
    }
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = xfast_hw_caught;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    while (caught < XFAST_SIGNALS &&
            !sigaction(xfast_hw_signals[caught], &action, &xfast_hw_old[caught]))
        caught++;
    clock_gettime(CLOCK_MONOTONIC, &a);
    if (caught == XFAST_SIGNALS)
        xfast_hw_steps(steps, n, rounds, observe, own, own_mask);
    clock_gettime(CLOCK_MONOTONIC, &b);
    for (int i = 0; i < caught; i++)
        sigaction(xfast_hw_signals[i], &xfast_hw_old[i], NULL);
    if (caught < XFAST_SIGNALS)
        return 0;
    return (uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u + (uint64_t)(b.tv_nsec - a.tv_nsec) + 1;
}

#else

static int xfast_hw_available(void) { return 0; }
static uint64_t xfast_hw_xgetbv(uint32_t index) { (void)index; return 0; }

static void
xfast_hw_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *out)
{
    (void)leaf;
    (void)subleaf;
    out[0] = out[1] = out[2] = out[3] = 0;
}

static int
xfast_hw_arch_prctl(int code, unsigned long argument)
{
    (void)code;
    (void)argument;
    return -1;
}

static uint64_t
xfast_hw_run(struct xfast_step *steps, int n, uint64_t rounds, int observe, uint8_t *own,
             uint64_t own_mask)
{
    (void)steps;
    (void)n;
    (void)rounds;
    (void)observe;
    (void)own;
    (void)own_mask;
    return 0;
}

#endif
#endif
