/*
 * The short way: a small plug or unplug in one call, about which there is nothing to
 * say but that it worked.  Anything else (somebody listens, blocks to wait for, a
 * budget, a reading of the headroom that is used up, an error) returns 0 with nothing
 * changed, and the long way in Python does it, or says why not.
 *
 * The order is that of the long way: claim, headroom, populate, commit.  All of it is
 * one call, so no interrupt falls in between.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>

#include "internal.h"

/* A claim on one run, on the stack. */
typedef union {
    sm_claim claim;
    char room[sizeof(sm_claim) + sizeof(sm_run)];
} one_run;

static int take(sm_quick *q, one_run *one, int want, int64_t first, int64_t count,
                const sm_job *job)
{
    sm_claim *claim = &one->claim;

    if (first < 0 || count < 1 || (uint64_t)count > job->chunk >> job->shift)
        return 0;
    memset(one, 0, sizeof *one);
    claim->nruns = 1;
    claim->runs[0] = (sm_run){(uint64_t)first, (uint64_t)count};
    /* As Python's threading.get_ident(). */
    return blocks_take_at_once(q->blocks, claim, want, (uint64_t)pthread_self());
}

/* The whole of a job over one run; its error, and whether it has changed anything. */
static int work(const sm_job *prepared, const sm_run *run, uint64_t *calls, int *changed)
{
    sm_job job = *prepared;
    int code;

    job.runs = run;
    job.nruns = 1;
    do
        code = sm_advance(&job, UINT64_MAX);
    while (code == SM_MORE);    /* a signal; Python looks at it afterwards */
    *calls += job.calls;
    *changed = !job.intact || job.at.run || job.at.done;
    return code;
}

static int spend(sm_gauge *g, int64_t bytes, int64_t now)
{
    if (g->off)
        return 1;
    if (now > g->expires_ns || __atomic_sub_fetch(&g->left, bytes, __ATOMIC_RELAXED) < g->floor)
        return 0;               /* too much taken: it is read anew now */
    return 1;
}

static void count(uint64_t *counter, uint64_t by)
{
    __atomic_add_fetch(counter, by, __ATOMIC_RELAXED);
}

/* 1: plugged.  0: nothing has changed.  -errno: it failed, and so did giving back what
 * was populated; the blocks are tainted. */
int sm_quick_plug(sm_quick *q, int64_t first, int64_t blocks)
{
    one_run one;
    int64_t start = clock_ns();
    uint64_t calls = 0;
    int changed;

    if (!take(q, &one, SM_TO_PLUGGED, first, blocks, q->plug))
        return 0;
    sm_claim *claim = &one.claim;
    sm_outcome outcome = {.plugged = claim->runs, .nplugged = 1};
    if (!spend(q->gauge, blocks << q->plug->shift, start)) {
        sm_claim_finish(claim, NULL, 0);
        return 0;
    }
    int error = work(q->plug, claim->runs, &calls, &changed);
    if (error && q->unplug->nsteps && !work(q->unplug, claim->runs, &calls, &changed)) {
        sm_claim_finish(claim, NULL, 0);
        return 0;
    }
    if (error)
        outcome = (sm_outcome){.tainted = claim->runs, .ntainted = 1};
    sm_claim_finish(claim, &outcome, 0);
    if (error)
        return error;
    count(&q->plugs, 1);
    count(&q->plugged_blocks, (uint64_t)blocks);
    count(&q->calls, calls);
    count(&q->ns, (uint64_t)(clock_ns() - start));
    return 1;
}

/* 1: unplugged.  0: nothing has changed.  -errno: the discard failed; the blocks stay
 * plugged and are tainted. */
int sm_quick_unplug(sm_quick *q, int64_t first, int64_t blocks)
{
    one_run one;
    int64_t start = clock_ns();
    uint64_t calls = 0;
    int changed;

    if (!q->unplug->nsteps || !take(q, &one, SM_TO_UNPLUGGED, first, blocks, q->unplug))
        return 0;
    sm_claim *claim = &one.claim;
    sm_outcome outcome = {.unplugged = claim->runs, .nunplugged = 1,
                          .healed = claim->runs, .nhealed = 1};
    int error = work(q->unplug, claim->runs, &calls, &changed);
    if (error && !changed) {
        sm_claim_finish(claim, NULL, 0);
        return 0;
    }
    if (error)
        outcome = (sm_outcome){.tainted = claim->runs, .ntainted = 1};
    sm_claim_finish(claim, &outcome, 0);
    if (error)
        return error;
    count(&q->unplugs, 1);
    count(&q->unplugged_blocks, (uint64_t)blocks);
    count(&q->calls, calls);
    count(&q->ns, (uint64_t)(clock_ns() - start));
    return 1;
}
