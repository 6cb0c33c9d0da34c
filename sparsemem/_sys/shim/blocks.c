/*
 * The block map: which blocks are plugged, busy and tainted, who holds which,
 * and which are pinned by views.  It touches no memory but its own.
 *
 * One mutex guards all of it and is only ever held inside one of these
 * functions, so it is never held while Python code runs: a finaliser in
 * garbage collection can take it, and a KeyboardInterrupt sees either nothing
 * or all of what a function does.
 *
 * An operation takes a *claim* on all its blocks (they become busy), works
 * without the mutex, and finishes the claim in one call, which sets what came
 * of it and gives the blocks back.  Overlapping claims wait, disjoint ones do
 * not see each other.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

/* A thread that waits for blocks; on its stack. */
struct waiter {
    uint64_t owner;
    const sm_run *runs;
    size_t nruns;
    int seen;
    struct waiter *next;
};

struct sm_blocks {
    pthread_mutex_t mutex;
    pthread_cond_t changed;         /* a claim was finished                     */
    uint64_t nblocks, block_size;
    uint64_t *plugged, *busy, *tainted;
    uint64_t *pending;              /* unplugged, and still to be discarded     */
    uint64_t nplugged, ntainted, nbusy, npending;
    int state;                      /* SM_OK, SM_CLOSED or SM_FORKED            */
    sm_claim *claims;               /* the open ones                            */
    sm_claim *exclusive;            /* a whole claim keeps all others out       */
    unsigned waiting_for_all;       /* and so does a thread that waits for one  */
    int watched;                    /* somebody listens                         */
    sm_pin *pins;
    struct waiter *waiters;         /* threads that wait for blocks             */
    sm_budget *budget;
    uint64_t *discarded;            /* pages discarded inside plugged blocks    */
    uint64_t pages_per_block;       /*   (a map that is made when one first is) */
    unsigned long references;
    struct sm_blocks *next, **link; /* all maps, for fork()                     */
};

static int init_sync(sm_blocks *b)
{
    pthread_condattr_t attributes;
    int error = pthread_mutex_init(&b->mutex, NULL);

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error |= pthread_cond_init(&b->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    return error;
}

/*
 * fork() copies mutexes as they are.  All maps are locked across it, so that the
 * child's copies are whole.  That is done here and not by a Python hook: other
 * hooks, garbage collection and finalisers would run while the mutexes are held.
 * The order is the list first, then the maps; nobody else takes both.
 */
static pthread_mutex_t list_mutex = PTHREAD_MUTEX_INITIALIZER;
static sm_blocks *all_maps;

static void before_fork(void)
{
    pthread_mutex_lock(&list_mutex);
    for (sm_blocks *b = all_maps; b; b = b->next)
        pthread_mutex_lock(&b->mutex);
}

static void after_fork_in_parent(void)
{
    for (sm_blocks *b = all_maps; b; b = b->next)
        pthread_mutex_unlock(&b->mutex);
    pthread_mutex_unlock(&list_mutex);
}

static void after_fork_in_child(void)
{
    for (sm_blocks *b = all_maps; b; b = b->next)
        init_sync(b);
    pthread_mutex_init(&list_mutex, NULL);
}

static void watch_fork(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void enlist(sm_blocks *b)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, watch_fork);
    pthread_mutex_lock(&list_mutex);
    b->next = all_maps;
    b->link = &all_maps;
    if (b->next)
        b->next->link = &b->next;
    all_maps = b;
    pthread_mutex_unlock(&list_mutex);
}

static void delist(sm_blocks *b)
{
    pthread_mutex_lock(&list_mutex);
    if (b->link) {              /* not of a map that could not be made          */
        *b->link = b->next;
        if (b->next)
            b->next->link = b->link;
    }
    pthread_mutex_unlock(&list_mutex);
}

/*
 * The map lives as long as anything refers to it: Python's object, and every claim
 * and pin that is taken.  They die in any order and in any thread, so each holds a
 * reference of its own; a destructor in Python that held one could be interrupted.
 */
static void unref(sm_blocks *b)
{
    if (__atomic_sub_fetch(&b->references, 1, __ATOMIC_ACQ_REL))
        return;
    delist(b);
    sm_bits_free(b->plugged, b->nblocks);
    sm_bits_free(b->busy, b->nblocks);
    sm_bits_free(b->tainted, b->nblocks);
    sm_bits_free(b->pending, b->nblocks);
    sm_bits_free(b->discarded, b->nblocks * b->pages_per_block);
    free(b);
}

static void ref(sm_blocks *b) { __atomic_add_fetch(&b->references, 1, __ATOMIC_RELAXED); }

/* Python's reference goes, and with it its Budget. */
void sm_blocks_free(sm_blocks *b)
{
    if (!b)
        return;
    pthread_mutex_lock(&b->mutex);
    b->budget = NULL;
    pthread_mutex_unlock(&b->mutex);
    unref(b);
}

sm_blocks *sm_blocks_new(uint64_t nblocks, uint64_t block_size, uint64_t page_size)
{
    sm_blocks *b = calloc(1, sizeof *b);

    if (!b)
        return NULL;
    b->references = 1;
    b->nblocks = nblocks;
    b->block_size = block_size;
    b->pages_per_block = block_size / page_size;
    b->plugged = sm_bits_new(nblocks);
    b->busy = sm_bits_new(nblocks);
    b->tainted = sm_bits_new(nblocks);
    b->pending = sm_bits_new(nblocks);
    if (!b->plugged || !b->busy || !b->tainted || !b->pending || init_sync(b)) {
        unref(b);
        return NULL;
    }
    enlist(b);
    return b;
}

static void lock(sm_blocks *b) { pthread_mutex_lock(&b->mutex); }
static void unlock(sm_blocks *b) { pthread_mutex_unlock(&b->mutex); }

void sm_blocks_set_budget(sm_blocks *b, sm_budget *budget)
{
    lock(b);
    b->budget = budget;
    unlock(b);
}

/* ---- reading ------------------------------------------------------------------ */

const uint64_t *sm_blocks_plugged(const sm_blocks *b) { return b->plugged; }

static const uint64_t *map_of(const sm_blocks *b, int which)
{
    return which == SM_MAP_PLUGGED ? b->plugged
         : which == SM_MAP_BUSY    ? b->busy
         : which == SM_MAP_TAINTED ? b->tainted : b->pending;
}

int sm_blocks_state(sm_blocks *b) { return __atomic_load_n(&b->state, __ATOMIC_RELAXED); }

/* With the mutex held; but sm_blocks_state() looks without it. */
static void set_state(sm_blocks *b, int state)
{
    __atomic_store_n(&b->state, state, __ATOMIC_RELAXED);
}

void sm_blocks_counts(sm_blocks *b, sm_counts *out)
{
    lock(b);
    *out = (sm_counts){b->nplugged, b->ntainted, b->nbusy, b->npending, 0, 0};
    for (sm_pin *pin = b->pins; pin; pin = pin->next)
        out->pins++;
    for (sm_claim *claim = b->claims; claim; claim = claim->next)
        out->claims++;
    unlock(b);
}

uint64_t sm_blocks_count(sm_blocks *b, int which, uint64_t first, uint64_t count)
{
    lock(b);
    uint64_t n = sm_bits_count(map_of(b, which), first, count);
    unlock(b);
    return n;
}

size_t sm_blocks_runs(sm_blocks *b, int which, int value, uint64_t from, uint64_t to,
                      sm_run *out, size_t capacity, uint64_t *next)
{
    lock(b);
    size_t n = sm_bits_runs(map_of(b, which), value, from, to, out, capacity, next);
    unlock(b);
    return n;
}

uint64_t sm_blocks_count_runs(sm_blocks *b, int which, int value)
{
    lock(b);
    uint64_t n = bits_count_runs(map_of(b, which), b->nblocks, value);
    unlock(b);
    return n;
}

/* What may be plugged now: neither plugged nor in somebody's hands nor tainted.
 * The empty maps are left out, for they would only be read. */
static bits_any taken(const sm_blocks *b)
{
    bits_any bits = {{b->plugged}, 1};

    if (b->nbusy)
        bits.map[bits.n++] = b->busy;
    if (b->ntainted)
        bits.map[bits.n++] = b->tainted;
    return bits;
}

int sm_blocks_find(sm_blocks *b, uint64_t count, uint64_t align, int fit, uint64_t *where)
{
    lock(b);
    bits_any bits = taken(b);
    int code = bits_any_find(&bits, b->nblocks, count, align, fit, where);
    unlock(b);
    return code;
}

/* ---- the budget --------------------------------------------------------------- */

static int budget_charge(sm_budget *budget, uint64_t bytes)
{
    uint64_t used = __atomic_load_n(&budget->used, __ATOMIC_RELAXED);

    do {
        uint64_t limit = __atomic_load_n(&budget->limit, __ATOMIC_RELAXED);
        if (used > limit || bytes > limit - used)
            return SM_BUDGET;
    } while (!__atomic_compare_exchange_n(&budget->used, &used, used + bytes, 0,
                                          __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    return SM_OK;
}

/* Unsigned arithmetic wraps, so a negative delta is given back. */
static void budget_settle(sm_blocks *b, uint64_t delta)
{
    if (b->budget && delta)
        __atomic_add_fetch(&b->budget->used, delta, __ATOMIC_ACQ_REL);
}

/* The region goes without being closed: what it had counts no more. */
void sm_blocks_abandon(sm_blocks *b)
{
    lock(b);
    if (b->state != SM_CLOSED)
        budget_settle(b, -(b->nplugged * b->block_size));
    b->budget = NULL;
    unlock(b);
}

/* ---- maps and their counters --------------------------------------------------- */

static void fill(uint64_t *map, uint64_t *counter, const sm_run *runs, size_t n, int value)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t set = sm_bits_count(map, runs[i].first, runs[i].count);

        sm_bits_fill(map, runs[i].first, runs[i].count, value);
        *counter += (value ? runs[i].count : 0) - set;
    }
}

/* ---- discarded pages ------------------------------------------------------------ */

/* Pages that were discarded inside plugged blocks, for the audit; byte runs of whole pages.
 * With no runs it only sees to it that there is a map. */
int sm_blocks_mark_pages(sm_blocks *b, const sm_run *bytes, size_t nruns, int discarded)
{
    uint64_t page = b->block_size / b->pages_per_block;
    int code = SM_OK;

    lock(b);
    if (discarded && !b->discarded) {
        b->discarded = sm_bits_new(b->nblocks * b->pages_per_block);
        code = b->discarded ? SM_OK : SM_NOMEM;
    }
    for (size_t i = 0; b->discarded && i < nruns; i++)
        sm_bits_fill(b->discarded, bytes[i].first / page, bytes[i].count / page, discarded);
    unlock(b);
    return code;
}

size_t sm_blocks_discarded_runs(sm_blocks *b, uint64_t from, uint64_t to, sm_run *out,
                                size_t capacity, uint64_t *next)
{
    size_t n = 0;

    lock(b);
    *next = to;
    if (b->discarded)
        n = sm_bits_runs(b->discarded, 1, from, to, out, capacity, next);
    unlock(b);
    return n;
}

/* A block that changes hands starts with no page discarded, or with all of them. */
static void mark_blocks(sm_blocks *b, const sm_run *runs, size_t n, int discarded)
{
    for (size_t i = 0; b->discarded && i < n; i++)
        sm_bits_fill(b->discarded, runs[i].first * b->pages_per_block,
                     runs[i].count * b->pages_per_block, discarded);
}

/* Blocks that start out plugged; before anything else uses the map. */
int sm_blocks_adopt(sm_blocks *b, const sm_run *runs, size_t nruns)
{
    int code = SM_OK;

    lock(b);
    if (b->budget)
        code = budget_charge(b->budget, sm_runs_total(runs, nruns) * b->block_size);
    if (code == SM_OK)
        fill(b->plugged, &b->nplugged, runs, nruns, 1);
    unlock(b);
    return code;
}

/* ---- claims ------------------------------------------------------------------- */

sm_claim *sm_claim_new(const sm_run *runs, size_t nruns)
{
    sm_claim *claim = calloc(1, sizeof *claim + nruns * sizeof *runs);

    if (claim) {
        claim->nruns = nruns;
        if (runs)
            memcpy(claim->runs, runs, nruns * sizeof *runs);
    }
    return claim;
}

static int runs_overlap(const sm_run *a, size_t na, const sm_run *b, size_t nb)
{
    for (size_t i = 0, j = 0; i < na && j < nb;) {
        if (a[i].first + a[i].count <= b[j].first)
            i++;
        else if (b[j].first + b[j].count <= a[i].first)
            j++;
        else
            return 1;
    }
    return 0;
}

/* Whether this thread itself holds what it asks for: it would wait for ever. */
static int held_by_self(const sm_blocks *b, uint64_t owner, const sm_run *runs, size_t nruns,
                        int whole)
{
    for (const sm_claim *held = b->claims; held; held = held->next)
        if (held->owner == owner &&
            (whole || held->whole || runs_overlap(held->runs, held->nruns, runs, nruns)))
            return 1;
    return 0;
}

/* Whether what is asked for is held by somebody who waits, perhaps through others,
 * for what `owner` holds: callbacks of several threads that want each other's
 * blocks would all wait for ever. */
static int waits_in_a_circle(sm_blocks *b, uint64_t owner, const sm_run *runs, size_t nruns)
{
    for (const sm_claim *held = b->claims; held; held = held->next) {
        if (!runs_overlap(held->runs, held->nruns, runs, nruns))
            continue;
        if (held->owner == owner)
            return 1;
        for (struct waiter *w = b->waiters; w; w = w->next)
            if (w->owner == held->owner && !w->seen) {
                w->seen = 1;
                if (waits_in_a_circle(b, owner, w->runs, w->nruns))
                    return 1;
            }
    }
    return 0;
}

static int any_busy(const sm_blocks *b, const sm_run *runs, size_t nruns)
{
    if (b->nbusy == 0)
        return 0;
    for (size_t i = 0; i < nruns; i++) {
        uint64_t end = runs[i].first + runs[i].count;
        if (sm_bits_next(b->busy, runs[i].first, end, 1) != end)
            return 1;
    }
    return 0;
}

static struct timespec deadline_in(unsigned ms)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += ms / 1000;
    at.tv_nsec += (long)(ms % 1000) * 1000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000;
    }
    return at;
}

/* With the mutex held: waits until nobody holds the blocks (or, for whole,
 * any block), at most so long, so that Python gets to see signals. */
static int await_blocks(sm_blocks *b, uint64_t owner, const sm_run *runs, size_t nruns,
                        int whole, unsigned wait_ms)
{
    struct timespec until = deadline_in(wait_ms);
    struct waiter self = {owner, runs, nruns, 0, b->waiters}, **link;
    int code = SM_OK;

    b->waiters = &self;
    b->waiting_for_all += (unsigned)whole;
    for (;;) {
        if (b->state != SM_OK) {
            code = b->state;
            break;
        }
        int held = whole ? b->claims != NULL
                         : b->exclusive || any_busy(b, runs, nruns);
        if (held && held_by_self(b, owner, runs, nruns, whole)) {
            code = SM_SELF;
            break;
        }
        for (struct waiter *w = b->waiters; w; w = w->next)
            w->seen = 0;
        if (held && waits_in_a_circle(b, owner, runs, nruns)) {
            code = SM_SELF;
            break;
        }
        /* A close that waits goes before new work, or busy threads could keep
         * it waiting for ever; but not before work that one who is already in
         * starts from a listener. */
        if (!held && (whole || !b->waiting_for_all || held_by_self(b, owner, NULL, 0, 1)))
            break;
        if (pthread_cond_timedwait(&b->changed, &b->mutex, &until)) {
            code = SM_BUSY;
            break;
        }
    }
    for (link = &b->waiters; *link != &self; link = &(*link)->next)
        ;
    *link = self.next;
    if (whole && --b->waiting_for_all == 0 && code != SM_OK)
        pthread_cond_broadcast(&b->changed);
    return code;
}

static int check_state(const sm_blocks *b, const sm_run *run, int want, int strict,
                       uint64_t *where)
{
    uint64_t end = run->first + run->count;

    /* Who works within whatever is plugged, not strictly, leaves tainted blocks out, too. */
    if (want == SM_TO_PLUGGED || (want == SM_WITHIN_PLUGGED && strict)) {
        *where = sm_bits_next(b->tainted, run->first, end, 1);
        if (*where != end)
            return SM_TAINTED;
    }
    /* Which of them are pending still, or plugged, is asked afterwards. */
    if (want == SM_PENDING_ONLY || want == SM_AS_IT_IS)
        return SM_OK;
    if (want == SM_TAINTED_ONLY) {
        *where = sm_bits_next(b->tainted, run->first, end, 0);
        return *where == end ? SM_OK : SM_STATE;
    }
    if (strict) {
        *where = sm_bits_next(b->plugged, run->first, end, want == SM_TO_PLUGGED);
        if (*where != end)
            return SM_STATE;
    }
    return SM_OK;
}

static int check_pins(const sm_blocks *b, const sm_claim *claim, uint64_t *where)
{
    for (const sm_pin *pin = b->pins; pin; pin = pin->next)
        if (claim->whole ||
            (pin->run.count && runs_overlap(&pin->run, 1, claim->runs, claim->nruns))) {
            *where = pin->run.first;
            return SM_PINNED;
        }
    return SM_OK;
}

static void take(sm_blocks *b, sm_claim *claim, uint64_t owner)
{
    claim->owner = owner;
    claim->charged = 0;
    claim->blocks = b;
    ref(b);
    claim->next = b->claims;
    b->claims = claim;
    if (claim->whole)
        b->exclusive = claim;
    else
        fill(b->busy, &b->nbusy, claim->runs, claim->nruns, 1);
}

/*
 * Claims all of the claim's runs for the change that is wanted, or nothing.
 * Everything that can be known beforehand is checked here, under the mutex and
 * before any block becomes busy: state (strict: no block may be in the target
 * state already), taint, pins.  `where` is the first block that is in the way.
 */
int sm_claim_take(sm_blocks *b, sm_claim *claim, int want, int strict, uint64_t owner,
                  unsigned wait_ms, uint64_t *where)
{
    claim->whole = want == SM_WHOLE;
    lock(b);
    int code = await_blocks(b, owner, claim->runs, claim->nruns, claim->whole, wait_ms);
    for (size_t i = 0; code == SM_OK && !claim->whole && i < claim->nruns; i++)
        code = check_state(b, &claim->runs[i], want, strict, where);
    /* strict means something else for the whole: refuse while views live. */
    if (code == SM_OK && (want == SM_TO_UNPLUGGED || want == SM_TAINTED_ONLY ||
                          (want == SM_WHOLE && strict)))
        code = check_pins(b, claim, where);
    if (code == SM_OK)
        take(b, claim, owner);
    if (code != SM_OK && claim->whole)
        pthread_cond_broadcast(&b->changed);
    unlock(b);
    return code;
}

/* Finds a run that can be plugged and claims it, with nobody in between. */
int sm_claim_take_fit(sm_blocks *b, sm_claim *claim, uint64_t count, uint64_t align, int fit,
                      uint64_t owner, unsigned wait_ms)
{
    lock(b);
    int code = await_blocks(b, owner, NULL, 0, 0, wait_ms);
    if (code == SM_OK) {
        bits_any bits = taken(b);
        claim->runs[0].count = count;
        code = bits_any_find(&bits, b->nblocks, count, align, fit, &claim->runs[0].first);
    }
    if (code == SM_OK)
        take(b, claim, owner);
    unlock(b);
    return code;
}

/* A claim on one run, at once or not at all: see internal.h. */
int blocks_take_at_once(sm_blocks *b, sm_claim *claim, int want, uint64_t owner)
{
    uint64_t where;

    lock(b);
    int taken = claim->runs[0].first < b->nblocks &&
                claim->runs[0].count <= b->nblocks - claim->runs[0].first &&
                b->state == SM_OK && !b->exclusive && !b->waiting_for_all && !b->watched &&
                !b->budget && !any_busy(b, claim->runs, 1) &&
                check_state(b, claim->runs, want, 1, &where) == SM_OK &&
                (want != SM_TO_UNPLUGGED || check_pins(b, claim, &where) == SM_OK);
    if (taken)
        take(b, claim, owner);
    unlock(b);
    return taken;
}

/* Whether there are listeners; only changed while a claim on everything is held. */
void sm_blocks_watch(sm_blocks *b, int watched)
{
    lock(b);
    b->watched = watched;
    unlock(b);
}

/* The parts of a claim's runs whose bit in a map has that value: stable, since
 * nobody else changes claimed blocks.  Returns how many there are, which may be
 * more than fit into out. */
size_t sm_claim_select(sm_claim *claim, int which, int value, sm_run *out, size_t capacity)
{
    sm_blocks *b = claim->blocks;
    size_t n = 0;

    lock(b);
    for (size_t i = 0; i < claim->nruns; i++) {
        uint64_t from = claim->runs[i].first, end = from + claim->runs[i].count;
        sm_run run;

        while (sm_bits_runs(map_of(b, which), value, from, end, &run, 1, &from)) {
            if (n < capacity)
                out[n] = run;
            n++;
        }
    }
    unlock(b);
    return n;
}

/* Whether nobody has anything in these blocks or is about to. */
static int is_idle(const sm_blocks *b, uint64_t from, uint64_t to)
{
    bits_any bits = taken(b);

    return bits_any_next(&bits, from, to, 1) == to;
}

/*
 * Joins victims, runs within the claim, over gaps of at most so many blocks: one
 * discard across what is unplugged anyway is cheaper than two.  Gaps between the
 * claim's own runs are claimed for that, where nobody uses them.  A gap within a run
 * is ours already, but may be plugged: a claim on what is pending covers blocks that
 * were plugged again before it was taken.  It cannot be busy for anybody else, and
 * what is tainted but not plugged holds nothing to lose.  Works in place and returns
 * how many runs are left.
 */
size_t sm_claim_bridge(sm_claim *claim, uint64_t most, sm_run *victims, size_t n)
{
    sm_blocks *b = claim->blocks;
    size_t kept = 0, joined = 0;

    lock(b);
    for (size_t i = 1; i < claim->nruns; i++) {
        uint64_t end = claim->runs[kept].first + claim->runs[kept].count;
        sm_run gap = {end, claim->runs[i].first - end};

        if (gap.count <= most && is_idle(b, end, end + gap.count)) {
            fill(b->busy, &b->nbusy, &gap, 1, 1);
            claim->runs[kept].count += gap.count + claim->runs[i].count;
        } else
            claim->runs[++kept] = claim->runs[i];
    }
    claim->nruns = kept + 1;
    for (size_t i = 1, within = 0; i < n; i++) {
        uint64_t end = victims[joined].first + victims[joined].count;

        while (claim->runs[within].first + claim->runs[within].count < end)
            within++;
        if (victims[i].first - end <= most &&
            victims[i].first < claim->runs[within].first + claim->runs[within].count &&
            sm_bits_next(b->plugged, end, victims[i].first, 1) == victims[i].first)
            victims[joined].count += victims[i].first - end + victims[i].count;
        else
            victims[++joined] = victims[i];
    }
    unlock(b);
    return joined + 1;
}

int sm_claim_charge(sm_claim *claim, uint64_t bytes)
{
    sm_blocks *b = claim->blocks;
    int code = SM_OK;

    lock(b);        /* the budget goes with the region, whose claim may outlive it */
    if (b->budget && (code = budget_charge(b->budget, bytes)) == SM_OK)
        claim->charged += bytes;
    unlock(b);
    return code;
}

static void release(sm_blocks *b, sm_claim *claim)
{
    sm_claim **link = &b->claims;

    while (*link != claim)
        link = &(*link)->next;
    *link = claim->next;
    if (claim->whole)
        b->exclusive = NULL;
    else
        fill(b->busy, &b->nbusy, claim->runs, claim->nruns, 0);
    claim->blocks = NULL;
    pthread_cond_broadcast(&b->changed);
}

/*
 * Ends a claim: sets what came of the operation and frees the blocks, all at
 * once.  With no outcome the state is as before.  Returns the number of blocks
 * that changed between plugged and unplugged.  Ending an ended claim is harmless.
 */
uint64_t sm_claim_finish(sm_claim *claim, const sm_outcome *o, int close_map)
{
    sm_blocks *b = claim->blocks;

    if (!b)
        return 0;
    lock(b);
    uint64_t before = b->nplugged, up = 0;
    if (o) {
        fill(b->plugged, &b->nplugged, o->plugged, o->nplugged, 1);
        up = b->nplugged - before;
        fill(b->plugged, &b->nplugged, o->unplugged, o->nunplugged, 0);
        fill(b->tainted, &b->ntainted, o->tainted, o->ntainted, 1);
        fill(b->tainted, &b->ntainted, o->healed, o->nhealed, 0);
        if (b->npending) {      /* none of these are any more */
            fill(b->pending, &b->npending, o->plugged, o->nplugged, 0);
            fill(b->pending, &b->npending, o->unplugged, o->nunplugged, 0);
            fill(b->pending, &b->npending, o->tainted, o->ntainted, 0);
        }
        fill(b->pending, &b->npending, o->pending, o->npending, 1);
        mark_blocks(b, o->plugged, o->nplugged, 0);
        mark_blocks(b, o->unplugged, o->nunplugged, 0);
        mark_blocks(b, o->empty, o->nempty, 1);
    }
    uint64_t down = before + up - b->nplugged;
    budget_settle(b, (up - down) * b->block_size - claim->charged);
    claim->charged = 0;
    if (close_map) {
        budget_settle(b, -(b->nplugged * b->block_size));
        set_state(b, SM_CLOSED);
    }
    release(b, claim);
    unlock(b);
    unref(b);
    return up + down;
}

/*
 * The holder is gone.  An open claim then means that its operation was cut off
 * twice (an interrupt in the handling of an interrupt): what its blocks hold is
 * unknown, which is what tainted says, and scrub() mends.
 */
void sm_claim_drop(sm_claim *claim)
{
    if (claim && claim->blocks) {
        sm_outcome cut_off = {.tainted = claim->runs, .ntainted = claim->nruns};
        sm_claim_finish(claim, &cut_off, 0);
    }
    free(claim);
}

/* ---- pins --------------------------------------------------------------------- */

/* A view of plugged blocks, or with count 0 of everything, which holds off
 * close but not unplug.  Taking and dropping are single calls on an object that
 * exists before and after, so an interrupt cannot lose a pin. */
sm_pin *sm_pin_new(uint64_t first, uint64_t count)
{
    sm_pin *pin = calloc(1, sizeof *pin);

    if (pin)
        pin->run = (sm_run){first, count};
    return pin;
}

int sm_pin_take(sm_blocks *b, sm_pin *pin, uint64_t owner, unsigned wait_ms, uint64_t *where)
{
    lock(b);
    int code = await_blocks(b, owner, &pin->run, pin->run.count ? 1 : 0, 0, wait_ms);
    if (code == SM_OK && pin->run.count)
        code = check_state(b, &pin->run, SM_WITHIN_PLUGGED, 1, where);
    if (code == SM_OK) {
        pin->blocks = b;
        ref(b);
        pin->next = b->pins;
        pin->link = &b->pins;
        if (pin->next)
            pin->next->link = &pin->next;
        b->pins = pin;
    }
    unlock(b);
    return code;
}

void sm_pin_drop(sm_pin *pin)
{
    sm_blocks *b = pin->blocks;

    if (b) {
        lock(b);
        *pin->link = pin->next;
        if (pin->next)
            pin->next->link = pin->link;
        unlock(b);
        unref(b);
    }
    free(pin);
}

/* ---- fork --------------------------------------------------------------------- */

/* In the child.  Only the forking thread lives on: what the others had in hand is in
 * an unknown state here. */
void sm_blocks_after_fork(sm_blocks *b, int refuse, uint64_t owner)
{
    lock(b);
    b->waiting_for_all = 0;
    b->waiters = NULL;
    for (sm_claim *claim = b->claims, *next; claim; claim = next) {
        next = claim->next;
        if (claim->owner != owner) {
            fill(b->tainted, &b->ntainted, claim->runs, claim->nruns, 1);
            release(b, claim);
            unref(b);   /* never the last one: Python holds one */
        }
    }
    /* The budget is counted by the parent; this copy of it counts nothing. */
    if (refuse) {
        b->budget = NULL;
        if (b->state == SM_OK)
            set_state(b, SM_FORKED);
    }
    unlock(b);
}
