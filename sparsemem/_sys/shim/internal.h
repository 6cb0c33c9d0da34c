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
int bits_any_find(const bits_any *bits, uint64_t nbits, uint64_t count, uint64_t align,
                  int fit, uint64_t *where);

#endif
