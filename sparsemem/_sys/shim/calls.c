/*
 * The system calls that are made one at a time: reserving, naming, and asking
 * the kernel what is resident.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "internal.h"

/* Fallbacks for headers that are older than the kernel they meet. */
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#endif
#ifndef PR_SET_VMA_ANON_NAME
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif
/* The same number on every architecture, and in no header before glibc 2.36. */
#define SYS_fsopen_ 430
#define SYS_fsconfig_ 431
#define SYS_fsmount_ 432

/* PAGEMAP_SCAN (Linux 6.7), from the kernel's ABI documentation
 * (Documentation/admin-guide/mm/pagemap.rst). */
struct scan_region { uint64_t start, end, categories; };
struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

static int result(long returned) { return returned < 0 ? -errno : 0; }

/* ---- reserving ------------------------------------------------------------------ */

static void *map_at(void *hint, uint64_t length, int flags, int fd, uint64_t offset)
{
    return mmap(hint, length, PROT_NONE, flags, fd, (off_t)offset);
}

/*
 * Where the kernel has put a mapping that is not aligned: finds a hole that an
 * aligned one fits into and maps there.  MAP_FIXED_NOREPLACE (4.17) never
 * replaces anything, so when another thread took the hole in between we look
 * again; an older kernel takes the address as a hint.  Over-reserving and
 * trimming would not do for a file, whose offset belongs at the start.
 */
static void *map_aligned(uint64_t length, uint64_t align, int flags, int fd, uint64_t offset)
{
    for (int attempt = 0; attempt < 16; attempt++) {
        char *hole = mmap(NULL, length + align, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (hole == MAP_FAILED)
            return MAP_FAILED;
        munmap(hole, length + align);

        char *want = (char *)(((uintptr_t)hole + align - 1) & ~(uintptr_t)(align - 1));
        void *got = map_at(want, length, flags | MAP_FIXED_NOREPLACE, fd, offset);
        if (got == want)
            return got;
        if (got != MAP_FAILED)
            munmap(got, length);
        else if (errno != EEXIST)
            return MAP_FAILED;
    }
    errno = EEXIST;
    return MAP_FAILED;
}

/*
 * Reserves, in an order that matters: first without access, since with
 * mlockall(MCL_FUTURE) in force a privileged mmap() of accessible memory would
 * populate all of it; then munlock, so that what becomes accessible is not
 * locked; then access.  `locked` mappings (memfd_secret) are locked by nature.
 */
int sm_reserve(uint64_t length, uint64_t align, int flags, int fd, uint64_t offset, int writable,
               int locked, uint64_t *address)
{
    char *at = map_at(NULL, length, flags, fd, offset);

    if (at != MAP_FAILED && (uintptr_t)at % align) {
        munmap(at, length);
        at = map_aligned(length, align, flags, fd, offset);
    }
    if (at == MAP_FAILED)
        return -errno;
    if ((!locked && munlock(at, length)) ||
        mprotect(at, length, writable ? PROT_READ | PROT_WRITE : PROT_READ)) {
        int error = errno;
        munmap(at, length);
        return -error;
    }
    *address = (uint64_t)(uintptr_t)at;
    return 0;
}

/* In a forked child that did not inherit the mapping: something harmless in its
 * place, so that inherited views read zero instead of whatever comes to lie there. */
int sm_reserve_placeholder(uint64_t address, uint64_t length)
{
    void *want = (void *)(uintptr_t)address;
    void *got = mmap(want, length, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

    if (got == MAP_FAILED)
        return -errno;
    if (got == want)
        return 0;
    munmap(got, length);
    return -EEXIST;
}

int sm_unmap(uint64_t address, uint64_t length)
{
    return result(munmap((void *)(uintptr_t)address, length));
}

int sm_madvise(uint64_t address, uint64_t length, int advice)
{
    return result(madvise((void *)(uintptr_t)address, length, advice));
}

/* For containers that bar the call below: the same through a file, which says EIO. */
static ssize_t copy_by_file(int writing, uint64_t address, char *local, uint64_t length)
{
    int fd = open("/proc/self/mem", (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : writing ? pwrite(fd, local, length, (off_t)address)
                                      : pread(fd, local, length, (off_t)address);
    int error = errno == EIO ? EFAULT : errno;

    if (fd >= 0)
        close(fd);
    errno = error;
    return n;
}

/*
 * Memory that somebody else may truncate under us, or whose pages there may be no room
 * for: the kernel copies it, and says EFAULT where a load or a store would be SIGBUS.
 * process_vm_readv(2) on oneself needs no privilege, but seccomp may bar it.
 */
static int copy_all(int writing, uint64_t address, char *local, uint64_t length)
{
    while (length) {
        struct iovec here = {local, length}, there = {(void *)(uintptr_t)address, length};
        ssize_t n = writing ? process_vm_writev(getpid(), &here, 1, &there, 1, 0)
                            : process_vm_readv(getpid(), &here, 1, &there, 1, 0);

        if (n < 0 && (errno == EPERM || errno == ENOSYS))
            n = copy_by_file(writing, address, local, length);
        if (n <= 0)
            return n ? -errno : -EFAULT;
        local += n;
        address += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

int sm_read_memory(uint64_t address, void *out, uint64_t length)
{
    return copy_all(0, address, out, length);
}

int sm_write_memory(uint64_t address, const void *data, uint64_t length)
{
    return copy_all(1, address, (char *)(uintptr_t)data, length);
}

int sm_protect(uint64_t address, uint64_t length, int access)
{
    return result(mprotect((void *)(uintptr_t)address, length, access));
}

int sm_fallocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    return result(fallocate(fd, mode, (off_t)offset, (off_t)length));
}

int sm_memfd_create(const char *name, unsigned flags)
{
    int fd = memfd_create(name, flags);
    return fd < 0 ? -errno : fd;
}

int sm_memfd_secret(unsigned flags)
{
    long fd = syscall(SYS_memfd_secret, flags);
    return fd < 0 ? -errno : (int)fd;
}

/*
 * A tmpfs that is mounted nowhere (fsopen, 5.2; CAP_SYS_ADMIN): files can be made
 * in it through the descriptor alone, and it goes with the last of them.
 */
int sm_detached_tmpfs(const char *size, const char *huge)
{
    enum { SET_STRING = 1, CREATE = 6, CLOEXEC = 1 };   /* linux/mount.h */
    long fs = syscall(SYS_fsopen_, "tmpfs", CLOEXEC), mount = -1;

    if (fs >= 0 && !syscall(SYS_fsconfig_, fs, SET_STRING, "size", size, 0) &&
        !syscall(SYS_fsconfig_, fs, SET_STRING, "huge", huge, 0) &&
        !syscall(SYS_fsconfig_, fs, CREATE, NULL, NULL, 0))
        mount = syscall(SYS_fsmount_, fs, CLOEXEC, 0);
    int error = errno;
    if (fs >= 0)
        close((int)fs);
    return mount < 0 ? -error : (int)mount;
}

/* A user namespace of one's own makes anybody root of a mount namespace. */
int sm_enter_namespaces(void)
{
    return result(unshare(CLONE_NEWUSER | CLONE_NEWNS));
}

int sm_name_mapping(uint64_t address, uint64_t length, const char *name)
{
    return result(prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, (unsigned long)address,
                        (unsigned long)length, name));
}

/* MPOL_BIND: pages come from this node or not at all, whichever CPU asks for them. */
int sm_bind(uint64_t address, uint64_t length, unsigned node)
{
    enum { BIND = 2, BITS = 8 * sizeof(unsigned long), NODES = 1024 };  /* mempolicy.h */
    unsigned long nodes[NODES / BITS] = {0};

    if (node >= NODES)
        return -EINVAL;
    nodes[node / BITS] = 1ul << node % BITS;
    /* The kernel reads one bit less than it is told (mbind(2)). */
    return result(syscall(SYS_mbind, address, length, BIND, nodes, NODES + 1ul, 0u));
}

int64_t sm_filesystem_type(int fd, uint64_t *block_size)
{
    struct statfs about;

    if (fstatfs(fd, &about))
        return -errno;
    *block_size = (uint64_t)about.f_bsize;
    return (int64_t)(uint32_t)about.f_type;
}

/* ---- what is resident: every function fills runs of bytes [first, first+count) --- */

/* Adds one range, joined to the one before where they touch.  0: no room left. */
static int add(sm_run *out, size_t capacity, size_t *n, uint64_t start, uint64_t end)
{
    if (*n && out[*n - 1].first + out[*n - 1].count == start) {
        out[*n - 1].count += end - start;
        return 1;
    }
    if (*n == capacity)
        return 0;
    out[(*n)++] = (sm_run){start, end - start};
    return 1;
}

int sm_pagemap_scan(int fd, const sm_scan *what, uint64_t start, uint64_t end,
                    sm_run *out, size_t capacity, size_t *nout, uint64_t *next)
{
    struct scan_region found[512];
    size_t room = sizeof found / sizeof *found;
    uint64_t required = what->all_of | what->none_of;
    struct scan_arg arg = {
        .size = sizeof arg, .flags = what->flags, .start = start, .end = end,
        .vec = (uint64_t)(uintptr_t)found, .vec_len = capacity < room ? capacity : room,
        .category_inverted = what->none_of, .category_mask = required,
        /* Nothing is returned of a page but that it matched, so neighbours that
         * differ in other categories come back as one region. */
        .category_anyof_mask = what->any_of, .return_mask = 0,
    };

    /* A return mask of 0 would return nothing: ask for one that all match. */
    arg.return_mask = what->all_of ? what->all_of : what->any_of;
    long n = ioctl(fd, SCAN_IOCTL, &arg);
    if (n < 0)
        return -errno;
    *nout = 0;
    for (long i = 0; i < n; i++)
        add(out, capacity, nout, found[i].start, found[i].end);
    *next = arg.walk_end;
    return 0;
}

/*
 * Before PAGEMAP_SCAN: /proc/self/pagemap, 8 bytes a page.  Bit 63 is present,
 * bit 62 swapped, bit 61 file or shared anonymous.  It cannot tell the zero page
 * from a page of one's own.
 */
int sm_pagemap_read(int fd, int file_too, uint64_t start, uint64_t end,
                    sm_run *out, size_t capacity, size_t *nout, uint64_t *next)
{
    uint64_t entries[4096], page = (uint64_t)sysconf(_SC_PAGESIZE);
    size_t rounds = 256;

    *nout = 0;
    while (start < end && rounds--) {
        uint64_t pages = (end - start) / page;
        if (pages > sizeof entries / sizeof *entries)
            pages = sizeof entries / sizeof *entries;
        ssize_t got = pread(fd, entries, pages * sizeof *entries,
                            (off_t)(start / page * sizeof *entries));
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
        for (uint64_t i = 0; i < (uint64_t)got / sizeof *entries; i++, start += page)
            if (entries[i] >> 62 && (file_too || !(entries[i] >> 61 & 1)) &&
                !add(out, capacity, nout, start, start + page))
                goto full;
    }
full:
    *next = start;
    return 0;
}

/* mincore sees the page cache of a shared mapping, mapped here or not. */
int sm_mincore(uint64_t start, uint64_t end, sm_run *out, size_t capacity, size_t *nout,
               uint64_t *next)
{
    unsigned char resident[32768];
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    size_t rounds = 32;

    *nout = 0;
    while (start < end && rounds--) {
        uint64_t pages = (end - start) / page;
        if (pages > sizeof resident)
            pages = sizeof resident;
        if (mincore((void *)(uintptr_t)start, pages * page, resident))
            return -errno;
        for (uint64_t i = 0; i < pages; i++, start += page)
            if ((resident[i] & 1) && !add(out, capacity, nout, start, start + page))
                goto full;
    }
full:
    *next = start;
    return 0;
}

/* The allocated extents of a file, unwritten and delayed ones included, which
 * SEEK_DATA leaves out. */
int sm_fiemap(int fd, uint64_t start, uint64_t end, sm_run *out, size_t capacity,
              size_t *nout, uint64_t *next)
{
    enum { ROOM = 128 };
    union {
        struct fiemap map;
        char space[sizeof(struct fiemap) + ROOM * sizeof(struct fiemap_extent)];
    } ask;

    memset(&ask, 0, sizeof ask);
    ask.map.fm_start = start;
    ask.map.fm_length = end - start;
    ask.map.fm_extent_count = capacity < ROOM ? (uint32_t)capacity : ROOM;
    if (ioctl(fd, FS_IOC_FIEMAP, &ask.map))
        return -errno;
    *nout = 0;
    *next = end;
    for (uint32_t i = 0; i < ask.map.fm_mapped_extents; i++) {
        const struct fiemap_extent *extent = &ask.map.fm_extents[i];
        uint64_t from = extent->fe_logical, to = from + extent->fe_length;

        if (from < start)
            from = start;
        if (to > end)
            to = end;
        if (from < to)
            add(out, capacity, nout, from, to);
        *next = to;
        if (extent->fe_flags & FIEMAP_EXTENT_LAST)
            *next = end;
    }
    if (ask.map.fm_mapped_extents < ask.map.fm_extent_count)
        *next = end;
    return 0;
}
