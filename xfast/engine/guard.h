/* A file that is mapped and then cut off ends a process by SIGBUS. Here such a page becomes zeros,
 * and whoever mapped it is told.
 *
 * The handler knows the windows that are open. A fault elsewhere goes to whoever handled SIGBUS
 * before. It calls nothing but mmap(), which is a system call and no more.
 */
#ifndef XFAST_GUARD_H
#define XFAST_GUARD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>

enum { XFAST_WINDOWS = 64 };

struct xfast_window {
    uintptr_t start, end;   /* end 0: free */
    int broken;             /* pages that were not there */
};

static struct xfast_window xfast_window[XFAST_WINDOWS];

static struct sigaction xfast_before;

static void
xfast_on_sigbus(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr, page = at & ~(uintptr_t)4095;
    for (int i = 0; i < XFAST_WINDOWS; i++) {
        uintptr_t end = __atomic_load_n(&xfast_window[i].end, __ATOMIC_ACQUIRE);
        if (at >= end || at < xfast_window[i].start)
            continue;
        __atomic_fetch_add(&xfast_window[i].broken, 1, __ATOMIC_RELAXED);
        if (mmap((void *)page, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
            != MAP_FAILED)
            return;
    }
    if (xfast_before.sa_flags & SA_SIGINFO)
        xfast_before.sa_sigaction(number, info, context);
    else if (xfast_before.sa_handler != SIG_DFL && xfast_before.sa_handler != SIG_IGN)
        xfast_before.sa_handler(number);
    else
        signal(SIGBUS, SIG_DFL);  /* the access is tried again, and ends the process */
}

/* Become the handler of SIGBUS, unless it is so already. */
static int
xfast_guard(void)
{
    struct sigaction now, ours = {0};
    if (sigaction(SIGBUS, NULL, &now))
        return -1;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == xfast_on_sigbus)
        return 0;
    xfast_before = now;
    ours.sa_sigaction = xfast_on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL);
}

#endif
