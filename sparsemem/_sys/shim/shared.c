/*
 * Memory that somebody else has mapped, too: who may change it while we read it,
 * cut the file off under us, or be out of memory when we touch it.
 *
 * Blocks of bytes are copied by the kernel (sm_read_memory), which turns a page that
 * cannot be had into -EFAULT.  But it may copy byte by byte, where the index of a ring
 * must be one access; that is what is here, with the same result instead of SIGBUS.
 * It runs without the GIL, too: a page that does not come holds up only who asked for it.
 *
 * The handler of SIGBUS is the process's.  Outside of a guarded access it puts back
 * what was there before and returns: the fault comes again and goes where it would
 * have gone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>

#include "internal.h"

static struct sigaction before;

/* The landing of a thread that is in a guarded access.  Written before the handler can
 * look at it and by the same thread, so no more than the compiler has to be held back. */
static __thread sigjmp_buf landing;
static __thread volatile sig_atomic_t guarded;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (guarded && info->si_code > 0) {     /* a real fault, and no kill() */
        guarded = 0;
        siglongjmp(landing, 1);
    }
    sigaction(SIGBUS, &before, NULL);
    if (info->si_code <= 0)
        raise(number);
}

/* Once: whoever puts in another handler afterwards (faulthandler does) wants to see the faults. */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void install(void)
{
    struct sigaction ours = { .sa_sigaction = on_sigbus };

    sigemptyset(&ours.sa_mask);
    /* NODEFER: the jump out of the handler leaves no signal blocked, so that neither
     * setting the landing nor jumping needs a system call. */
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGBUS, &ours, &before);
}

/* A landing for what follows, which returns from the function that it is used in.  A macro, since
 * who sets a landing must not have returned when it is jumped to. */
#define GUARD()                             \
    do {                                    \
        pthread_once(&once, install);       \
        if (sigsetjmp(landing, 0) != 0)     \
            return -EFAULT;                 \
        enter();                            \
    } while (0)

/* The compiler must not move the access out from between these two. */
static void enter(void)
{
    guarded = 1;
    __asm__ volatile("" ::: "memory");
}

static void leave(void)
{
    __asm__ volatile("" ::: "memory");
    guarded = 0;
}

/* Acquire: what the other side wrote before it moved the index is there for later reads. */
int sm_shared_load16(uint64_t address)
{
    uint16_t value;

    GUARD();
    value = __atomic_load_n((const uint16_t *)(uintptr_t)address, __ATOMIC_ACQUIRE);
    leave();
    return value;
}

/* Release: what we wrote before is there for whoever sees the value.  The fence after it keeps
 * a later load from being done first: one side tells where it stands and then looks at
 * the other's wish, which x86 reorders, too. */
int sm_shared_store16(uint64_t address, uint16_t value)
{
    GUARD();
    __atomic_store_n((uint16_t *)(uintptr_t)address, value, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    leave();
    return 0;
}
