/*
 * The steps that recipes are made of: each one system call, or a few, over one range.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#ifndef UFFDIO_MOVE
struct uffdio_move { __u64 dst, src, len, mode; __s64 move; };
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

static int result(long returned) { return returned < 0 ? -errno : 0; }

/* MADV_DONTNEED is EINVAL on a locked mapping, where DONTNEED_LOCKED (5.18)
 * does the same: somebody may call mlockall() long after we have reserved. */
static int dontneed(char *at, uint64_t length)
{
    int error = result(madvise(at, length, MADV_DONTNEED));

    if (error == -EINVAL && !madvise(at, length, MADV_DONTNEED_LOCKED))
        error = 0;
    return error;
}

/* MADV_REMOVE and MADV_GUARD_INSTALL are EINVAL on a locked mapping, too, and have no
 * variant for that.  So the range is unlocked first and locked again after, each page as it
 * comes: that is what mlockall(MCL_ONFAULT) gave it (any other way would have filled the
 * reservation), so the mapping stays one. */
static int advise_unlocked(char *at, uint64_t length, int advice)
{
    int error = result(madvise(at, length, advice));

    if (error == -EINVAL && !munlock(at, length)) {
        error = result(madvise(at, length, advice));
        if (!error)
            syscall(SYS_mlock2, at, length, MLOCK_ONFAULT);
    }
    return error;
}

/*
 * Populates without MADV_POPULATE_WRITE (before 5.14, and memfd_secret on every
 * kernel): FUTEX_WAKE_OP makes the kernel add 0 to a word of the page,
 * atomically.  So the page is faulted in for writing, its content is kept, no
 * concurrent store is lost, and a page that cannot be had is EFAULT instead of
 * SIGBUS.  The wake on our own dummy word wakes nobody.  *reached is how far it
 * got: unlike MADV_POPULATE_WRITE this way knows.
 */
static int futex_populate(char *at, uint64_t length, uint64_t page, uint64_t *calls,
                          uint64_t *reached)
{
    uint32_t dummy = 0;
    unsigned long add_zero = (unsigned long)FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0x7ff);

    for (*reached = 0; *reached < length; *reached += page, ++*calls)
        if (syscall(SYS_futex, &dummy, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, 0,
                    at + *reached, add_zero) < 0)
            return -errno;
    return 0;
}

/*
 * Touches each page as a program would, by writing a byte to it, but from within the
 * kernel: what cannot be had is EFAULT instead of SIGBUS.  The byte becomes zero.
 */
static int touch(char *at, uint64_t length, uint64_t page, uint64_t *calls)
{
    struct iovec bytes[1024];           /* UIO_MAXIOV */
    int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC), error = zero < 0 ? -errno : 0;

    for (uint64_t done = 0; !error && done < length; ++*calls) {
        int n = 0;

        for (uint64_t next = done; n < 1024 && next < length; n++, next += page)
            bytes[n] = (struct iovec){at + next, 1};
        ssize_t touched = readv(zero, bytes, n);
        if (touched < 0)
            error = -errno;
        else
            done += (uint64_t)touched * page;
    }
    if (zero >= 0)
        close(zero);
    return error;
}

/* Zeroes populated memory; as a read, so that a page that is gone all the same is EFAULT. */
static int zero(char *at, uint64_t length, uint64_t *calls)
{
    int zeroes = open("/dev/zero", O_RDONLY | O_CLOEXEC), error = zeroes < 0 ? -errno : 0;

    for (uint64_t done = 0; !error && done < length; ++*calls) {
        ssize_t got = read(zeroes, at + done, length - done);
        if (got < 0)
            error = -errno;
        else
            done += (uint64_t)got;
    }
    if (zeroes >= 0)
        close(zeroes);
    return error;
}

/*
 * Fills pages through userfaultfd, with zeroes: cheaper than a fault a page.  Bytes from
 * `at` on that it has come past; where it traps, past pages that are there already, too,
 * and *kept tells of those.  *error is why it came no further.
 *
 * In a child after fork() the descriptor would still fill the parent's memory (see uffd.c).
 */
static uint64_t fill(sm_job *job, char *at, uint64_t length, int zeropage, int *kept, int *error)
{
    const sm_uffd *u = job->uffd;
    uint64_t done = 0, again = 0;       /* the first call is counted already */

    *error = *kept = 0;
    while (uffd_is_ours(u) && done < length) {
        uint64_t size = length - done < u->nzeroes ? length - done : u->nzeroes;
        struct uffdio_copy copy = {.dst = (uintptr_t)at + done, .src = (uintptr_t)u->zeroes,
                                   .len = size};
        struct uffdio_zeropage zero = {.range = {(uintptr_t)at + done, size}};

        job->calls += again++ > 0;
        int failed = zeropage ? ioctl(u->fd, UFFDIO_ZEROPAGE, &zero)
                              : ioctl(u->fd, UFFDIO_COPY, &copy);
        int64_t did = zeropage ? zero.zeropage : copy.copy;

        if (did > 0)
            done += (uint64_t)did;
        if (!failed || errno == EAGAIN)
            continue;
        if (u->purpose == SM_UFFD_FILL || errno != EEXIST) {
            *error = -errno;
            break;
        }
        done += job->page;
        *kept = 1;
    }
    return done;
}

/*
 * Populates that way.  Where it is only to fill, the mapping is registered for write
 * protection, which nothing here uses: for that mode the kernel lets us fill, and neither
 * traps accesses nor bars huge pages.  It comes before the reset then, for the kernel
 * itself refuses where there is anything (EEXIST), a stray write or the zero page.
 * Whatever it does not do (for that, or since the mapping has changed, or for want of
 * memory) is left to the steps that follow, which do all of it anew, or say why not.
 *
 * Where missing pages trap, MADV_POPULATE_WRITE would only say EFAULT of them, so the error
 * is that of the ioctl.  What was there may not be mapped here, or not for writing (a page
 * of the file, the zero page), and that it can do.
 */
static int uffd_populate(sm_job *job, char *at, uint64_t length, int zeropage)
{
    int kept, error;
    uint64_t done = fill(job, at, length, zeropage, &kept, &error);

    if (!job->uffd || job->uffd->purpose == SM_UFFD_FILL) {
        job->placed += done;
        return 0;
    }
    if (error)
        return error;
    if (!kept && done == length)
        return 0;
    job->calls++;
    return result(madvise(at, length, MADV_POPULATE_WRITE));
}

/* Has discarded pages of private memory read zero without any memory, where they would trap. */
static int map_zero_pages(sm_job *job, char *at, uint64_t length)
{
    int kept, error;

    fill(job, at, length, 1, &kept, &error);
    return error;
}

/*
 * Moves pages that are ready, if there are enough; else the steps that follow do it all,
 * as for whoever finds the pool in use.  It comes before the reset: the kernel itself
 * refuses where there is anything in the target (EEXIST), a stray write or the zero page.
 */
static void move_in(sm_job *job, char *at, uint64_t length)
{
    sm_warm *w = job->warm;
    const sm_uffd *u = job->uffd;

    if (!w || !uffd_is_ours(u) || __atomic_exchange_n(&w->held, 1, __ATOMIC_ACQUIRE))
        return;
    uint64_t done = 0;
    int failed = length > w->ready || length % w->unit;

    if (!failed)
        w->ready -= length;     /* whatever comes of it, nobody takes these again */
    while (!failed && done < length) {
        struct uffdio_move move = {.dst = (uintptr_t)at + done, .len = length - done,
                                   .src = (uintptr_t)w->base + w->ready + done};

        failed = ioctl(u->fd, UFFDIO_MOVE, &move) && errno != EAGAIN;
        job->calls += done > 0;
        if (move.move > 0)
            done += (uint64_t)move.move;
        else
            failed = 1;     /* EAGAIN that has done nothing: not worth a wait */
    }
    job->placed += done;
    __atomic_store_n(&w->held, 0, __ATOMIC_RELEASE);
}

/*
 * Populates the last small page of each huge page, so that the kernel takes the huge
 * page for it: clearing one from its end on is twice as fast (measured: 0.12 against
 * 0.29 of the time for small pages).  The whole is populated afterwards all the same,
 * for where there was a page table already, this gives one small page.
 */
static int populate_last_pages(sm_job *job, uint64_t offset, uint64_t length)
{
    uint64_t small = (uint64_t)sysconf(_SC_PAGESIZE), end = (offset / job->huge + 1) * job->huge;
    int error = 0;

    for (; !error && end <= offset + length; end += job->huge, job->calls++)
        error = result(madvise(job->base + end - small, small, MADV_POPULATE_WRITE));
    return error;
}

/*
 * Populates the first small page of each huge page: collapsing what is empty is EINVAL.
 * Never by fallocate(): with huge= or shmem_enabled set that allocates the whole huge page
 * without clearing it, and MADV_COLLAPSE then maps it as it is, with whatever somebody
 * had in it before (measured on 6.18).  A fault clears what it brings.
 */
static int populate_first_pages(sm_job *job, uint64_t offset, uint64_t length)
{
    uint64_t small = (uint64_t)sysconf(_SC_PAGESIZE), at = offset;
    int error = 0;

    for (; !error && at < offset + length; at += job->huge, job->calls++)
        error = result(madvise(job->base + at, small, MADV_POPULATE_WRITE));
    return error;
}

/*
 * Makes huge pages of what is there, and keeps its content.  Where it may not
 * (shmem_enabled=deny, PR_SET_THP_DISABLE) or cannot (no huge page to be had, nothing
 * there at all), small pages stay: no error, but `collapsed` tells.  A call for each
 * huge page, since one over several says only whether it could make all of them.
 */
static void collapse(sm_job *job, char *at, uint64_t length)
{
    for (uint64_t done = 0; done < length; done += job->huge) {
        uint64_t piece = length - done < job->huge ? length - done : job->huge;

        job->calls += done > 0;         /* the first one is counted already */
        if (!madvise(at + done, piece, MADV_COLLAPSE))
            job->collapsed += piece;
    }
}

/*
 * Has pages count as written to, and takes off what a look at them has put on (sm_scan).  Before
 * a discard, which would keep that as a mark in the page table (measured on 6.18: in files, and
 * in all of hugetlb), where it looks like a swapped page.  Where it fails there is no mark.
 */
static void unprotect(const sm_job *job, char *at, uint64_t length)
{
    const sm_uffd *u = job->uffd;
    struct uffdio_writeprotect range = {.range = {(uintptr_t)at, length}};

    if (u && *u->ours)
        ioctl(u->fd, UFFDIO_WRITEPROTECT, &range);
}

/* One step over one range; 0 or -errno.  What a failed one has done is unknown. */
int step_issue(sm_job *job, unsigned step, uint64_t offset, uint64_t length)
{
    char *at = job->base + offset;
    job->calls++;
    switch (step) {
    case SM_STEP_DONTNEED:
        return dontneed(at, length);
    case SM_STEP_REMOVE:
        return advise_unlocked(at, length, MADV_REMOVE);
    case SM_STEP_PUNCH:
        return result(fallocate(job->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                (off_t)offset, (off_t)length));
    case SM_STEP_FALLOCATE:
        return result(fallocate(job->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length));
    case SM_STEP_POPULATE_WRITE:
        return result(madvise(at, length, MADV_POPULATE_WRITE));
    case SM_STEP_LAST_PAGES:
        return populate_last_pages(job, offset, length);
    case SM_STEP_FIRST_PAGES:
        return populate_first_pages(job, offset, length);
    case SM_STEP_COLLAPSE:
        collapse(job, at, length);
        return 0;
    case SM_STEP_COLD:
        return result(madvise(at, length, MADV_COLD));
    case SM_STEP_PAGEOUT:
        return result(madvise(at, length, MADV_PAGEOUT));
    case SM_STEP_UFFD_COPY:
        return uffd_populate(job, at, length, 0);
    case SM_STEP_UFFD_ZEROPAGE:
        return uffd_populate(job, at, length, 1);
    case SM_STEP_MOVE:
        move_in(job, at, length);
        return 0;
    case SM_STEP_UNPROTECT:
        unprotect(job, at, length);
        return 0;
    case SM_STEP_TOUCH:
        return touch(at, length, job->page, &job->calls);
    case SM_STEP_FUTEX:
        return futex_populate(at, length, job->page, &job->calls, &job->reached);
    case SM_STEP_ZERO:
        return zero(at, length, &job->calls);
    case SM_STEP_ZERO_PAGES:
        return map_zero_pages(job, at, length);
    case SM_STEP_GUARD:
        return advise_unlocked(at, length, MADV_GUARD_INSTALL);
    case SM_STEP_UNGUARD:
        return result(madvise(at, length, MADV_GUARD_REMOVE));
    case SM_STEP_FORBID:
        return result(mprotect(at, length, PROT_NONE));
    case SM_STEP_ALLOW:
        return result(mprotect(at, length, PROT_READ | PROT_WRITE));
    default:
        return -EINVAL;
    }
}
