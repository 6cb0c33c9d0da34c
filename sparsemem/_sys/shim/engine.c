/*
 * The engine's loop: runs, cut into chunks, each put through the steps of a
 * recipe.  It can be left at any chunk and taken up again: the cursor (run,
 * done) says how far it got, inflight how much beyond that was begun, so what
 * has to be rolled back is always known exactly.
 *
 * Why chunks: one MADV_POPULATE_WRITE holds mmap_lock for reading to its end
 * and only SIGKILL interrupts it, so another thread's mmap() waits as long
 * (measured: 2 s of 2 s; with 2 MiB chunks 5-20 ms, at the same throughput).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

static uint64_t now_ns(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

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

static int issue(sm_job *job, unsigned step, uint64_t offset, uint64_t length)
{
    char *at = job->base + offset;
    job->calls++;
    switch (step) {
    case SM_STEP_DONTNEED:
        return dontneed(at, length);
    case SM_STEP_REMOVE:
        return result(madvise(at, length, MADV_REMOVE));
    case SM_STEP_PUNCH:
        return result(fallocate(job->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                (off_t)offset, (off_t)length));
    case SM_STEP_FALLOCATE:
        return result(fallocate(job->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length));
    case SM_STEP_POPULATE_WRITE:
        return result(madvise(at, length, MADV_POPULATE_WRITE));
    case SM_STEP_FUTEX:
        return futex_populate(at, length, job->page, &job->calls, &job->reached);
    case SM_STEP_ZERO:
        memset(at, 0, length);          /* only ever after FUTEX, on its pages */
        return 0;
    default:
        return -EINVAL;
    }
}

/* Tests make the nth call of a step fail, after some of it was really done. */
static int issue_or_fail(sm_job *job, unsigned step, uint64_t offset, uint64_t length)
{
    sm_fault *fault = job->fault;

    if (fault && fault->step == step && fault->repeat && --fault->nth == 0) {
        fault->nth = 1;
        fault->repeat--;
        if (fault->after) {
            uint64_t partial = fault->after < length ? fault->after : length;
            int error = issue(job, step, offset, partial);
            if (error)
                return error;
        }
        job->reached = fault->after < length ? fault->after : length;
        return -fault->error;
    }
    return issue(job, step, offset, length);
}

/*
 * Works on from the cursor until all is done (SM_OK), the time slice is used up
 * (SM_MORE) or a step fails (-errno; the cursor is before the chunk that failed
 * and inflight is that chunk's length).  Chunks end at multiples of the chunk
 * size, so that none straddles a huge page.
 *
 * EINTR (hugetlb fallocate gives it for any signal, with part of it done) only
 * ends the slice: Python then runs the signal's handler, and all steps can be
 * repeated over their own partial result.
 */
int sm_advance(sm_job *job, uint64_t budget_ns)
{
    uint64_t start = now_ns();

    while (job->run < job->nruns) {
        uint64_t length = job->runs[job->run].count << job->shift;
        uint64_t offset = (job->runs[job->run].first << job->shift) + job->done;
        uint64_t piece = job->chunk - offset % job->chunk;

        if (piece > length - job->done)
            piece = length - job->done;
        job->inflight = piece;
        for (unsigned i = 0; i < job->nsteps; i++) {
            int error = issue_or_fail(job, job->steps[i], offset, piece);
            if (error == -EINTR)
                return SM_MORE;
            if (error) {
                /* Where nothing was done before it in this chunk, the futex way
                 * knows how far it got.  That matters to a backend which cannot
                 * discard: it zeroes what is populated, and must touch no more. */
                if (i == 0 && job->steps[i] == SM_STEP_FUTEX)
                    job->inflight = job->reached;
                job->failed = -error;
                return error;
            }
        }
        job->inflight = 0;
        job->bytes += piece;
        job->done += piece;
        if (job->done == length) {
            job->run++;
            job->done = 0;
        }
        if (job->run < job->nruns && now_ns() - start >= budget_ns)
            return SM_MORE;
    }
    return SM_OK;
}
