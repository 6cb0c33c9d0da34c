/*
 * Everything that Python sees of the shim.
 *
 * This file is read twice: by the C compiler and, as it stands, by cffi's
 * cdef() in ../_build.py.  So it holds plain declarations only and no
 * preprocessor line; types come from whoever includes it.
 *
 * Conventions: functions return 0 or a positive SM_ code, or -errno.  No
 * function calls back into Python, so the GIL is free while any of them runs,
 * and a mutex that they hold is never held while Python code runs.
 */

/* ---- runs: ascending, disjoint (first, count) pairs in units ---------------- */

typedef struct {
    uint64_t first;
    uint64_t count;
} sm_run;

enum {
    SM_OK = 0,
    SM_MORE,        /* the time slice is used up: call again            */
    SM_BUSY,        /* another operation holds the blocks: call again   */
    SM_SELF,        /* this very thread holds them: waiting would hang  */
    SM_STATE,       /* a block is already in the target state           */
    SM_TAINTED,     /* a block is tainted                               */
    SM_PINNED,      /* a view is alive                                  */
    SM_CLOSED,
    SM_FORKED,
    SM_NOFIT,       /* no such run of free blocks                       */
    SM_NOMEM,       /* malloc failed                                    */
    SM_EMPTY,       /* a run with count 0                               */
    SM_RANGE,       /* a run beyond the end                             */
    SM_OVERLAP,     /* two runs overlap                                 */
    SM_BUDGET       /* the budget does not cover it                     */
};

int sm_runs_normalise(sm_run *runs, size_t *nruns, uint64_t limit, sm_run *bad);
uint64_t sm_runs_total(const sm_run *runs, size_t nruns);
int sm_runs_aligned(const sm_run *runs, size_t nruns, uint64_t unit);
size_t sm_runs_within(const sm_run *runs, size_t nruns, sm_run window, uint64_t base,
                      unsigned shift, sm_run *out);
size_t sm_runs_widen(const sm_run *runs, size_t nruns, unsigned shift, sm_run *out);
size_t sm_runs_of_frames(const void *frames, size_t n, uint32_t *scratch, sm_run *out);

/* ---- bits: a bitmap in little-endian bit order ---------------------------- */

enum { SM_FIRST, SM_LAST, SM_BEST };

uint64_t *sm_bits_new(uint64_t nbits);
void sm_bits_free(uint64_t *words, uint64_t nbits);
void sm_bits_fill_shared(uint64_t *words, uint64_t first, uint64_t count, int value);
void sm_bits_fill(uint64_t *words, uint64_t first, uint64_t count, int value);
uint64_t sm_bits_count(const uint64_t *words, uint64_t first, uint64_t count);
uint64_t sm_bits_next(const uint64_t *words, uint64_t from, uint64_t to, int value);
size_t sm_bits_runs(const uint64_t *words, int value, uint64_t from, uint64_t to,
                    sm_run *out, size_t capacity, uint64_t *next);
int sm_bits_find(const uint64_t *words, uint64_t nbits, uint64_t count, uint64_t align,
                 int fit, uint64_t *where);
void sm_bits_fill_runs(uint64_t *words, const sm_run *runs, size_t nruns, int value);
size_t sm_bits_whole(const uint64_t *words, const sm_run *runs, size_t nruns, unsigned shift,
                     sm_run *out);

/* ---- budget: bytes shared by several block maps ---------------------------- */

typedef struct {
    uint64_t limit;
    uint64_t used;
} sm_budget;

/* ---- blocks: plugged, busy, tainted and pending, with claims and pins --------- */

enum { SM_TO_PLUGGED, SM_TO_UNPLUGGED, SM_WITHIN_PLUGGED, SM_TAINTED_ONLY, SM_PENDING_ONLY,
       SM_AS_IT_IS, SM_WHOLE };

typedef struct sm_blocks sm_blocks;

typedef struct sm_claim {
    struct sm_claim *next;
    sm_blocks *blocks;      /* set while the claim is open              */
    uint64_t owner;         /* the thread that took it                  */
    uint64_t charged;       /* bytes already taken from the budget      */
    int whole;              /* holds every block, and keeps all out     */
    size_t nruns;
    sm_run runs[];
} sm_claim;

typedef struct {            /* what an operation has come to            */
    const sm_run *plugged, *unplugged, *tainted, *healed, *pending, *empty;
    size_t nplugged, nunplugged, ntainted, nhealed, npending, nempty;
} sm_outcome;

typedef struct {
    uint64_t plugged, tainted, busy, pending, pins, claims;
} sm_counts;

sm_blocks *sm_blocks_new(uint64_t nblocks, uint64_t block_size, uint64_t page_size);
void sm_blocks_free(sm_blocks *blocks);
void sm_blocks_set_budget(sm_blocks *blocks, sm_budget *budget);
void sm_blocks_abandon(sm_blocks *blocks);
const uint64_t *sm_blocks_plugged(const sm_blocks *blocks);
void sm_blocks_counts(sm_blocks *blocks, sm_counts *out);
uint64_t sm_blocks_count(sm_blocks *blocks, int which, uint64_t first, uint64_t count);
size_t sm_blocks_runs(sm_blocks *blocks, int which, int value, uint64_t from, uint64_t to,
                      sm_run *out, size_t capacity, uint64_t *next);
uint64_t sm_blocks_count_runs(sm_blocks *blocks, int which, int value);
int sm_blocks_find(sm_blocks *blocks, uint64_t count, uint64_t align, int fit, uint64_t *where);
int sm_blocks_mark_pages(sm_blocks *blocks, const sm_run *bytes, size_t nruns, int discarded);
size_t sm_blocks_discarded_runs(sm_blocks *blocks, uint64_t from, uint64_t to, sm_run *out,
                                size_t capacity, uint64_t *next);
int sm_blocks_adopt(sm_blocks *blocks, const sm_run *runs, size_t nruns);
void sm_blocks_after_fork(sm_blocks *blocks, int refuse, uint64_t owner);
int sm_blocks_state(sm_blocks *blocks);

enum { SM_MAP_PLUGGED, SM_MAP_BUSY, SM_MAP_TAINTED, SM_MAP_PENDING };

sm_claim *sm_claim_new(const sm_run *runs, size_t nruns);
void sm_claim_drop(sm_claim *claim);
int sm_claim_take(sm_blocks *blocks, sm_claim *claim, int want, int strict, uint64_t owner,
                  unsigned wait_ms, uint64_t *where);
int sm_claim_take_fit(sm_blocks *blocks, sm_claim *claim, uint64_t count, uint64_t align,
                      int fit, uint64_t owner, unsigned wait_ms);
size_t sm_claim_select(sm_claim *claim, int which, int value, sm_run *out, size_t capacity);
size_t sm_claim_bridge(sm_claim *claim, uint64_t most, sm_run *victims, size_t n);
int sm_claim_charge(sm_claim *claim, uint64_t bytes);
uint64_t sm_claim_finish(sm_claim *claim, const sm_outcome *outcome, int close_map);

typedef struct sm_pin {      /* one view: its blocks, or all with count 0 */
    struct sm_pin *next, **link;
    sm_blocks *blocks;      /* set while pinned                         */
    sm_run run;
} sm_pin;

sm_pin *sm_pin_new(uint64_t first, uint64_t count);
int sm_pin_take(sm_blocks *blocks, sm_pin *pin, uint64_t owner, unsigned wait_ms, uint64_t *where);
void sm_pin_drop(sm_pin *pin);

/* ---- engine: runs in chunks, resumable ------------------------------------- */

enum {                      /* the steps that recipes are made of       */
    SM_STEP_DONTNEED = 1, SM_STEP_REMOVE, SM_STEP_PUNCH, SM_STEP_FALLOCATE,
    SM_STEP_POPULATE_WRITE, SM_STEP_FUTEX, SM_STEP_ZERO,
    SM_STEP_LAST_PAGES, SM_STEP_FIRST_PAGES, SM_STEP_COLLAPSE,
    SM_STEP_UFFD_COPY, SM_STEP_UFFD_ZEROPAGE, SM_STEP_TOUCH, SM_STEP_MOVE,
    SM_STEP_COLD, SM_STEP_PAGEOUT, SM_STEP_ZERO_PAGES, SM_STEP_GUARD, SM_STEP_UNGUARD,
    SM_STEP_FORBID, SM_STEP_ALLOW, SM_STEP_UNPROTECT, SM_STEP_COUNT
};

typedef struct {            /* a fault for tests: the nth call of one step fails */
    unsigned step;
    uint64_t nth;           /* 1 is the first call from now             */
    uint64_t repeat;        /* how many calls fail from there on        */
    uint64_t after;         /* bytes really done before it fails        */
    int error;              /* the errno                                */
} sm_fault;

typedef struct {            /* the threads that work on one operation   */
    int stop;               /* begin no further chunk                   */
    int active;             /* threads inside sm_advance()              */
} sm_crew;

enum {                      /* what a userfaultfd is for                */
    SM_UFFD_FILL,           /* to fill memory, and nothing else         */
    SM_UFFD_TRAP,           /* and to have SIGBUS where there is none   */
    SM_UFFD_CATCH           /* and to be told of it instead             */
};

typedef struct {            /* a userfaultfd, of one process            */
    int purpose;            /* set before it is opened                  */
    int fd;
    char *ours;             /* a byte that is 1, and 0 in a child       */
    char *zeroes;           /* so many bytes of the zero page           */
    uint64_t nzeroes;       /* set before it is opened, or a default    */
} sm_uffd;

int sm_uffd_open(sm_uffd *uffd);
int64_t sm_uffd_register(const sm_uffd *uffd, uint64_t address, uint64_t length);
int sm_uffd_unregister(const sm_uffd *uffd, uint64_t address, uint64_t length);
void sm_uffd_close(sm_uffd *uffd);

typedef struct {            /* an access to what was not there          */
    uint64_t offset;        /* bytes                                    */
    uint32_t thread;        /* as gettid()                              */
    uint32_t write;
} sm_stray;

typedef struct {            /* what a thread watches                    */
    const sm_uffd *uffd;    /* opened to catch                          */
    const uint64_t *plugged;    /* accesses to these blocks are no news */
    uint64_t base;          /* address of offset 0                      */
    uint64_t page;          /* what is filled in at once                */
    unsigned shift;         /* a block is 1 << shift bytes              */
    int zeropage;           /* with UFFDIO_ZEROPAGE, not UFFDIO_COPY    */
} sm_watched;

typedef struct sm_watch sm_watch;

sm_watch *sm_watch_new(const sm_watched *what);
int sm_watch_start(sm_watch *watch);
size_t sm_watch_wait(sm_watch *watch, sm_stray *out, size_t capacity);
void sm_watch_counts(sm_watch *watch, uint64_t *caught, uint64_t *dropped);
void sm_watch_stop(sm_watch *watch);
void sm_watch_free(sm_watch *watch);

typedef struct {            /* populated pages, ready to be moved       */
    char *base;
    uint64_t size;
    uint64_t ready;         /* bytes from base on that are populated    */
    uint64_t unit;          /* the largest page                         */
    int held;               /* somebody takes from it or fills it       */
    uint64_t owner;         /* the thread with a sm_hold, or 0          */
} sm_warm;

typedef struct { sm_warm *warm; } sm_hold;

int sm_hold_take(sm_hold *hold, sm_warm *warm, uint64_t owner);
void sm_hold_release(sm_hold *hold);

typedef struct {            /* a place in a job's runs                  */
    size_t run;
    uint64_t done;          /* bytes of that run that lie before it     */
} sm_cursor;

typedef struct {
    char *base;             /* address of offset 0                      */
    int fd;                 /* or -1; file offset 0 is base             */
    uint64_t page;          /* the mapping's page size                  */
    uint64_t huge;          /* the size of a huge page, for steps on it */
    uint64_t chunk;         /* bytes a system call at most              */
    unsigned shift;         /* a unit of the runs is 1 << shift bytes   */
    int vectored;           /* whether process_madvise works here       */
    const sm_run *runs;
    size_t nruns;
    uint64_t tail;          /* bytes of the last run that count; 0: all */
    sm_cursor start;        /* where the job starts,                    */
    sm_cursor at;           /*   up to where it is done,                */
    sm_cursor begun;        /*   and up to where it was begun           */
    uint64_t bytes;         /* all bytes done                           */
    uint64_t calls;         /* system calls made                        */
    uint64_t reached;       /* bytes that a failed futex step populated */
    uint64_t collapsed;     /* bytes that are huge, as a collapse says  */
    uint64_t failed_at;     /* offset of what a step failed on          */
    int failed;             /* the errno of a step that failed, or 0    */
    int intact;             /* what it failed on is as it was           */
    unsigned nsteps;
    unsigned steps[8];
    sm_crew *crew;          /* NULL if one thread does all              */
    const sm_uffd *uffd;    /* or NULL                                  */
    sm_warm *warm;          /* or NULL                                  */
    uint64_t placed;        /* bytes of this chunk put where nothing was */
    sm_fault *fault;        /* NULL but in tests                        */
} sm_job;

int sm_advance(sm_job *job, uint64_t budget_ns);
void sm_job_split(const sm_job *job, uint64_t align, sm_job *parts, unsigned nparts);
int sm_crew_stop(sm_crew *crew, unsigned wait_ms);
int sm_can_vector(void);

/* ---- the short way: one small plug or unplug in one call ---------------------- */

typedef struct {            /* a reading of the headroom, spent by plugs        */
    int64_t left;           /* bytes                                            */
    int64_t floor;          /* read again when less than that would be left     */
    int64_t expires_ns;     /* or after this moment of CLOCK_MONOTONIC          */
    int off;                /* nobody looks                                     */
} sm_gauge;

typedef struct {
    sm_blocks *blocks;
    const sm_job *plug;     /* prepared, without runs                           */
    const sm_job *unplug;
    sm_gauge *gauge;
    uint64_t plugs, unplugs, plugged_blocks, unplugged_blocks, calls, ns;
} sm_quick;

int sm_quick_plug(sm_quick *quick, int64_t first, int64_t count);
int sm_quick_unplug(sm_quick *quick, int64_t first, int64_t count);
void sm_blocks_watch(sm_blocks *blocks, int watched);

/* ---- a 16-bit number that others use, too: -EFAULT where there is no page for it ----- */

int sm_shared_load16(uint64_t address);
int sm_shared_store16(uint64_t address, uint16_t value);

/* ---- snapshots: content on its way to a file and back ------------------------- */

enum { SM_SNAPSHOT_READ = 1, SM_SNAPSHOT_WRITE };      /* what a sm_fault may hit */

typedef struct {            /* one chunk of a snapshot                          */
    uint64_t index;
    uint64_t length;        /* bytes in the file; 0 for chunks of zeroes        */
    uint64_t digest;        /* of those bytes; how many chunks if length is 0   */
} sm_record;

typedef struct {
    const char *base;       /* address of offset 0                              */
    int source;             /* a descriptor to read from instead, or -1         */
    int target;             /* what to write to, or -1: see sm_save_advance()   */
    uint64_t origin;        /* where in the target offset 0 is                  */
    uint64_t size;          /* bytes of the region                              */
    uint64_t chunk;
    char *buffer;           /* of a chunk                                       */
    const sm_run *chunks;   /* which chunks to look at                          */
    size_t nchunks;
    const sm_run *runs;     /* bytes, outside of which everything reads zero    */
    size_t nruns;
    size_t run;             /* the first one that matters still                 */
    size_t at;              /* where in chunks it is,                           */
    uint64_t done;          /*   and how many of that run are done              */
    int zeroes;             /* whether chunks of zeroes are recorded            */
    uint64_t ready;         /* bytes in the buffer that the caller must take    */
    sm_record *records;     /* as many as there are chunks                      */
    size_t nrecords;
    uint64_t bytes;         /* looked at                                        */
    uint64_t written;
    uint64_t failed_at;     /* offset in the region of what could not be read   */
    int failed_reading;     /* as opposed to writing                            */
    sm_fault *fault;        /* NULL but in tests                                */
} sm_save;

typedef struct {
    int source;
    uint64_t origin;        /* where in the source offset 0 is                  */
    uint64_t size;
    uint64_t chunk;
    char *buffer;           /* of a chunk                                       */
    char *base;             /* where to put it; NULL to check it only           */
    const sm_run *runs;     /* bytes that may be written to                     */
    size_t nruns;
    size_t run;
    const sm_record *records;
    size_t nrecords;
    size_t at;
    uint64_t checked;       /* offset in the source up to which all is checked, */
    uint64_t end;           /*   and up to which it has to be                   */
    uint64_t bytes;         /* of chunks, read                                  */
    uint64_t failed_at;     /* offset in the source                             */
    sm_fault *fault;
} sm_load;

typedef struct {            /* what records must be, and have been so far       */
    uint64_t size, chunk;
    uint64_t packed;        /* the most that a chunk may take; 0: its own size  */
    int zeroes;             /* whether there may be records of zeroes           */
    uint64_t next, stored;
} sm_ledger;

uint64_t sm_digest(uint64_t seed, const void *data, uint64_t length);
int sm_save_advance(sm_save *job, uint64_t budget_ns);
int sm_load_advance(sm_load *job, uint64_t budget_ns);
void sm_load_put(sm_load *job, uint64_t start, const char *data, uint64_t length);
int sm_runs_check(const sm_run *runs, size_t n, uint64_t limit, uint64_t *next);
int sm_records_check(const sm_record *records, size_t n, sm_ledger *ledger);

/* ---- single system calls --------------------------------------------------- */

int sm_reserve(uint64_t length, uint64_t align, int flags, int fd, uint64_t offset, int writable,
               int locked, uint64_t *address);
int sm_reserve_placeholder(uint64_t address, uint64_t length);
int sm_unmap(uint64_t address, uint64_t length);
int sm_madvise(uint64_t address, uint64_t length, int advice);
int sm_read_memory(uint64_t address, void *out, uint64_t length);
int sm_write_memory(uint64_t address, const void *data, uint64_t length);
int sm_protect(uint64_t address, uint64_t length, int access);
int sm_fallocate(int fd, int mode, uint64_t offset, uint64_t length);
int sm_memfd_create(const char *name, unsigned flags);
int sm_memfd_secret(unsigned flags);
int sm_detached_tmpfs(const char *size, const char *huge);
int sm_enter_namespaces(void);
int sm_name_mapping(uint64_t address, uint64_t length, const char *name);
int sm_bind(uint64_t address, uint64_t length, unsigned node);
int64_t sm_filesystem_type(int fd, uint64_t *block_size);

typedef struct {
    uint64_t any_of;        /* categories of which a page has one       */
    uint64_t all_of;        /* categories that it must have             */
    uint64_t none_of;       /* categories that it must not have         */
    uint64_t flags;         /* PM_SCAN_*                                */
} sm_scan;

int sm_pagemap_scan(int fd, const sm_scan *what, uint64_t start, uint64_t end,
                    sm_run *out, size_t capacity, size_t *nout, uint64_t *next);
int sm_pagemap_read(int fd, int file_too, uint64_t start, uint64_t end,
                    sm_run *out, size_t capacity, size_t *nout, uint64_t *next);
int sm_mincore(uint64_t start, uint64_t end, sm_run *out, size_t capacity, size_t *nout,
               uint64_t *next);
int sm_fiemap(int fd, uint64_t start, uint64_t end, sm_run *out, size_t capacity,
              size_t *nout, uint64_t *next);
