/*
 * The shim without Python, under ThreadSanitizer, AddressSanitizer and UBSan: pthreads do what Python's threads do.
 *
 *   harness PART SECONDS SEED      exit status 0 if all checks held and no sanitizer complained
 *
 * Blocks that a claim holds are written to without any lock of ours: ThreadSanitizer then sees whether claims keep
 * threads apart, and what the next holder sees of the last one's work.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

enum { BLOCKS = 192, BLOCK = 16384, PAGE = 4096, THREADS = 6, PER_THREAD = 16 };

#define CHECK(condition)                                                                    \
    do                                                                                      \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);         \
            abort();                                                                        \
        }                                                                                   \
    while (0)

static double end;
static uint64_t operations;         /* of all threads */
static sm_blocks *map;
static sm_budget budget = {BLOCKS * (uint64_t)BLOCK * 3 / 4, 0};
static unsigned char held[BLOCKS];  /* written by whoever holds the block, with no lock */
static char *memory;

static double now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static uint64_t chance(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint64_t myself(void) { return (uint64_t)pthread_self(); }

static void count_operation(void) { __atomic_add_fetch(&operations, 1, __ATOMIC_RELAXED); }

static void in_threads(void *(*function)(void *), uint64_t seed)
{
    pthread_t threads[THREADS];
    uint64_t seeds[THREADS];

    for (int i = 0; i < THREADS; i++) {
        seeds[i] = seed * 1000 + (uint64_t)i + 1;
        CHECK(!pthread_create(&threads[i], NULL, function, &seeds[i]));
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

/* ---- the block map: claims, pins, a budget, and those who only look ---------------------- */

static size_t some_runs(uint64_t *state, sm_run *runs)
{
    size_t n = 0;

    for (uint64_t at = chance(state) % 8; at < BLOCKS && n < 4; n++) {
        uint64_t count = 1 + chance(state) % 6;

        if (at + count > BLOCKS)
            count = BLOCKS - at;
        runs[n] = (sm_run){at, count};
        at += count + 1 + chance(state) % 60;
    }
    return n;
}

static void mark(const sm_claim *claim, unsigned char with)
{
    for (size_t i = 0; i < claim->nruns; i++)
        for (uint64_t b = claim->runs[i].first; b < claim->runs[i].first + claim->runs[i].count; b++)
            held[b] = with;
}

static void operate(uint64_t *state)
{
    sm_run runs[4], part[BLOCKS];
    size_t n = some_runs(state, runs);
    static const int wants[] = {SM_TO_PLUGGED, SM_TO_UNPLUGGED, SM_WITHIN_PLUGGED, SM_PENDING_ONLY};
    int want = wants[chance(state) % 4], code;
    sm_claim *claim = sm_claim_new(runs, n);
    uint64_t where;

    CHECK(claim);
    if (chance(state) % 8 == 0) {
        want = SM_TO_PLUGGED;
        claim->nruns = 1;
        code = sm_claim_take_fit(map, claim, 1 + chance(state) % 5, 1, (int)(chance(state) % 3), myself(), 5);
    } else
        code = sm_claim_take(map, claim, want, chance(state) % 2, myself(), 5, &where);
    CHECK(code != SM_SELF && code != SM_FORKED);
    if (code == SM_OK) {
        mark(claim, (unsigned char)myself());
        if (want == SM_TO_PLUGGED) {
            size_t fresh = sm_claim_select(claim, SM_MAP_PLUGGED, 0, part, BLOCKS);
            uint64_t bytes = sm_runs_total(part, fresh) * BLOCK;
            sm_outcome outcome = {.plugged = part, .nplugged = fresh};

            if (sm_claim_charge(claim, bytes) == SM_OK)
                CHECK(sm_claim_finish(claim, &outcome, 0) == sm_runs_total(part, fresh));
            else
                CHECK(sm_claim_finish(claim, NULL, 0) == 0);
        } else if (want == SM_TO_UNPLUGGED) {
            size_t victims = sm_claim_select(claim, SM_MAP_PLUGGED, 1, part, BLOCKS);
            sm_outcome outcome = {.unplugged = part, .nunplugged = victims, .healed = part, .nhealed = victims};

            if (victims && chance(state) % 2) {
                sm_run bridged[BLOCKS];
                sm_claim_bridge(claim, 8, memcpy(bridged, part, sizeof part), victims);
            }
            if (victims && chance(state) % 4 == 0) {
                outcome.pending = part;
                outcome.npending = victims;
            }
            sm_claim_finish(claim, &outcome, 0);
        } else if (want == SM_PENDING_ONLY) {
            size_t late = sm_claim_select(claim, SM_MAP_PENDING, 1, part, BLOCKS);
            sm_outcome outcome = {.unplugged = part, .nunplugged = late};

            sm_claim_finish(claim, &outcome, 0);
        } else {
            sm_run pages = {claim->runs[0].first * BLOCK, 2 * PAGE};
            CHECK(!sm_blocks_mark_pages(map, &pages, 1, (int)(chance(state) % 2)));
            if (chance(state) % 4)
                sm_claim_finish(claim, NULL, 0);    /* else it is dropped open, and taints */
        }
    }
    sm_claim_drop(claim);
}

static void scrub(uint64_t *state)
{
    sm_run run;
    uint64_t next, where;

    if (!sm_blocks_runs(map, SM_MAP_TAINTED, 1, chance(state) % BLOCKS, BLOCKS, &run, 1, &next))
        return;
    sm_claim *claim = sm_claim_new(&run, 1);
    if (sm_claim_take(map, claim, SM_TAINTED_ONLY, 1, myself(), 5, &where) == SM_OK) {
        sm_outcome outcome = {.unplugged = &run, .nunplugged = 1, .healed = &run, .nhealed = 1};
        sm_claim_finish(claim, &outcome, 0);
    }
    sm_claim_drop(claim);
}

static void look(uint64_t *state)
{
    sm_run runs[8];
    sm_counts counts;
    uint64_t next, where, first = chance(state) % BLOCKS;
    sm_pin *pin = sm_pin_new(first, chance(state) % 3 ? 1 : 0);

    if (sm_pin_take(map, pin, myself(), 2, &where) == SM_OK && pin->run.count)
        CHECK(sm_blocks_count(map, SM_MAP_PLUGGED, first, 1) == 1);
    sm_blocks_counts(map, &counts);
    CHECK(counts.plugged <= BLOCKS && counts.tainted <= BLOCKS && counts.busy <= BLOCKS);
    sm_blocks_runs(map, (int)(chance(state) % 4), (int)(chance(state) % 2), 0, BLOCKS, runs, 8, &next);
    sm_blocks_count_runs(map, SM_MAP_PLUGGED, 1);
    sm_blocks_find(map, 3, 1, (int)(chance(state) % 3), &where);
    sm_blocks_discarded_runs(map, 0, BLOCKS * (BLOCK / PAGE), runs, 8, &next);
    CHECK(sm_blocks_state(map) == SM_OK);
    sm_pin_drop(pin);
    CHECK(__atomic_load_n(&budget.used, __ATOMIC_RELAXED) <= budget.limit);
}

static void take_all(void)
{
    sm_claim *claim = sm_claim_new(NULL, 0);
    uint64_t where;

    if (sm_claim_take(map, claim, SM_WHOLE, 0, myself(), 20, &where) == SM_OK) {
        memset(held, 0, sizeof held);
        sm_blocks_watch(map, 1);
        sm_blocks_watch(map, 0);
        sm_claim_finish(claim, NULL, 0);
    }
    sm_claim_drop(claim);
}

static void *on_the_map(void *seed)
{
    uint64_t state = *(uint64_t *)seed * 0x9e3779b97f4a7c15u | 1;

    while (now() < end) {
        switch (chance(&state) % 16) {
        case 0: scrub(&state); break;
        case 1: take_all(); break;
        case 2: case 3: case 4: look(&state); break;
        default: operate(&state);
        }
        count_operation();
    }
    return NULL;
}

/* Maps come and go in several threads: the list of all of them, for fork(). */
static void *maps_come_and_go(void *seed)
{
    uint64_t state = *(uint64_t *)seed * 0x9e3779b97f4a7c15u | 1;

    while (now() < end) {
        sm_blocks *own = sm_blocks_new(1 + chance(&state) % 5000, BLOCK, PAGE);
        sm_run run = {0, 1};
        uint64_t where;
        sm_claim *claim = sm_claim_new(&run, 1);

        CHECK(own);
        CHECK(sm_claim_take(own, claim, SM_TO_PLUGGED, 1, myself(), 0, &where) == SM_OK);
        if (chance(&state) % 2)
            sm_blocks_free(own);    /* the claim keeps it */
        else {
            sm_claim_finish(claim, NULL, 0);
            sm_blocks_abandon(own);
            sm_blocks_free(own);
        }
        sm_claim_drop(claim);
        count_operation();
    }
    return NULL;
}

/* Works until the map is closed, and is told so in every way. */
static void *until_closed(void *seed)
{
    uint64_t state = *(uint64_t *)seed * 0x9e3779b97f4a7c15u | 1, where;

    while (sm_blocks_state(map) == SM_OK) {
        sm_run run = {chance(&state) % BLOCKS, 1};
        sm_claim *claim = sm_claim_new(&run, 1);
        int code = sm_claim_take(map, claim, SM_TO_PLUGGED, 0, myself(), 5, &where);

        CHECK(code == SM_OK || code == SM_CLOSED || code == SM_BUSY);
        if (code == SM_OK) {
            sm_outcome outcome = {.plugged = &run, .nplugged = 1};

            held[run.first]++;
            if (sm_claim_charge(claim, BLOCK) == SM_OK)
                sm_claim_finish(claim, &outcome, 0);
            else
                sm_claim_finish(claim, NULL, 0);
        }
        sm_claim_drop(claim);
        count_operation();
    }
    return NULL;
}

static void *close_it(void *unused)
{
    uint64_t where;
    int code;

    (void)unused;
    usleep(2000);
    sm_claim *claim = sm_claim_new(NULL, 0);
    do
        code = sm_claim_take(map, claim, SM_WHOLE, 1, myself(), 50, &where);
    while (code == SM_BUSY);
    CHECK(code == SM_OK);
    sm_claim_finish(claim, NULL, 1);
    sm_claim_drop(claim);
    return NULL;
}

static void part_close(uint64_t seed)
{
    while (now() < end) {
        pthread_t closer;

        map = sm_blocks_new(BLOCKS, BLOCK, PAGE);
        sm_blocks_set_budget(map, &budget);
        CHECK(!pthread_create(&closer, NULL, close_it, NULL));
        in_threads(until_closed, seed++);
        pthread_join(closer, NULL);
        CHECK(sm_blocks_state(map) == SM_CLOSED && budget.used == 0);
        sm_blocks_free(map);
    }
}

static void part_map(uint64_t seed)
{
    sm_counts counts;

    map = sm_blocks_new(BLOCKS, BLOCK, PAGE);
    sm_blocks_set_budget(map, &budget);
    in_threads(on_the_map, seed);
    sm_blocks_counts(map, &counts);
    CHECK(!counts.busy && !counts.claims && !counts.pins);
    CHECK(counts.plugged == sm_blocks_count(map, SM_MAP_PLUGGED, 0, BLOCKS));
    CHECK(counts.tainted == sm_blocks_count(map, SM_MAP_TAINTED, 0, BLOCKS));
    CHECK(budget.used == counts.plugged * BLOCK);
    sm_blocks_abandon(map);
    CHECK(budget.used == 0);
    sm_blocks_free(map);
    end = now() + 0.5;
    in_threads(maps_come_and_go, seed);
}

/* ---- the short way, on memory ----------------------------------------------------------- */

static sm_job job_of(unsigned step, unsigned then)
{
    return (sm_job){.base = memory, .fd = -1, .page = PAGE, .huge = 2 << 20, .chunk = 2 << 20, .shift = 14,
                    .nsteps = then ? 2 : 1, .steps = {step, then}};
}

static sm_quick quick;

static void *on_memory(void *seed)
{
    uint64_t state = *(uint64_t *)seed * 0x9e3779b97f4a7c15u | 1;
    int64_t mine = (int64_t)((*(uint64_t *)seed - 1) % 1000 % THREADS) * PER_THREAD;
    unsigned char content[PER_THREAD] = {0};

    while (now() < end) {
        int i = (int)(chance(&state) % PER_THREAD);
        char *block = memory + (mine + i) * BLOCK;

        if (!content[i]) {
            if (sm_quick_plug(&quick, mine + i, 1) == 1) {
                for (int at = 0; at < BLOCK; at += PAGE)
                    CHECK(block[at] == 0);
                content[i] = (unsigned char)(1 + chance(&state) % 255);
                memset(block, content[i], BLOCK);
            }
        } else {
            CHECK((unsigned char)block[0] == content[i] && (unsigned char)block[BLOCK - 1] == content[i]);
            if (sm_quick_unplug(&quick, mine + i, 1) == 1)
                content[i] = 0;
        }
        /* The common rest: somebody else may have it, and then nothing happens. */
        int64_t common = THREADS * PER_THREAD + (int64_t)(chance(&state) % (BLOCKS - THREADS * PER_THREAD - 4));
        int code = chance(&state) % 2 ? sm_quick_plug(&quick, common, 1 + (int64_t)(chance(&state) % 4))
                                      : sm_quick_unplug(&quick, common, 1 + (int64_t)(chance(&state) % 4));
        CHECK(code >= 0);
        CHECK(sm_quick_plug(&quick, -1, 1) == 0 && sm_quick_unplug(&quick, BLOCKS, 1) == 0);
        count_operation();
    }
    for (int i = 0; i < PER_THREAD; i++)
        CHECK(!content[i] || sm_quick_unplug(&quick, mine + i, 1) == 1);
    return NULL;
}

static void part_quick(uint64_t seed)
{
    sm_job plug, unplug = job_of(SM_STEP_DONTNEED, 0);
    sm_gauge gauge = {.off = 1};
    sm_counts counts;

    memory = mmap(NULL, BLOCKS * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    plug = job_of(SM_STEP_DONTNEED, SM_STEP_POPULATE_WRITE);
    unplug.base = memory;
    map = sm_blocks_new(BLOCKS, BLOCK, PAGE);
    quick = (sm_quick){.blocks = map, .plug = &plug, .unplug = &unplug, .gauge = &gauge};
    in_threads(on_memory, seed);
    sm_blocks_counts(map, &counts);
    CHECK(!counts.busy && !counts.claims && !counts.tainted);
    CHECK(quick.plugged_blocks - quick.unplugged_blocks == counts.plugged);
    sm_blocks_free(map);
    munmap(memory, BLOCKS * BLOCK);
}

/* ---- a crew on one job, stopped in the middle ---------------------------------------------- */

static void *advance_part(void *part)
{
    while (sm_advance(part, 1000000) == SM_MORE && !__atomic_load_n(&((sm_job *)part)->crew->stop, __ATOMIC_SEQ_CST))
        ;
    return NULL;
}

static void part_crew(uint64_t seed)
{
    enum { SIZE = 64 << 20, PARTS = 4 };
    uint64_t state = seed * 0x9e3779b97f4a7c15u | 1;

    memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    while (now() < end) {
        sm_crew crew = {0, 0};
        sm_run runs[64];
        sm_job job = job_of(SM_STEP_DONTNEED, SM_STEP_POPULATE_WRITE), parts[PARTS];
        pthread_t threads[PARTS];
        uint64_t done = 0;
        size_t n = 0;
        sm_fault fault = {SM_STEP_POPULATE_WRITE, 1 + chance(&state) % 40, 1, 4096, ENOMEM};
        int faulty = chance(&state) % 2;

        for (uint64_t at = 0; n < 64 && at < SIZE / BLOCK - 60; at += runs[n - 1].count + chance(&state) % 30) {
            runs[n] = (sm_run){at, 1 + chance(&state) % 40};
            n++;
        }
        job.runs = runs;
        job.nruns = n;
        job.vectored = sm_can_vector();
        job.crew = &crew;
        sm_job_split(&job, 2 << 20, parts, PARTS);
        parts[1].fault = faulty ? &fault : NULL;
        for (int i = 0; i < PARTS; i++)
            CHECK(!pthread_create(&threads[i], NULL, advance_part, &parts[i]));
        if (chance(&state) % 2)
            usleep((useconds_t)(chance(&state) % 4000));
        else
            for (int i = 0; i < PARTS; i++)
                pthread_join(threads[i], NULL), threads[i] = 0;
        while (sm_crew_stop(&crew, 20))
            ;
        for (int i = 0; i < PARTS; i++) {
            /* Nobody works on it any more, so all of this may be read. */
            CHECK(parts[i].at.run <= parts[i].begun.run && parts[i].begun.run <= parts[i].nruns);
            CHECK(!parts[i].failed || (faulty && i == 1));
            done += parts[i].bytes;
        }
        CHECK(done <= sm_runs_total(runs, n) * BLOCK);
        for (int i = 0; i < PARTS; i++)
            if (threads[i])
                pthread_join(threads[i], NULL);
        madvise(memory, SIZE, MADV_DONTNEED);
        count_operation();
    }
    munmap(memory, SIZE);
}

/* ---- the warm pool, between who takes from it and who fills it ------------------------------- */

static sm_warm warm;

static void *hold_in_turn(void *seed)
{
    uint64_t state = *(uint64_t *)seed * 0x9e3779b97f4a7c15u | 1;

    while (now() < end) {
        sm_hold hold = {NULL};

        if (sm_hold_take(&hold, &warm, myself())) {
            warm.ready = warm.ready / 2 + chance(&state) % 64;
            held[warm.ready % BLOCKS]++;
        }
        sm_hold_release(&hold);
        sm_hold_release(&hold);     /* a second time is harmless */
        count_operation();
    }
    return NULL;
}

static void part_warm(uint64_t seed) { in_threads(hold_in_turn, seed); }

/* ---- fork beside busy threads -------------------------------------------------------------- */

static void *fork_often(void *unused)
{
    (void)unused;
    while (now() < end) {
        pid_t child = fork();

        CHECK(child >= 0);
        if (child == 0) {
            sm_counts counts;

            /* No more than that: the allocator of AddressSanitizer may be locked in a child. */
            sm_blocks_after_fork(map, 0, myself());
            sm_blocks_counts(map, &counts);
            if (counts.busy || counts.claims || sm_blocks_state(map) != SM_OK)
                _exit(1);
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        count_operation();
    }
    return NULL;
}

static void part_fork(uint64_t seed)
{
    pthread_t forker;

    map = sm_blocks_new(BLOCKS, BLOCK, PAGE);
    CHECK(!pthread_create(&forker, NULL, fork_often, NULL));
    in_threads(on_the_map, seed);
    pthread_join(forker, NULL);
    sm_blocks_free(map);
}

/* ---- bits and runs against the obvious way --------------------------------------------------- */

static void part_bits(uint64_t seed)
{
    enum { BITS = 700 };
    uint64_t state = seed * 0x9e3779b97f4a7c15u | 1;

    while (now() < end) {
        uint64_t nbits = 1 + chance(&state) % BITS, *words = sm_bits_new(nbits), where, next;
        unsigned char plain[BITS] = {0};
        sm_run runs[16];

        for (int i = 0; i < 20; i++) {
            uint64_t first = chance(&state) % nbits, count = chance(&state) % (nbits - first + 1);
            int value = (int)(chance(&state) % 2);
            uint64_t set = 0;

            sm_bits_fill(words, first, count, value);
            memset(plain + first, value, count);
            for (uint64_t b = first; b < nbits; b++)
                set += plain[b];
            CHECK(sm_bits_count(words, first, nbits - first) == set);
            for (where = first; where < nbits && plain[where] != value; where++)
                ;
            CHECK(sm_bits_next(words, first, nbits, value) == where);
            size_t n = sm_bits_runs(words, value, 0, nbits, runs, 16, &next);
            for (size_t r = 0; r < n; r++)
                for (uint64_t b = runs[r].first; b < runs[r].first + runs[r].count; b++)
                    CHECK(plain[b] == value);
            for (int fit = SM_FIRST; fit <= SM_BEST; fit++)
                if (sm_bits_find(words, nbits, 1 + count % 9, 1 + first % 5, fit, &where) == SM_OK)
                    for (uint64_t b = where; b < where + 1 + count % 9; b++)
                        CHECK(!plain[b]);
        }
        sm_bits_free(words, nbits);
        sm_run any[12], bad;
        size_t nany = 1 + chance(&state) % 12;
        for (size_t i = 0; i < nany; i++)
            any[i] = (sm_run){chance(&state) % 3 ? chance(&state) % 90 : chance(&state), chance(&state) % 9};
        if (sm_runs_normalise(any, &nany, 100, &bad) == SM_OK)
            for (size_t i = 1; i < nany; i++)
                CHECK(any[i - 1].first + any[i - 1].count < any[i].first);
        count_operation();
    }
}

/* ---- single calls, with room for few answers -------------------------------------------------- */

static void part_calls(uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u | 1, address, next, size = 64 << 20;

    while (now() < end) {
        uint64_t align = 1u << (12 + chance(&state) % 10);
        size_t n = 0;
        sm_run out[3];

        CHECK(!sm_reserve(size, align, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, 1, 0, &address));
        CHECK(address % align == 0);
        for (int i = 0; i < 20; i++)
            ((char *)address)[chance(&state) % size] = 1;
        for (uint64_t at = address; at < address + size; at = next) {
            CHECK(!sm_mincore(at, address + size, out, 3, &n, &next));
            CHECK(n <= 3 && next > at);
        }
        CHECK(sm_madvise(address, size, MADV_DONTNEED) == 0);
        CHECK(sm_madvise(address + 1, size, MADV_DONTNEED) == -EINVAL);
        CHECK(!sm_unmap(address, size));
        int fd = sm_memfd_create("harness", 0);
        CHECK(fd >= 0 && sm_fallocate(fd, 0, 0, 1 << 20) == 0);
        sm_filesystem_type(fd, &next);
        close(fd);
        sm_can_vector();
        sm_uffd uffd;
        if (sm_uffd_open(&uffd) == 0)
            sm_uffd_close(&uffd);
        count_operation();
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(uint64_t);
    } parts[] = {{"map", part_map},   {"quick", part_quick}, {"crew", part_crew},  {"warm", part_warm},
                 {"fork", part_fork}, {"bits", part_bits},   {"calls", part_calls}, {"close", part_close}};

    if (argc != 4) {
        fprintf(stderr, "usage: harness PART SECONDS SEED\n");
        return 2;
    }
    end = now() + atof(argv[2]);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strcmp(parts[i].name, argv[1])) {
            parts[i].run(strtoull(argv[3], NULL, 0));
            printf("%llu operations\n", (unsigned long long)operations);
            return operations == 0;
        }
    fprintf(stderr, "no part %s\n", argv[1]);
    return 2;
}
