/*
 * What sparsemem is compared with: the same work done by bare system calls from C.
 *
 * Not part of the library.  `sparsemem bench` compiles this file when it runs
 * and loads it with cffi's ABI mode; the declarations are in peers.py.
 *
 * Unless said otherwise a function returns 0, or the errno of the first call
 * that failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { MOST_THREADS = 1024, HUGE_ALIGN = 2 << 20 };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- mappings ------------------------------------------------------------------------ */

/* A mapping aligned to 2 MiB, so that huge pages are possible; NULL and errno if there is none. */
void *peer_map(size_t size, int flags, int fd)
{
	char *room = mmap(NULL, size + HUGE_ALIGN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *start;
	void *map;

	if (room == MAP_FAILED)
		return NULL;
	start = (char *)(((uintptr_t)room + HUGE_ALIGN - 1) & ~(uintptr_t)(HUGE_ALIGN - 1));
	map = mmap(start, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED | MAP_NORESERVE, fd, 0);
	if (map == MAP_FAILED) {
		int failed = errno;

		munmap(room, size + HUGE_ALIGN);
		errno = failed;
		return NULL;
	}
	if (start > room)
		munmap(room, (size_t)(start - room));
	if (room + HUGE_ALIGN > start)
		munmap(start + size, (size_t)(room + HUGE_ALIGN - start));
	return map;
}

int peer_unmap(void *base, size_t size)
{
	return munmap(base, size) ? errno : 0;
}

/* ---- loops of one system call --------------------------------------------------------- */

/* madvise() of `step` bytes at every multiple of `stride`; one call if both are `size`. */
int peer_advise(char *base, size_t size, size_t step, size_t stride, int advice)
{
	for (size_t done = 0; done < size; done += stride)
		if (madvise(base + done, step, advice))
			return errno;
	return 0;
}

/* The same with fallocate(PUNCH_HOLE). */
int peer_punch(int fd, size_t size, size_t step, size_t stride)
{
	for (size_t done = 0; done < size; done += stride)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)done, (off_t)step))
			return errno;
	return 0;
}

/* The same, of so many bytes at each of some offsets: as devices do that ask the kernel page by page. */
int peer_punch_each(int fd, const uint64_t *offsets, size_t n, size_t size)
{
	for (size_t i = 0; i < n; i++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offsets[i], (off_t)size))
			return errno;
	return 0;
}

void peer_fill(char *base, int value, size_t size)
{
	memset(base, value, size);
}

/* ---- QEMU's ways of preallocating: threads, each with its share of the pages -------------- */

struct share {
	char *base;
	size_t size, page;
	int touch;
	int error;
};

static void *work_on_share(void *argument)
{
	struct share *share = argument;

	if (!share->touch) {
		if (madvise(share->base, share->size, MADV_POPULATE_WRITE))
			share->error = errno;
		return NULL;
	}
	/* As QEMU: the page keeps its content unless somebody else stores meanwhile. */
	for (size_t done = 0; done < share->size; done += share->page) {
		volatile char *page = share->base + done;

		*page = *page;
	}
	return NULL;
}

int peer_share(char *base, size_t size, size_t page, int nthreads, int touch)
{
	static struct share shares[MOST_THREADS];
	static pthread_t threads[MOST_THREADS];
	size_t pages = size / page, at = 0;
	int error = 0, made = 0;

	if (nthreads < 1 || nthreads > MOST_THREADS)
		return EINVAL;
	if (nthreads == 1 && !touch)	/* no thread is made for one call */
		return madvise(base, size, MADV_POPULATE_WRITE) ? errno : 0;
	for (; made < nthreads; made++) {
		size_t mine = pages / (size_t)nthreads + ((size_t)made < pages % (size_t)nthreads);

		shares[made] = (struct share){ base + at * page, mine * page, page, touch, 0 };
		at += mine;
		error = pthread_create(&threads[made], NULL, work_on_share, &shares[made]);
		if (error)
			break;
	}
	for (int i = 0; i < made; i++) {
		pthread_join(threads[i], NULL);
		if (!error)
			error = shares[i].error;
	}
	return error;
}

/* ---- one block, again and again ----------------------------------------------------------- */

/* Nanoseconds of each MADV_POPULATE_WRITE and MADV_DONTNEED of one block. */
int peer_latency(char *base, size_t block, size_t rounds, uint64_t *ns)
{
	for (size_t i = 0; i < rounds; i++) {
		uint64_t start = now_ns();

		if (madvise(base, block, MADV_POPULATE_WRITE) || madvise(base, block, MADV_DONTNEED))
			return errno;
		ns[i] = now_ns() - start;
	}
	return 0;
}

/* ---- threads that watch, and threads that are in the way -------------------------------------- */

static atomic_int watching, spinning;
static uint64_t worst_ns;
static pthread_t watcher, spinners[MOST_THREADS];
static int nspinners;

static void *watch(void *unused)
{
	const struct timespec pause = { 0, 100000 };
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	while (atomic_load(&watching)) {
		uint64_t start = now_ns(), took;
		void *map = mmap(NULL, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		took = now_ns() - start;
		if (map != MAP_FAILED)
			munmap(map, page);
		if (took > worst_ns)
			worst_ns = took;
		nanosleep(&pause, NULL);
	}
	return unused;
}

/* A thread that maps a page every 100 us, until peer_watched() tells the longest that it waited. */
int peer_watch(void)
{
	int error;

	worst_ns = 0;
	atomic_store(&watching, 1);
	error = pthread_create(&watcher, NULL, watch, NULL);
	if (error)
		atomic_store(&watching, 0);
	return error;
}

uint64_t peer_watched(void)
{
	if (atomic_exchange(&watching, 0))
		pthread_join(watcher, NULL);
	return worst_ns;
}

static void *spin(void *unused)
{
	while (atomic_load_explicit(&spinning, memory_order_relaxed))
		;
	return unused;
}

/* Keeps so many processors busy until peer_rest(). */
int peer_spin(int nthreads)
{
	int error = nthreads > MOST_THREADS ? EINVAL : 0;

	atomic_store(&spinning, 1);
	for (nspinners = 0; !error && nspinners < nthreads; nspinners += !error)
		error = pthread_create(&spinners[nspinners], NULL, spin, NULL);
	return error;
}

void peer_rest(void)
{
	atomic_store(&spinning, 0);
	while (nspinners)
		pthread_join(spinners[--nspinners], NULL);
}

/* ---- bitmaps, word by word ---------------------------------------------------------------------- */

/* The 64 bits from a multiple of 64 on; those beyond the end are clear. */
static uint64_t word(const uint8_t *bits, uint64_t nbits, uint64_t at)
{
	uint64_t left = nbits - at, found = 0;

	if (left >= 64) {
		memcpy(&found, bits + at / 8, 8);
		return found;
	}
	memcpy(&found, bits + at / 8, (left + 7) / 8);
	return found & (((uint64_t)1 << left) - 1);
}

/* The first of `count` clear bits in a row, or nbits. */
uint64_t peer_find(const uint8_t *bits, uint64_t nbits, uint64_t count)
{
	uint64_t start = 0, before = 0;

	/* An edge is a bit that differs from the one before it. */
	for (uint64_t at = 0; at < nbits; at += 64) {
		uint64_t bits64 = word(bits, nbits, at), edges = bits64 ^ (bits64 << 1 | before);

		before = bits64 >> 63;
		for (; edges; edges &= edges - 1) {
			uint64_t edge = at + (uint64_t)__builtin_ctzll(edges);

			if (!(bits64 >> (edge & 63) & 1))
				start = edge;
			else if (edge - start >= count)
				return start;
		}
	}
	return !before && nbits - start >= count ? start : nbits;
}

/* All runs of set bits as (first, count), at most `room` of them; how many there are. */
uint64_t peer_runs(const uint8_t *bits, uint64_t nbits, uint64_t *runs, uint64_t room)
{
	uint64_t found = 0, start = 0, before = 0;

	for (uint64_t at = 0; at < nbits; at += 64) {
		uint64_t bits64 = word(bits, nbits, at), edges = bits64 ^ (bits64 << 1 | before);

		before = bits64 >> 63;
		for (; edges; edges &= edges - 1) {
			uint64_t edge = at + (uint64_t)__builtin_ctzll(edges);

			if (bits64 >> (edge & 63) & 1) {
				start = edge;
				continue;
			}
			if (found < room) {
				runs[2 * found] = start;
				runs[2 * found + 1] = edge - start;
			}
			found++;
		}
	}
	if (before) {
		if (found < room) {
			runs[2 * found] = start;
			runs[2 * found + 1] = nbits - start;
		}
		found++;
	}
	return found;
}
