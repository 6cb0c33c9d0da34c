/*
 * Bitmaps of 64-bit words, and runs.
 *
 * The words are little-endian on every machine, so that the bytes of a map are
 * in little-endian bit order (block n is bit n % 8 of byte n / 8) and Python
 * can share them.  Nothing here locks or allocates but sm_bits_new().
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

#define WORD_BITS 64u
#define ALL_ONES (~(uint64_t)0)

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Bits [low, high) of one word, 0 <= low < high <= 64. */
static uint64_t mask_of(unsigned low, unsigned high)
{
    uint64_t upto = high == WORD_BITS ? ALL_ONES : ((uint64_t)1 << high) - 1;
    return upto & (ALL_ONES << low);
}

static uint64_t map_bytes(uint64_t nbits)
{
    uint64_t bytes = (nbits + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t);
    return bytes ? bytes : sizeof(uint64_t);
}

/* Anonymous memory costs nothing until a page of it is touched: the map of
 * 64 TiB is made at once and a map nobody writes to stays free. */
uint64_t *sm_bits_new(uint64_t nbits)
{
    void *words = mmap(NULL, map_bytes(nbits), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return words == MAP_FAILED ? NULL : words;
}

void sm_bits_free(uint64_t *words, uint64_t nbits)
{
    if (words)
        munmap(words, map_bytes(nbits));
}

void sm_bits_fill(uint64_t *words, uint64_t first, uint64_t count, int value)
{
    uint64_t end = first + count;

    while (first < end) {
        unsigned low = first % WORD_BITS;
        unsigned high = (unsigned)min_u64(WORD_BITS, low + (end - first));
        uint64_t mask = htole64(mask_of(low, high));

        if (value)
            words[first / WORD_BITS] |= mask;
        else
            words[first / WORD_BITS] &= ~mask;
        first += high - low;
    }
}

/* The same for threads that write to different bits, perhaps of one word. */
void sm_bits_fill_shared(uint64_t *words, uint64_t first, uint64_t count, int value)
{
    uint64_t end = first + count;

    while (first < end) {
        unsigned low = first % WORD_BITS;
        unsigned high = (unsigned)min_u64(WORD_BITS, low + (end - first));
        uint64_t mask = htole64(mask_of(low, high)), *word = &words[first / WORD_BITS];

        if (value)
            __atomic_fetch_or(word, mask, __ATOMIC_RELAXED);
        else
            __atomic_fetch_and(word, ~mask, __ATOMIC_RELAXED);
        first += high - low;
    }
}

uint64_t sm_bits_count(const uint64_t *words, uint64_t first, uint64_t count)
{
    uint64_t end = first + count, total = 0;

    while (first < end) {
        unsigned low = first % WORD_BITS;
        unsigned high = (unsigned)min_u64(WORD_BITS, low + (end - first));

        total += (unsigned)__builtin_popcountll(words[first / WORD_BITS] &
                                                htole64(mask_of(low, high)));
        first += high - low;
    }
    return total;
}

/* What a search is made of is inlined into it, so that the compiler makes one for a single
 * map, which has no inner loop (measured: half the time). */
#define INLINE static inline __attribute__((always_inline))

enum { AHEAD = 256 };

/* One word of the union; for value 0 its complement, so that a search always
 * looks for ones.  A map of many MiB is in no cache, and what the processor fetches by
 * itself ends at each page: so it is asked for more (measured: half the time). */
INLINE uint64_t word_of(const bits_any *bits, uint64_t index, int value)
{
    uint64_t word = bits->map[0][index];

    __builtin_prefetch(bits->map[0] + index + AHEAD);
    for (int i = 1; i < bits->n; i++)
        word |= bits->map[i][index];
    word = le64toh(word);
    return value ? word : ~word;
}

/* The first bit of that value in [from, to), or to. */
INLINE uint64_t next_bit(const bits_any *bits, uint64_t from, uint64_t to, int value)
{
    if (from >= to)
        return to;

    uint64_t index = from / WORD_BITS, last = (to - 1) / WORD_BITS;
    uint64_t word = word_of(bits, index, value) & (ALL_ONES << from % WORD_BITS);

    while (!word) {
        if (index == last)
            return to;
        word = word_of(bits, ++index, value);
    }
    return min_u64(to, index * WORD_BITS + (unsigned)__builtin_ctzll(word));
}

/* One past the last bit of that value in [from, to), or from. */
INLINE uint64_t previous_end(const bits_any *bits, uint64_t from, uint64_t to, int value)
{
    if (from >= to)
        return from;

    uint64_t index = (to - 1) / WORD_BITS, first = from / WORD_BITS;
    uint64_t word = word_of(bits, index, value) & mask_of(0, (unsigned)((to - 1) % WORD_BITS) + 1);

    while (!word) {
        if (index == first)
            return from;
        word = word_of(bits, --index, value);
    }
    uint64_t end = index * WORD_BITS + WORD_BITS - (unsigned)__builtin_clzll(word);
    return end > from ? end : from;
}

uint64_t bits_any_next(const bits_any *bits, uint64_t from, uint64_t to, int value)
{
    return next_bit(bits, from, to, value);
}

uint64_t sm_bits_next(const uint64_t *words, uint64_t from, uint64_t to, int value)
{
    bits_any bits = {{words}, 1};
    return next_bit(&bits, from, to, value);
}

/* Up to capacity maximal runs of that value in [from, to).  *next is where to
 * go on, `to` when there are no more.  Word by word, and in each from edge to edge: where
 * a bit differs from the one before it, a run begins or ends. */
INLINE size_t runs_of(const bits_any *bits, uint64_t from, uint64_t to, int value,
                      sm_run *out, size_t capacity, uint64_t *next)
{
    size_t n = 0;
    uint64_t before = 0;
    int inside = 0;

    for (uint64_t base = from - from % WORD_BITS; base < to; base += WORD_BITS) {
        uint64_t word = word_of(bits, base / WORD_BITS, value);

        if (base < from)
            word &= ALL_ONES << (from - base);
        if (to - base < WORD_BITS)
            word &= mask_of(0, (unsigned)(to - base));
        uint64_t edges = word ^ (word << 1 | before);
        before = word >> (WORD_BITS - 1);
        for (; edges; edges &= edges - 1) {
            uint64_t at = base + (unsigned)__builtin_ctzll(edges);

            if (inside) {
                out[n].count = at - out[n].first;
                n++;
            } else if (n == capacity) {
                *next = at;
                return n;
            } else
                out[n].first = at;
            inside = !inside;
        }
    }
    if (inside) {
        out[n].count = to - out[n].first;
        n++;
    }
    *next = to;
    return n;
}

size_t bits_any_runs(const bits_any *bits, uint64_t from, uint64_t to, int value,
                     sm_run *out, size_t capacity, uint64_t *next)
{
    return runs_of(bits, from, to, value, out, capacity, next);
}

size_t sm_bits_runs(const uint64_t *words, int value, uint64_t from, uint64_t to,
                    sm_run *out, size_t capacity, uint64_t *next)
{
    bits_any bits = {{words}, 1};
    return runs_of(&bits, from, to, value, out, capacity, next);
}

/* Runs begin where a bit has the value and the one before has not. */
uint64_t bits_count_runs(const uint64_t *words, uint64_t nbits, int value)
{
    bits_any bits = {{words}, 1};
    uint64_t before = 0, n = 0;

    for (uint64_t base = 0; base < nbits; base += WORD_BITS) {
        uint64_t word = word_of(&bits, base / WORD_BITS, value);

        if (nbits - base < WORD_BITS)
            word &= mask_of(0, (unsigned)(nbits - base));
        uint64_t begin = word & ~(word << 1 | before);
        before = word >> (WORD_BITS - 1);
        /* Mostly one or none, which needs no counting: that is a call on older processors. */
        if (begin)
            n += begin & (begin - 1) ? (unsigned)__builtin_popcountll(begin) : 1;
    }
    return n;
}

/* Whether an aligned run of `count` fits into the clear bits [from, to). */
INLINE int fits(uint64_t from, uint64_t to, uint64_t count, uint64_t align, uint64_t *where)
{
    uint64_t over = from % align, skip = over ? align - over : 0;

    if (to - from < skip || to - from - skip < count)
        return 0;
    *where = from + skip;
    return 1;
}

/* First fit of a short run, word by word: where set and clear bits take turns, that is
 * less work than to find the ends of each run. */
INLINE int find_short(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                      uint64_t *where)
{
    uint64_t free_from = 0;

    for (uint64_t base = 0; base < nbits; base += WORD_BITS) {
        uint64_t word = word_of(bits, base / WORD_BITS, 1);

        if (nbits - base < WORD_BITS)
            word |= ALL_ONES << (nbits - base);
        if (!word || word == ALL_ONES) {
            uint64_t end = word ? base : base + WORD_BITS;

            if (end >= free_from + count && fits(free_from, end, count, align, where))
                return SM_OK;
            if (word)
                free_from = base + WORD_BITS;
            continue;
        }
        for (;;) {
            uint64_t end = base + (unsigned)__builtin_ctzll(word);

            if (end - free_from >= count && fits(free_from, end, count, align, where))
                return SM_OK;
            uint64_t filled = ~(word | ((1ull << (end - base)) - 1));   /* the clear bits above */
            if (!filled)
                break;
            unsigned next = (unsigned)__builtin_ctzll(filled);
            free_from = base + next;
            word &= ALL_ONES << next;
            if (!word)
                break;
        }
        if (word)
            free_from = base + WORD_BITS;
    }
    return nbits >= free_from && fits(free_from, nbits, count, align, where) ? SM_OK : SM_NOFIT;
}

/* First fit of a run that is longer than a word, so that it always crosses an edge of one:
 * the clear bits before the edge and those after it are all that has to be known. */
INLINE int find_middling(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                         uint64_t *where)
{
    uint64_t before = 0;

    for (uint64_t base = 0; base < nbits; base += WORD_BITS) {
        uint64_t word = word_of(bits, base / WORD_BITS, 1);

        if (nbits - base < WORD_BITS)
            word |= ALL_ONES << (nbits - base);
        uint64_t after = word ? (unsigned)__builtin_ctzll(word) : WORD_BITS;
        if (before + after >= count && fits(base - before, base + after, count, align, where))
            return SM_OK;
        before = word ? (unsigned)__builtin_clzll(word) : before + WORD_BITS;
    }
    return SM_NOFIT;
}

/*
 * First and last fit look at the far end of the window first: if the last bit
 * in it is taken, the window can jump past it at once, and no bit is looked at
 * twice.
 */
INLINE int find_first(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                      uint64_t *where)
{
    uint64_t start = 0;

    for (;;) {
        start = next_bit(bits, start, nbits, 0);
        uint64_t over = start % align;
        if (over) {
            if (nbits - start < align - over)
                return SM_NOFIT;
            start += align - over;
        }
        if (nbits - start < count)
            return SM_NOFIT;
        uint64_t taken = previous_end(bits, start, start + count, 1);
        if (taken == start) {
            *where = start;
            return SM_OK;
        }
        start = taken;
    }
}

INLINE int find_last(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                     uint64_t *where)
{
    uint64_t end = nbits;

    for (;;) {
        end = previous_end(bits, 0, end, 0);
        if (end < count)
            return SM_NOFIT;
        uint64_t start = (end - count) / align * align;
        uint64_t taken = next_bit(bits, start, start + count, 1);
        if (taken == start + count) {
            *where = start;
            return SM_OK;
        }
        end = taken;
    }
}

/* The smallest run that an aligned start fits into; the lowest of equals. */
INLINE int find_best(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                     uint64_t *where)
{
    uint64_t from = 0, best = ALL_ONES;
    sm_run run;

    while (best != count && runs_of(bits, from, nbits, 0, &run, 1, &from)) {
        uint64_t skip = (align - run.first % align) % align;
        if (run.count < best && run.count >= skip && run.count - skip >= count) {
            best = run.count;
            *where = run.first + skip;
        }
    }
    return best == ALL_ONES ? SM_NOFIT : SM_OK;
}

INLINE int find(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align, int fit,
                uint64_t *where)
{
    if (count == 0 || count > nbits || align == 0)
        return SM_NOFIT;
    switch (fit) {
    case SM_FIRST:
        /* Where each is the fastest (measured). */
        return count <= WORD_BITS     ? find_short(bits, nbits, count, align, where)
             : count <= 8 * WORD_BITS ? find_middling(bits, nbits, count, align, where)
                                      : find_first(bits, nbits, count, align, where);
    case SM_LAST:  return find_last(bits, nbits, count, align, where);
    default:       return find_best(bits, nbits, count, align, where);
    }
}

int bits_any_find(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                  int fit, uint64_t *where)
{
    if (bits->n == 1) {
        bits_any one = {{bits->map[0]}, 1};
        return find(&one, nbits, count, align, fit, where);
    }
    return find(bits, nbits, count, align, fit, where);
}

int sm_bits_find(const uint64_t *words, uint64_t nbits, uint64_t count, uint64_t align,
                 int fit, uint64_t *where)
{
    bits_any bits = {{words}, 1};
    return find(&bits, nbits, count, align, fit, where);
}

/* ---- runs ------------------------------------------------------------------- */

static int by_first(const void *a, const void *b)
{
    const sm_run *x = a, *y = b;
    return x->first < y->first ? -1 : x->first > y->first;
}

/*
 * Checks runs in any order and makes them ascending and maximal (neighbours
 * that touch become one), so that everything after this may rely on it.  On an
 * error *bad is the offending run; the array may be left sorted.
 */
int sm_runs_normalise(sm_run *runs, size_t *nruns, uint64_t limit, sm_run *bad)
{
    int sorted = 1;

    for (size_t i = 0; i < *nruns; i++) {
        *bad = runs[i];
        if (runs[i].count == 0)
            return SM_EMPTY;
        if (runs[i].first >= limit || runs[i].count > limit - runs[i].first)
            return SM_RANGE;
        sorted &= i == 0 || runs[i - 1].first < runs[i].first;
    }
    if (!sorted)
        qsort(runs, *nruns, sizeof *runs, by_first);

    size_t kept = 0;
    for (size_t i = 0; i < *nruns; i++) {
        if (kept && runs[kept - 1].first + runs[kept - 1].count > runs[i].first) {
            *bad = runs[i];
            return SM_OVERLAP;
        }
        if (kept && runs[kept - 1].first + runs[kept - 1].count == runs[i].first)
            runs[kept - 1].count += runs[i].count;
        else
            runs[kept++] = runs[i];
    }
    *nruns = kept;
    return SM_OK;
}

uint64_t sm_runs_total(const sm_run *runs, size_t nruns)
{
    uint64_t total = 0;

    for (size_t i = 0; i < nruns; i++)
        total += runs[i].count;
    return total;
}

/* Whether runs begin and end at multiples of a power of two. */
int sm_runs_aligned(const sm_run *runs, size_t nruns, uint64_t unit)
{
    uint64_t edges = 0;

    for (size_t i = 0; i < nruns; i++)
        edges |= runs[i].first | runs[i].count;
    return !(edges & (unit - 1));
}

/*
 * The parts of ascending runs that lie in a window, as offsets from its start: scaled
 * by 1 << shift, and `base` added.  At most as many as there are runs.
 */
size_t sm_runs_within(const sm_run *runs, size_t nruns, sm_run window, uint64_t base,
                      unsigned shift, sm_run *out)
{
    uint64_t end = window.first + window.count;
    size_t n = 0;

    for (size_t i = 0; i < nruns; i++) {
        uint64_t from = runs[i].first, to = from + runs[i].count;

        from = from > window.first ? from : window.first;
        to = min_u64(to, end);
        if (from < to)
            out[n++] = (sm_run){((from - window.first) << shift) + base, (to - from) << shift};
    }
    return n;
}

/* The units of 1 << shift that ascending runs touch, joined; at most as many runs. */
size_t sm_runs_widen(const sm_run *runs, size_t nruns, unsigned shift, sm_run *out)
{
    size_t n = 0;

    for (size_t i = 0; i < nruns; i++) {
        uint64_t first = runs[i].first >> shift;
        uint64_t end = ((runs[i].first + runs[i].count - 1) >> shift) + 1;

        if (n && first <= out[n - 1].first + out[n - 1].count)
            out[n - 1].count = end - out[n - 1].first;
        else
            out[n++] = (sm_run){first, end - first};
    }
    return n;
}

/* Sorts by one byte after the other; a fifth of what qsort() takes for 256 numbers. */
static void sort_frames(uint32_t *frames, uint32_t *other, size_t n)
{
    for (unsigned shift = 0; shift < 32; shift += 8) {
        size_t place[257] = {0};

        for (size_t i = 0; i < n; i++)
            place[(frames[i] >> shift & 0xff) + 1]++;
        for (size_t i = 1; i < 257; i++)
            place[i] += place[i - 1];
        for (size_t i = 0; i < n; i++)
            other[place[frames[i] >> shift & 0xff]++] = frames[i];

        uint32_t *sorted = other;   /* after four rounds they are in the first again */
        other = frames;
        frames = sorted;
    }
}

/*
 * Page frame numbers as a guest sends them: little-endian, 32 bits, in any order and
 * perhaps twice.  Ascending maximal runs; `out` has room for n, `scratch` for twice that.
 */
size_t sm_runs_of_frames(const void *frames, size_t n, uint32_t *scratch, sm_run *out)
{
    int ascending = 1;
    size_t kept = 0;

    memcpy(scratch, frames, n * sizeof *scratch);
    for (size_t i = 0; i < n; i++) {
        scratch[i] = le32toh(scratch[i]);
        ascending &= i == 0 || scratch[i - 1] <= scratch[i];
    }
    if (!ascending)
        sort_frames(scratch, scratch + n, n);
    for (size_t i = 0; i < n; i++) {
        if (kept && scratch[i] <= out[kept - 1].first + out[kept - 1].count)
            out[kept - 1].count = scratch[i] + UINT64_C(1) - out[kept - 1].first;
        else
            out[kept++] = (sm_run){scratch[i], 1};
    }
    return kept;
}

void sm_bits_fill_runs(uint64_t *words, const sm_run *runs, size_t nruns, int value)
{
    for (size_t i = 0; i < nruns; i++)
        sm_bits_fill(words, runs[i].first, runs[i].count, value);
}

/*
 * Of the units of 1 << shift bits that ascending runs of set bits touch, those whose
 * bits are all set, joined.  At most as many runs: within one all units but the first
 * and the last are covered by the run itself.
 */
size_t sm_bits_whole(const uint64_t *words, const sm_run *runs, size_t nruns, unsigned shift,
                     sm_run *out)
{
    uint64_t unit = (uint64_t)1 << shift;
    size_t n = 0;

    for (size_t i = 0; i < nruns; i++) {
        uint64_t first = runs[i].first >> shift;
        uint64_t end = ((runs[i].first + runs[i].count - 1) >> shift) + 1;

        if (sm_bits_next(words, first << shift, (first << shift) + unit, 0) !=
            (first << shift) + unit)
            first++;
        if (end > first &&
            sm_bits_next(words, (end - 1) << shift, end << shift, 0) != end << shift)
            end--;
        if (n && first < out[n - 1].first + out[n - 1].count)
            first = out[n - 1].first + out[n - 1].count;
        if (first >= end)
            continue;
        if (n && first == out[n - 1].first + out[n - 1].count)
            out[n - 1].count = end - out[n - 1].first;
        else
            out[n++] = (sm_run){first, end - first};
    }
    return n;
}
