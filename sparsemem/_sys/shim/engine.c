/*
 * The engine's loop: runs, cut into chunks, each put through the steps of a
 * recipe.  It can be left at any chunk and taken up again: one cursor says how
 * far it got, another how far it was begun, so what has to be rolled back is
 * always known exactly.  A job can be cut into parts for several threads.
 *
 * Why chunks: one MADV_POPULATE_WRITE holds mmap_lock for reading to its end
 * and only SIGKILL interrupts it, so another thread's mmap() waits as long
 * (measured: 2 s of 2 s; with 2 MiB chunks 5-20 ms, at the same throughput).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

int64_t clock_ns(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

/* Tests make the nth call of a step fail, after some of it was really done; how much,
 * or -1 if this call is none that fails. */
static int64_t fault_due(sm_job *job, unsigned step, uint64_t length)
{
    sm_fault *fault = job->fault;

    if (!fault || fault->step != step || !fault->repeat ||
        __atomic_sub_fetch(&fault->nth, 1, __ATOMIC_RELAXED))
        return -1;
    fault->nth = 1;
    fault->repeat--;
    return (int64_t)(fault->after < length ? fault->after : length);
}

static int issue_or_fail(sm_job *job, unsigned step, sm_run range)
{
    int64_t partial = fault_due(job, step, range.count);

    if (partial < 0)
        return step_issue(job, step, range.first, range.count);
    int error = partial ? step_issue(job, step, range.first, (uint64_t)partial) : 0;
    job->reached = (uint64_t)partial;
    return error ? error : -job->fault->error;
}

/* ---- several ranges in one call --------------------------------------------------- */

/*
 * process_madvise() on oneself (6.13, or 6.15 for all that is used here) takes many
 * ranges in one call.  It stops at the first that fails and returns the bytes before,
 * clips at 2 GiB, and counts a hugetlb page that it did not do; so: few ranges, never
 * more than a chunk together, no hugetlb, and what it returns is compared.  More than
 * 64 ranges gain nothing (measured).
 */
enum { BATCH = 64, WORTH_A_VECTOR = 8 };

static int vector_advice(unsigned step)
{
    switch (step) {
    case SM_STEP_DONTNEED:
        return MADV_DONTNEED;
    case SM_STEP_REMOVE:
        return MADV_REMOVE;
    case SM_STEP_POPULATE_WRITE:
        return MADV_POPULATE_WRITE;
    default:
        return -1;
    }
}

/* Many small ranges are not worth a call each: they are left to the populate that follows,
 * which takes them all in one.  But what traps is filled in no other way. */
static int is_fill(const sm_job *job, unsigned step)
{
    return (step == SM_STEP_UFFD_COPY || step == SM_STEP_UFFD_ZEROPAGE) &&
           !(job->uffd && job->uffd->purpose != SM_UFFD_FILL);
}

/* The ranges' bytes [*did, total): *did grows by what was done. */
static int issue_vector(sm_job *job, int self, unsigned step, const sm_run *ranges, unsigned n,
                        uint64_t total, uint64_t *did)
{
    while (*did < total) {
        struct iovec vector[BATCH];
        uint64_t skip = *did, end = total;
        int64_t partial = fault_due(job, step, total - *did);
        unsigned used = 0;

        if (partial == 0)
            return -job->fault->error;
        if (partial > 0)
            end = *did + (uint64_t)partial;
        for (unsigned i = 0; i < n && end > 0; i++) {
            uint64_t length = ranges[i].count < end ? ranges[i].count : end;

            end -= length;
            if (skip >= length) {
                skip -= length;
                continue;
            }
            vector[used++] = (struct iovec){job->base + ranges[i].first + skip, length - skip};
            skip = 0;
        }
        job->calls++;
        long bytes = syscall(SYS_process_madvise, self, vector, used, vector_advice(step), 0);
        if (bytes <= 0)
            return bytes ? -errno : -EIO;
        *did += (uint64_t)bytes;
        if (partial > 0)
            return -job->fault->error;
    }
    return 0;
}

/* Whether all of that works here, found by trying it on two pages of our own. */
int sm_can_vector(void)
{
    long page = sysconf(_SC_PAGESIZE);
    int self = (int)syscall(SYS_pidfd_open, getpid(), 0), works = 0;
    char *at = mmap(NULL, 3 * (size_t)page, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (self >= 0 && at != MAP_FAILED) {
        struct iovec two[2] = {{at, (size_t)page}, {at + 2 * page, (size_t)page}};

        at[0] = at[2 * page] = 1;
        works = syscall(SYS_process_madvise, self, two, 2, MADV_DONTNEED, 0) == 2 * page &&
                !at[0] && !at[2 * page] &&
                syscall(SYS_process_madvise, self, two, 2, MADV_POPULATE_WRITE, 0) == 2 * page;
    }
    if (at != MAP_FAILED)
        munmap(at, 3 * (size_t)page);
    if (self >= 0)
        close(self);
    return works;
}

/* ---- the loop ----------------------------------------------------------------------- */

static uint64_t length_of(const sm_job *job, size_t run)
{
    return job->tail && run == job->nruns - 1 ? job->tail : job->runs[run].count << job->shift;
}

static sm_cursor moved(const sm_job *job, sm_cursor at, uint64_t bytes)
{
    while (bytes) {
        uint64_t left = length_of(job, at.run) - at.done, step = bytes < left ? bytes : left;

        bytes -= step;
        at.done += step;
        if (step == left)
            at = (sm_cursor){at.run + 1, 0};
    }
    return at;
}

/* The next ranges, a chunk together at most.  They end at multiples of the chunk size,
 * so that none straddles a huge page. */
static unsigned gather(const sm_job *job, unsigned most, sm_run *ranges, uint64_t *total)
{
    sm_cursor at = job->at;
    unsigned n = 0;

    for (*total = 0; n < most && at.run < job->nruns; n++) {
        uint64_t left = length_of(job, at.run) - at.done;
        uint64_t offset = (job->runs[at.run].first << job->shift) + at.done;
        uint64_t piece = job->chunk - offset % job->chunk;

        if (piece > left)
            piece = left;
        if (n && *total + piece > job->chunk)
            break;
        ranges[n] = (sm_run){offset, piece};
        *total += piece;
        at = moved(job, at, piece);
    }
    return n;
}

/* One step over all ranges; *did is how many bytes of them succeeded. */
static int step_over(sm_job *job, int self, unsigned step, const sm_run *ranges, unsigned n,
                     uint64_t total, uint64_t *did)
{
    *did = 0;
    if (self >= 0 && n >= WORTH_A_VECTOR && is_fill(job, step))
        return 0;
    if (self >= 0 && n >= WORTH_A_VECTOR && vector_advice(step) >= 0) {
        int error = issue_vector(job, self, step, ranges, n, total, did);
        if (error != -EINVAL)
            return error;
    }
    /* EINVAL: some of it was locked since (see dontneed), anywhere in the vector.  Issued one
     * by one a step knows what to do; that starts behind what the vector has done. */
    uint64_t skip = *did;
    for (unsigned i = 0; i < n; i++) {
        uint64_t done = skip < ranges[i].count ? skip : ranges[i].count;
        sm_run rest = {ranges[i].first + done, ranges[i].count - done};

        skip -= done;
        int error = rest.count ? issue_or_fail(job, step, rest) : 0;
        if (error)
            return error;
        *did += rest.count;
    }
    return 0;
}

/* The end of the range that byte `did` of the ranges lies in, as a number of such bytes. */
static uint64_t end_of_range(const sm_run *ranges, unsigned n, uint64_t did)
{
    uint64_t end = 0;

    for (unsigned i = 0; i < n && end <= did; i++)
        end += ranges[i].count;
    return end;
}

/*
 * Access could not be taken away from one of n ranges, the last (the process has as many
 * mappings as it may): it is given back to them all, for the others have lost it, and a part
 * of that one may have.  Nothing is discarded yet, so the blocks of an unplug are then plugged
 * as before.  Backwards, since that takes no more mappings than there were on the way there: a
 * range that has become one with its protected neighbours has to be cut out of them again, and
 * those after it may have taken what that needs.  Where one cannot be had back the others are
 * all the same.
 */
static int give_access_back(sm_job *job, const sm_run *ranges, unsigned n)
{
    int all = 1;

    while (n--)
        if (step_issue(job, SM_STEP_ALLOW, ranges[n].first, ranges[n].count))
            all = 0;
    return all;
}

/*
 * A step failed after `did` bytes of the ranges.  What all steps have done counts as
 * done, and what any has touched as begun.  Where nothing was done before it, the futex
 * way knows how far it got; that matters to a backend which cannot discard: it zeroes
 * what is populated, and must touch no more.
 */
static int note_failure(sm_job *job, unsigned i, const sm_run *ranges, unsigned n,
                        uint64_t total, uint64_t did, int error)
{
    uint64_t touched = i ? total : end_of_range(ranges, n, did), at = did;
    unsigned failed = 0;

    while (failed < n && at >= ranges[failed].count)
        at -= ranges[failed++].count;
    if (failed < n)
        job->failed_at = ranges[failed].first + at;
    if (i == 0 && job->steps[i] == SM_STEP_FUTEX)
        touched = did + job->reached;
    job->intact = i == 0 && job->steps[i] == SM_STEP_FORBID && failed < n &&
                  give_access_back(job, ranges, failed + 1);
    job->begun = moved(job, job->at, touched);
    if (i == job->nsteps - 1) {
        job->at = moved(job, job->at, did);
        job->bytes += did;
    }
    job->failed = -error;
    return error;
}

static int all_steps(sm_job *job, int self, unsigned most)
{
    sm_run ranges[BATCH];
    uint64_t total, did;
    unsigned n = gather(job, most, ranges, &total);

    job->begun = moved(job, job->at, total);
    job->placed = 0;
    /* Fresh pages that were put where nothing was: no step is left for such a chunk.  (No
     * byte is placed twice, so their sum is the chunk only if all of it was.) */
    for (unsigned i = 0; i < job->nsteps && job->placed < total; i++) {
        int error = step_over(job, self, job->steps[i], ranges, n, total, &did);
        if (error == -EINTR)
            return error;
        if (error)
            return note_failure(job, i, ranges, n, total, did, error);
    }
    job->at = job->begun;
    job->bytes += total;
    return 0;
}

static int told_to_stop(const sm_job *job)
{
    return job->crew && __atomic_load_n(&job->crew->stop, __ATOMIC_SEQ_CST);
}

/*
 * Works on from the cursor until all is done (SM_OK), the time slice is used up or
 * the crew is told to stop (SM_MORE), or a step fails (-errno; the crew stops then).
 *
 * EINTR (hugetlb fallocate gives it for any signal, with part of it done) only
 * ends the slice: Python then runs the signal's handler, and all steps can be
 * repeated over their own partial result.
 */
static int advance(sm_job *job, uint64_t budget_ns)
{
    int64_t start = budget_ns == UINT64_MAX ? 0 : clock_ns();
    /* Opened for each slice, for one that outlived a fork would mean the parent. */
    int self = job->vectored && job->nruns > WORTH_A_VECTOR
                   ? (int)syscall(SYS_pidfd_open, getpid(), 0) : -1;
    int code = SM_OK;

    while (code == SM_OK && job->at.run < job->nruns) {
        if (told_to_stop(job)) {
            code = SM_MORE;
            break;
        }
        code = all_steps(job, self, self < 0 ? 1 : BATCH);
        if (code == -EINTR || (code == SM_OK && job->at.run < job->nruns &&
                               budget_ns != UINT64_MAX &&
                               (uint64_t)(clock_ns() - start) >= budget_ns))
            code = SM_MORE;
    }
    if (self >= 0)
        close(self);
    return code;
}

int sm_advance(sm_job *job, uint64_t budget_ns)
{
    sm_crew *crew = job->crew;
    int code;

    if (!crew)
        return advance(job, budget_ns);
    /* Counted in before `stop` is looked at: who stops the crew sets it first and
     * counts then, so nobody works on after that. */
    __atomic_add_fetch(&crew->active, 1, __ATOMIC_SEQ_CST);
    code = advance(job, budget_ns);
    if (code < 0)
        __atomic_store_n(&crew->stop, 1, __ATOMIC_SEQ_CST);
    __atomic_sub_fetch(&crew->active, 1, __ATOMIC_SEQ_CST);
    return code;
}

/* Lets no further chunk begin, and waits at most so long until none is being worked on;
 * how many threads still are. */
int sm_crew_stop(sm_crew *crew, unsigned wait_ms)
{
    __atomic_store_n(&crew->stop, 1, __ATOMIC_SEQ_CST);
    for (unsigned waited = 0;; waited++) {
        int active = __atomic_load_n(&crew->active, __ATOMIC_SEQ_CST);

        if (!active || waited == wait_ms)
            return active;
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
}

/* Cuts a job that has not begun into parts of about one size, at offsets that are
 * multiples of `align`.  Parts may be empty. */
void sm_job_split(const sm_job *job, uint64_t align, sm_job *parts, unsigned nparts)
{
    uint64_t total = sm_runs_total(job->runs, job->nruns) << job->shift, before = 0;
    sm_cursor at = {0, 0};

    for (unsigned i = 0; i < nparts; i++) {
        uint64_t want = (uint64_t)((__uint128_t)total * (i + 1) / nparts);

        parts[i] = *job;
        parts[i].start = parts[i].at = parts[i].begun = at;
        while (at.run < job->nruns && before < want) {
            uint64_t start = job->runs[at.run].first << job->shift;
            uint64_t end = start + (job->runs[at.run].count << job->shift);
            uint64_t cut = start + at.done + (want - before);

            cut = (cut + align - 1) / align * align;
            if (cut > end || i == nparts - 1)
                cut = end;
            before += cut - (start + at.done);
            at = cut == end ? (sm_cursor){at.run + 1, 0} : (sm_cursor){at.run, cut - start};
        }
        parts[i].nruns = at.run + (at.done > 0);
        parts[i].tail = at.done;
        if (at.run == parts[i].at.run && at.done == parts[i].at.done) {
            parts[i].nruns = at.run;    /* empty */
            parts[i].tail = 0;
        }
    }
}
