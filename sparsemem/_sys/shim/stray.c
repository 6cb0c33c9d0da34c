/*
 * Stray accesses, told instead of killed: a thread reads the userfaultfd, fills in what
 * was touched, so that the access goes through, and notes it for whoever waits.
 *
 * It never takes the GIL: a Python thread that stores to a memoryview holds it while it
 * waits for the fault to be resolved.  It touches no memory of the region, and the engine
 * never waits for it: what the kernel populates for us is EFAULT and no message, since only
 * faults of user code are asked for (uffd.c), and filling in makes no fault at all.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "internal.h"

#ifndef UFFDIO_POISON
struct uffdio_poison { struct uffdio_range range; __u64 mode; __s64 pages_updated; };
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

enum { ROOM = 1024, AT_ONCE = 16 };

struct sm_watch {
    sm_watched what;
    int pid;
    int stop;                       /* an eventfd: the thread is to end             */
    pthread_t thread;
    int started;                    /* and not yet joined                           */
    pthread_mutex_t mutex;          /* of what follows                              */
    pthread_cond_t more;            /* something was noted, or it has ended         */
    int ended;
    uint64_t first, n;              /* the notes that nobody has fetched            */
    uint64_t caught, dropped;
    sm_stray notes[ROOM];
};

static void note(sm_watch *w, uint64_t offset, const struct uffd_msg *message)
{
    pthread_mutex_lock(&w->mutex);
    w->caught++;
    if (w->n == ROOM)
        w->dropped++;
    else
        w->notes[(w->first + w->n++) % ROOM] = (sm_stray){
            offset, message->arg.pagefault.feat.ptid,
            (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0};
    pthread_cond_signal(&w->more);
    pthread_mutex_unlock(&w->mutex);
}

/*
 * Fills in one page and lets whoever waits for it go on: with the zero page where private
 * memory may have it, else with memory.  Where there is none left the page is poisoned, so
 * that the access is SIGBUS, as it is without protection; that stays until it is filled in
 * (a punch does not heal it, measured on 6.18), which the next plug of the block does.
 */
static void resolve(const sm_watch *w, uint64_t address)
{
    const sm_uffd *u = w->what.uffd;
    struct uffdio_range page = {address & ~(w->what.page - 1), w->what.page};
    int failed;

    do {
        struct uffdio_zeropage zero = {.range = page};
        struct uffdio_copy copy = {.dst = page.start, .src = (uintptr_t)u->zeroes,
                                   .len = page.len};

        failed = w->what.zeropage ? ioctl(u->fd, UFFDIO_ZEROPAGE, &zero)
                                  : ioctl(u->fd, UFFDIO_COPY, &copy);
    } while (failed && errno == EAGAIN);    /* the mappings are being changed */
    if (!failed)
        return;
    if (errno != EEXIST) {
        struct uffdio_poison poison = {.range = page};

        while (ioctl(u->fd, UFFDIO_POISON, &poison) && errno == EAGAIN)
            ;
    }
    ioctl(u->fd, UFFDIO_WAKE, &page);       /* somebody else was faster, or it is gone */
}

/* Pages that were discarded within plugged blocks may be touched: those are only filled in. */
static int is_plugged(const sm_watch *w, uint64_t offset)
{
    uint64_t block = offset >> w->what.shift;

    return w->what.plugged[block / 64] >> block % 64 & 1;
}

/* Messages that are waiting, whatever else is to be done; 0 if there were none. */
static int take_some(sm_watch *w)
{
    struct uffd_msg messages[AT_ONCE];
    ssize_t got = read(w->what.uffd->fd, messages, sizeof messages);

    for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
        uint64_t address = messages[i].arg.pagefault.address;
        uint64_t offset = address - w->what.base;

        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        if (!is_plugged(w, offset))
            note(w, offset, &messages[i]);
        resolve(w, address);
    }
    return got > 0;
}

static void *handle(void *argument)
{
    sm_watch *w = argument;

    for (;;) {
        struct pollfd ready[2] = {{w->what.uffd->fd, POLLIN, 0}, {w->stop, POLLIN, 0}};

        if (take_some(w))
            continue;
        if (poll(ready, 2, -1) < 0 && errno != EINTR)
            break;
        if (!(ready[0].revents & POLLIN) && ready[1].revents)
            break;
    }
    pthread_mutex_lock(&w->mutex);
    w->ended = 1;
    pthread_cond_broadcast(&w->more);
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

/* Its userfaultfd and bitmap must outlive it; NULL if there is no memory. */
sm_watch *sm_watch_new(const sm_watched *what)
{
    sm_watch *w = calloc(1, sizeof *w);

    if (!w)
        return NULL;
    w->what = *what;
    w->pid = getpid();
    w->stop = -1;
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->more, NULL);
    return w;
}

/* Once; 0 or -errno.  Signals are for threads that run Python. */
int sm_watch_start(sm_watch *w)
{
    sigset_t all, before;
    int error;

    w->stop = eventfd(0, EFD_CLOEXEC);
    if (w->stop < 0)
        return -errno;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&w->thread, NULL, handle, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    w->started = !error;
    return -error;
}

/* Waits until something was noted, and takes it; 0 once it has ended and nothing is left. */
size_t sm_watch_wait(sm_watch *w, sm_stray *out, size_t capacity)
{
    size_t n = 0;

    pthread_mutex_lock(&w->mutex);
    while (!w->n && !w->ended)
        pthread_cond_wait(&w->more, &w->mutex);
    for (; n < capacity && w->n; n++, w->n--)
        out[n] = w->notes[w->first++ % ROOM];
    pthread_mutex_unlock(&w->mutex);
    return n;
}

/* Accesses that were noted, and those of them for which there was no room. */
void sm_watch_counts(sm_watch *w, uint64_t *caught, uint64_t *dropped)
{
    if (w->pid != getpid()) {
        *caught = *dropped = 0;
        return;
    }
    pthread_mutex_lock(&w->mutex);
    *caught = w->caught;
    *dropped = w->dropped;
    pthread_mutex_unlock(&w->mutex);
}

/* Ends the thread, once it has resolved what has come so far.  A child has no such thread. */
void sm_watch_stop(sm_watch *w)
{
    uint64_t one = 1;

    if (w->pid != getpid() || !__atomic_exchange_n(&w->started, 0, __ATOMIC_ACQ_REL))
        return;
    while (write(w->stop, &one, sizeof one) < 0 && errno == EINTR)
        ;
    pthread_join(w->thread, NULL);
    close(w->stop);
    w->stop = -1;
}

void sm_watch_free(sm_watch *w)
{
    sm_watch_stop(w);
    if (w->stop >= 0)       /* it never started, or is the parent's */
        close(w->stop);
    free(w);
}
