/*
 * userfaultfd, to fill and move pages without a fault.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum { ZEROES = 2 << 20 };

/* Faults of user code only, which needs no privilege (5.11); older kernels do not know the flag. */
static int open_one(void)
{
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

    if (fd < 0 && errno == EINVAL)
        fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    return fd < 0 ? -errno : (int)fd;
}

/* Features that are asked for and missing are an error, so what there is comes first. */
static int negotiate(uint64_t wanted)
{
    struct uffdio_api api = {.api = UFFD_API};
    int fd = open_one(), error;

    if (fd < 0)
        return fd;
    error = ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
    close(fd);
    if (error || (fd = open_one()) < 0)
        return error ? error : fd;
    api = (struct uffdio_api){.api = UFFD_API, .features = api.features & wanted};
    if (!ioctl(fd, UFFDIO_API, &api))
        return fd;
    error = -errno;
    close(fd);
    return error;
}

int sm_uffd_open(sm_uffd *u)
{
    /* WP_ASYNC: the kernel itself takes the protection off a page that is written to, and
     * remembers that it did (6.7); without it nothing may ever be protected here. */
    int fd = negotiate(UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
                       UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_MOVE);
    char *zeroes;

    if (fd < 0)
        return fd;
    /* Read faults map the zero page everywhere: 2 MiB to copy from that stay in the cache. */
    zeroes = mmap(NULL, ZEROES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zeroes == MAP_FAILED) {
        int error = -errno;
        close(fd);
        return error;
    }
    madvise(zeroes, ZEROES, MADV_NOHUGEPAGE);
    madvise(zeroes, ZEROES, MADV_POPULATE_READ);    /* or the first copy does it */
    *u = (sm_uffd){fd, getpid(), zeroes, ZEROES};
    return 0;
}

/*
 * Lets us fill a range: what may be done with it, as a mask of the UFFDIO_ numbers, or
 * -errno.  Registered for write protection, of which no use is made: the other modes
 * would trap accesses (and whoever takes a trap for us would have to run).
 */
int64_t sm_uffd_register(const sm_uffd *u, uint64_t address, uint64_t length)
{
    struct uffdio_register range = {.range = {address, length},
                                    .mode = UFFDIO_REGISTER_MODE_WP};

    return ioctl(u->fd, UFFDIO_REGISTER, &range) ? -errno : (int64_t)range.ioctls;
}

/* The pool is held in one call each, by an object that lets go when it dies: an interrupt
 * in between cannot leave it held. */
int sm_hold_take(sm_hold *hold, sm_warm *warm, uint64_t owner)
{
    if (__atomic_exchange_n(&warm->held, 1, __ATOMIC_ACQUIRE))
        return 0;
    warm->owner = owner;
    hold->warm = warm;
    return 1;
}

void sm_hold_release(sm_hold *hold)
{
    if (hold->warm) {
        hold->warm->owner = 0;
        __atomic_store_n(&hold->warm->held, 0, __ATOMIC_RELEASE);
    }
    hold->warm = NULL;
}

/* Whatever is still registered is so no more. */
void sm_uffd_close(sm_uffd *u)
{
    if (u->zeroes) {
        close(u->fd);
        munmap(u->zeroes, u->nzeroes);
        u->zeroes = NULL;
        u->pid = 0;
    }
}
