/* What the shim's own files share; shim.h is what Python sees. */
#ifndef SPARSEMEM_INTERNAL_H
#define SPARSEMEM_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "shim.h"

/* Where an operation looks at several maps at once, a bit counts as set if it
 * is set in any of them. */
typedef struct {
    const uint64_t *map[3];
    int n;
} bits_any;

uint64_t bits_any_next(const bits_any *bits, uint64_t from, uint64_t to, int value);
size_t bits_any_runs(const bits_any *bits, uint64_t from, uint64_t to, int value,
                     sm_run *out, size_t capacity, uint64_t *next);
/* How many maximal runs of that value there are in the first nbits. */
uint64_t bits_count_runs(const uint64_t *words, uint64_t nbits, int value);

int bits_any_find(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                  int fit, uint64_t *where);

/* Takes a claim on one run (1), or does nothing (0): where there is no such run, where it
 * would have to wait or be refused, or where an operation is more than a matter of the
 * map and the memory, since somebody listens or counts. */
int blocks_take_at_once(sm_blocks *b, sm_claim *claim, int want, uint64_t owner);

int64_t clock_ns(void);

/* Whether there is one, and it is no parent's (see uffd.c). */
static inline int uffd_is_ours(const sm_uffd *u) { return u && u->ours && *u->ours; }

int step_issue(sm_job *job, unsigned step, uint64_t offset, uint64_t length);

#endif
