/*
 * Content on its way to a snapshot and back, a chunk at a time, and what tells that it
 * arrived: a digest of each chunk.
 *
 * Every chunk goes through a buffer.  What is written is what was digested, even where
 * somebody stores to the memory meanwhile; and memory is read by the kernel for us, so
 * that a page which cannot be had is an errno and no SIGBUS.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

/* What is all zero in such a piece is not written: the block of most file systems. */
enum { PIECE = 4096 };

static const char zeroes[PIECE];

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- the digest: XXH64, as its specification has it ------------------------------- */

static const uint64_t P1 = 0x9E3779B185EBCA87u, P2 = 0xC2B2AE3D27D4EB4Fu,
                      P3 = 0x165667B19E3779F9u, P4 = 0x85EBCA77C2B2AE63u,
                      P5 = 0x27D4EB2F165667C5u;

static uint64_t rotated(uint64_t x, unsigned by) { return x << by | x >> (64 - by); }

static uint64_t lane64(const unsigned char *at)
{
    uint64_t x;

    memcpy(&x, at, sizeof x);
    return le64toh(x);
}

static uint64_t lane32(const unsigned char *at)
{
    uint32_t x;

    memcpy(&x, at, sizeof x);
    return le32toh(x);
}

static uint64_t stirred(uint64_t lane, uint64_t input)
{
    return rotated(lane + input * P2, 31) * P1;
}

uint64_t sm_digest(uint64_t seed, const void *data, uint64_t length)
{
    const unsigned char *at = data, *end = at + length;
    uint64_t sum = seed + P5;

    if (length >= 32) {
        uint64_t a = seed + P1 + P2, b = seed + P2, c = seed, d = seed - P1;

        for (; end - at >= 32; at += 32) {
            a = stirred(a, lane64(at));
            b = stirred(b, lane64(at + 8));
            c = stirred(c, lane64(at + 16));
            d = stirred(d, lane64(at + 24));
        }
        sum = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
        sum = (sum ^ stirred(0, a)) * P1 + P4;
        sum = (sum ^ stirred(0, b)) * P1 + P4;
        sum = (sum ^ stirred(0, c)) * P1 + P4;
        sum = (sum ^ stirred(0, d)) * P1 + P4;
    }
    sum += length;
    for (; end - at >= 8; at += 8)
        sum = rotated(sum ^ stirred(0, lane64(at)), 27) * P1 + P4;
    for (; end - at >= 4; at += 4)
        sum = rotated(sum ^ lane32(at) * P1, 23) * P2 + P3;
    for (; at < end; at++)
        sum = rotated(sum ^ *at * P5, 11) * P1;
    sum = (sum ^ sum >> 33) * P2;
    sum = (sum ^ sum >> 29) * P3;
    return sum ^ sum >> 32;
}

/* ---- what both directions share ------------------------------------------------------ */

/* Tests make the nth read or write fail; 0 or -errno. */
static int fault_due(sm_fault *fault, unsigned step)
{
    if (!fault || fault->step != step || !fault->repeat || --fault->nth)
        return 0;
    fault->nth = 1;
    fault->repeat--;
    return -fault->error;
}

/* All of a range of a file; what lies beyond its end is -ENODATA.  *done is how far it got. */
static int read_on(int fd, char *out, uint64_t length, uint64_t offset, uint64_t *done)
{
    for (*done = 0; *done < length;) {
        ssize_t got = pread(fd, out + *done, length - *done, (off_t)(offset + *done));

        if (got <= 0 && !(got < 0 && errno == EINTR))
            return got ? -errno : -ENODATA;
        *done += got > 0 ? (uint64_t)got : 0;
    }
    return 0;
}

static int read_fully(int fd, char *out, uint64_t length, uint64_t offset)
{
    uint64_t done;

    return read_on(fd, out, length, offset, &done);
}

static int write_fully(int fd, const char *data, uint64_t length, uint64_t offset)
{
    for (uint64_t done = 0; done < length;) {
        ssize_t put = pwrite(fd, data + done, length - done, (off_t)(offset + done));

        if (put <= 0 && !(put < 0 && errno == EINTR))
            return put ? -errno : -EIO;
        done += put > 0 ? (uint64_t)put : 0;
    }
    return 0;
}

/* Memory of our own; what a touch would raise SIGBUS for is -EFAULT. */
static int read_memory(const char *from, char *out, uint64_t length, uint64_t *done)
{
    for (*done = 0; *done < length;) {
        struct iovec here = {out + *done, length - *done};
        struct iovec there = {(char *)from + *done, length - *done};
        ssize_t got = process_vm_readv(getpid(), &here, 1, &there, 1, 0);

        if (got <= 0)
            return got ? -errno : -EFAULT;
        *done += (uint64_t)got;
    }
    return 0;
}

static int is_zero(const char *data, uint64_t length)
{
    for (uint64_t at = 0; at < length; at += PIECE)
        if (memcmp(data + at, zeroes, least(PIECE, length - at)))
            return 0;
    return 1;
}

/* ---- saving ----------------------------------------------------------------------------- */

/* Fills the buffer with what [start, start + length) reads; -errno if it cannot. */
static int gather(sm_save *job, uint64_t start, uint64_t length)
{
    uint64_t filled = 0, done = 0;
    int error = fault_due(job->fault, SM_SNAPSHOT_READ);

    job->failed_at = start;

    while (job->run < job->nruns &&
           job->runs[job->run].first + job->runs[job->run].count <= start)
        job->run++;
    for (size_t i = job->run; !error && i < job->nruns; i++) {
        uint64_t from = job->runs[i].first, to = from + job->runs[i].count;

        if (from >= start + length)
            break;
        from = from > start ? from - start : 0;
        to = least(to - start, length);
        memset(job->buffer + filled, 0, from - filled);
        error = job->source < 0
                    ? read_memory(job->base + start + from, job->buffer + from, to - from, &done)
                    : read_on(job->source, job->buffer + from, to - from, start + from, &done);
        job->failed_at = start + from + done;       /* if it has */
        filled = to;
    }
    memset(job->buffer + filled, 0, length - filled);
    return error;
}

/* Writes the buffer where it belongs, but for pieces that are all zero. */
static int write_sparsely(sm_save *job, uint64_t start, uint64_t length)
{
    int error = fault_due(job->fault, SM_SNAPSHOT_WRITE);
    uint64_t from = 0;

    while (!error && from < length) {
        uint64_t to = from;

        while (to < length && !is_zero(job->buffer + to, least(PIECE, length - to)))
            to = least(to + PIECE, length);
        if (to > from) {
            error = write_fully(job->target, job->buffer + from, to - from,
                                job->origin + start + from);
            job->written += to - from;
        }
        from = least(to + PIECE, length);
    }
    return error;
}

static void record_zero(sm_save *job, uint64_t index)
{
    sm_record *last = job->nrecords ? &job->records[job->nrecords - 1] : NULL;

    if (last && !last->length && last->index + last->digest == index)
        last->digest++;
    else
        job->records[job->nrecords++] = (sm_record){index, 0, 1};
}

/*
 * Saves chunk after chunk until all are done (SM_OK) or the time is used up (SM_MORE).
 * Without a target it stops at each chunk that is not all zero (`ready` is its length):
 * the caller takes it from the buffer and fills in what it stored in the last record.
 */
int sm_save_advance(sm_save *job, uint64_t budget_ns)
{
    int64_t begun = clock_ns();

    job->ready = 0;
    while (job->at < job->nchunks) {
        uint64_t index = job->chunks[job->at].first + job->done;
        uint64_t start = index * job->chunk, length = least(job->chunk, job->size - start);
        int error = gather(job, start, length);

        job->failed_reading = error != 0;
        if (!error && !is_zero(job->buffer, length)) {
            uint64_t digest = job->target < 0 ? 0 : sm_digest(0, job->buffer, length);

            job->records[job->nrecords++] = (sm_record){index, length, digest};
            if (job->target < 0)
                job->ready = length;
            else
                error = write_sparsely(job, start, length);
        } else if (!error && job->zeroes) {
            record_zero(job, index);
        }
        if (error)
            return error;
        job->bytes += length;
        if (++job->done == job->chunks[job->at].count) {
            job->at++;
            job->done = 0;
        }
        if (job->ready || (uint64_t)(clock_ns() - begun) >= budget_ns)
            return job->at < job->nchunks || job->ready ? SM_MORE : SM_OK;
    }
    return SM_OK;
}

/* ---- loading ---------------------------------------------------------------------------- */

/* Puts data (or zeroes, if there is none) where it belongs, but only into the runs. */
void sm_load_put(sm_load *job, uint64_t start, const char *data, uint64_t length)
{
    while (job->run < job->nruns &&
           job->runs[job->run].first + job->runs[job->run].count <= start)
        job->run++;
    for (size_t i = job->run; i < job->nruns && job->runs[i].first < start + length; i++) {
        uint64_t from = job->runs[i].first, to = from + job->runs[i].count;

        from = from > start ? from : start;
        to = least(to, start + length);
        if (data)
            memcpy(job->base + from, data + (from - start), to - from);
        else
            memset(job->base + from, 0, to - from);
    }
}

/* One piece of what lies between two chunks of a file that has a place for all: it must
 * be zero, and mostly is a hole. */
static int check_gap(sm_load *job, uint64_t end)
{
    off_t data = lseek(job->source, (off_t)job->checked, SEEK_DATA);
    uint64_t length;
    int error;

    if (data < 0 && errno != ENXIO && errno != EINVAL)
        return -errno;
    /* EINVAL: a file system without it. */
    if (data >= 0)
        job->checked = least((uint64_t)data, end);
    else if (errno == ENXIO)
        job->checked = end;
    length = least(job->chunk, end - job->checked);
    error = read_fully(job->source, job->buffer, length, job->checked);
    if (!error && !is_zero(job->buffer, length))
        error = -EBADMSG;
    job->checked += error ? 0 : length;
    return error;
}

static int load_record(sm_load *job, const sm_record *record)
{
    uint64_t start = record->index * job->chunk, at = job->origin + start;
    int error;

    if (!record->length) {
        uint64_t length = least(record->digest * job->chunk, job->size - start);

        if (job->base)
            sm_load_put(job, start, NULL, length);
        return 0;
    }
    error = read_fully(job->source, job->buffer, record->length, at);
    if (!error && sm_digest(0, job->buffer, record->length) != record->digest)
        error = -EBADMSG;
    if (!error && job->base)
        sm_load_put(job, start, job->buffer, record->length);
    job->checked = at + record->length;
    job->bytes += record->length;
    return error;
}

/*
 * Reads chunk after chunk of a file that has a place for all, checks them, and what lies
 * between them, or puts them into memory.  SM_OK, SM_MORE when the time is used up, or
 * -errno: -EBADMSG for what is not as it was saved, -ENODATA where the file ends.
 */
int sm_load_advance(sm_load *job, uint64_t budget_ns)
{
    int64_t begun = clock_ns();

    for (;;) {
        const sm_record *next = job->at < job->nrecords ? &job->records[job->at] : NULL;
        uint64_t place = next && next->length ? job->origin + next->index * job->chunk
                         : next               ? job->checked
                                              : job->end;
        int error = fault_due(job->fault, SM_SNAPSHOT_READ);

        if (!error && !job->base && job->checked < place) {
            error = check_gap(job, place);
        } else if (!error && next) {
            error = load_record(job, next);
            job->at += !error;
        } else if (!error) {
            return SM_OK;
        }
        if (error) {
            job->failed_at = next ? job->origin + next->index * job->chunk : job->checked;
            return error;
        }
        if ((uint64_t)(clock_ns() - begun) >= budget_ns)
            return SM_MORE;
    }
}

/* ---- what a hostile file may say -------------------------------------------------------- */

/* Runs must ascend, must not touch, and lie below the limit.  *next is where the next
 * may begin, for what comes in several arrays. */
int sm_runs_check(const sm_run *runs, size_t n, uint64_t limit, uint64_t *next)
{
    for (size_t i = 0; i < n; i++) {
        if (runs[i].first < *next || runs[i].first >= limit || !runs[i].count ||
            runs[i].count > limit - runs[i].first)
            return SM_RANGE;
        *next = runs[i].first + runs[i].count + 1;
    }
    return SM_OK;
}

/* Likewise for records; `stored` sums up what they say is in the file. */
int sm_records_check(const sm_record *records, size_t n, sm_ledger *ledger)
{
    uint64_t nchunks = (ledger->size - 1) / ledger->chunk + 1;

    for (size_t i = 0; i < n; i++) {
        uint64_t index = records[i].index, length = records[i].length, chunks = 1;

        if (index < ledger->next || index >= nchunks)
            return SM_RANGE;
        if (!length) {
            chunks = records[i].digest;
            if (!ledger->zeroes || !chunks || chunks > nchunks - index)
                return SM_RANGE;
        } else if (ledger->packed ? length > ledger->packed
                                  : length != least(ledger->chunk,
                                                    ledger->size - index * ledger->chunk)) {
            return SM_RANGE;
        }
        ledger->next = index + chunks;
        ledger->stored += length;
    }
    return SM_OK;
}
