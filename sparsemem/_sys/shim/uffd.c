/*
 * userfaultfd, to fill and move pages without a fault, and to trap accesses to what is
 * not there.
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
#ifndef UFFD_FEATURE_EXACT_ADDRESS
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#endif
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14)
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

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

enum { ZEROES = 2 << 20 };

/*
 * Faults of user code only, which needs no privilege (5.11); older kernels do not know
 * the flag.  What the kernel does for us, such as a read() into trapped memory or
 * MADV_POPULATE_WRITE, is EFAULT then and waits for nobody (measured on 6.18, as root
 * and as nobody).
 */
static int open_one(void)
{
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

    if (fd < 0 && errno == EINVAL)
        fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    return fd < 0 ? -errno : (int)fd;
}

/* Features that are asked for and missing are an error, so what there is comes first. */
static int negotiate(uint64_t wanted, uint64_t *features)
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
    *features = api.features;
    if (!ioctl(fd, UFFDIO_API, &api))
        return fd;
    error = -errno;
    close(fd);
    return error;
}

/*
 * A child has the descriptor, too, and would fill its parent's memory with it.  So there
 * is a byte that the kernel wipes in every child (4.14): to read it costs nothing, where
 * getpid() is a system call a page (measured: 0.1 us of 4).
 */
static int make_room(sm_uffd *u)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    long page = sysconf(_SC_PAGESIZE);

    /* Read faults map the zero page everywhere: 2 MiB to copy from that stay in the cache. */
    u->zeroes = mmap(NULL, u->nzeroes, PROT_READ, flags, -1, 0);
    u->ours = mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (u->zeroes == MAP_FAILED || u->ours == MAP_FAILED ||
        madvise(u->ours, (size_t)page, MADV_WIPEONFORK))
        return -errno;
    *u->ours = 1;
    madvise(u->zeroes, u->nzeroes, MADV_NOHUGEPAGE);
    madvise(u->zeroes, ZEROES, MADV_POPULATE_READ);     /* or the first copy does it */
    return 0;
}

int sm_uffd_open(sm_uffd *u)
{
    uint64_t features = 0, wanted = UFFD_FEATURE_MOVE, needed = 0;

    if (u->purpose == SM_UFFD_FILL)
        /* WP_ASYNC: the kernel itself takes the protection off a page that is written to, and
         * remembers that it did (6.7); without it nothing may ever be protected here. */
        wanted |= UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
                  UFFD_FEATURE_WP_ASYNC;
    else
        needed = u->purpose == SM_UFFD_TRAP ? UFFD_FEATURE_SIGBUS
                                            : UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_POISON;
    wanted |= needed;
    if (u->purpose == SM_UFFD_CATCH)
        wanted |= UFFD_FEATURE_EXACT_ADDRESS;   /* 5.18; else it is the page's */
    int fd = negotiate(wanted, &features);

    if (fd < 0)
        return fd;
    if ((features & needed) != needed ||
        /* Only such a one can be polled. */
        (u->purpose == SM_UFFD_CATCH && fcntl(fd, F_SETFL, O_NONBLOCK))) {
        close(fd);
        return -EOPNOTSUPP;
    }
    *u = (sm_uffd){u->purpose, fd, MAP_FAILED, MAP_FAILED, u->nzeroes > ZEROES ? u->nzeroes : ZEROES};
    int error = make_room(u);
    if (error)
        sm_uffd_close(u);
    return error;
}

/*
 * Lets us fill a range: what may be done with it, as a mask of the UFFDIO_ numbers, or
 * -errno.  To fill alone it is registered for write protection, of which no use is made:
 * the other modes would trap accesses.  To trap them, for what is missing.
 */
int64_t sm_uffd_register(const sm_uffd *u, uint64_t address, uint64_t length)
{
    struct uffdio_register range = {.range = {address, length},
                                    .mode = u->purpose == SM_UFFD_FILL
                                                ? UFFDIO_REGISTER_MODE_WP
                                                : UFFDIO_REGISTER_MODE_MISSING};

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

/* Lets a range go, and whoever waits in it. */
int sm_uffd_unregister(const sm_uffd *u, uint64_t address, uint64_t length)
{
    struct uffdio_range range = {address, length};

    return uffd_is_ours(u) && ioctl(u->fd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

/* Whatever is still registered is so no more, once no child has a copy of the descriptor. */
void sm_uffd_close(sm_uffd *u)
{
    if (!u->ours)
        return;
    close(u->fd);
    if (u->zeroes != MAP_FAILED)
        munmap(u->zeroes, u->nzeroes);
    if (u->ours != MAP_FAILED)
        munmap(u->ours, (size_t)sysconf(_SC_PAGESIZE));
    u->zeroes = u->ours = NULL;
}
