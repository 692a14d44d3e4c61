// Makes the k-th file operation below one folder fail, for tests of what a program does then.
// Loaded before the C library (LD_PRELOAD) into the program under test.
//
// FAULT_FOLDER  operations on files below it are counted
// FAULT_AT      the number of the operation that fails, from one
// FAULT_HOW     once   that operation fails
//               on     that operation and all later ones fail
//               done   that operation happens and says that it failed
//               short  that operation, a write, writes half, and later writes find a full disk
// FAULT_FIRED   a file that is made once the operation is reached

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum fate { SUCCEED, FAIL, FAIL_DONE, HALF };

static long number;

static int is_ours(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_our_fd(int fd) {
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(name, path, sizeof path - 1);
    if (len <= 0) return 0;
    path[len] = 0;
    return is_ours(path);
}

static enum fate next_fate(int is_write) {
    const char *at = getenv("FAULT_AT"), *how = getenv("FAULT_HOW");
    if (!at || !how) return SUCCEED;
    long now = __sync_add_and_fetch(&number, 1), first = atol(at);
    if (now < first) return SUCCEED;
    if (now == first) {
        const char *fired = getenv("FAULT_FIRED");
        if (fired) syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, fired, O_CREAT | O_WRONLY, 0600));
    }
    if (!strcmp(how, "on")) return FAIL;
    if (!strcmp(how, "short")) return !is_write ? SUCCEED : now == first ? HALF : FAIL;
    if (now > first) return SUCCEED;
    return !strcmp(how, "done") ? FAIL_DONE : FAIL;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// An operation that is ours: `call` happens unless the operation fails without having happened.
#define OPERATION(is_ours, call, error)                              \
    do {                                                             \
        enum fate fate = (is_ours) ? next_fate(0) : SUCCEED;         \
        if (fate == SUCCEED) return call;                            \
        if (fate == FAIL_DONE) (void)!call;                          \
        errno = error;                                               \
        return -1;                                                   \
    } while (0)

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    // A descriptor that nobody knows of would keep a lock: an open that fails does not happen.
    if (is_ours(path) && next_fate(0) != SUCCEED) {
        errno = EMFILE;
        return -1;
    }
    return REAL(open64)(path, flags, mode);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    switch (is_our_fd(fd) ? next_fate(1) : SUCCEED) {
        case SUCCEED: return REAL(write)(fd, bytes, count);
        case HALF:
            if (count > 1) return REAL(write)(fd, bytes, count / 2);
            break;
        case FAIL_DONE: (void)!REAL(write)(fd, bytes, count); break;
        case FAIL: break;
    }
    errno = ENOSPC;
    return -1;
}

ssize_t read(int fd, void *bytes, size_t count) {
    OPERATION(is_our_fd(fd), REAL(read)(fd, bytes, count), EIO);
}
int fsync(int fd) { OPERATION(is_our_fd(fd), REAL(fsync)(fd), EIO); }
int fdatasync(int fd) { OPERATION(is_our_fd(fd), REAL(fdatasync)(fd), EIO); }
int flock(int fd, int how) { OPERATION(is_our_fd(fd), REAL(flock)(fd, how), ENOLCK); }
int fchmod(int fd, mode_t mode) { OPERATION(is_our_fd(fd), REAL(fchmod)(fd, mode), EIO); }
int ftruncate64(int fd, off64_t len) { OPERATION(is_our_fd(fd), REAL(ftruncate64)(fd, len), EIO); }
int unlink(const char *path) { OPERATION(is_ours(path), REAL(unlink)(path), EIO); }
int rename(const char *from, const char *to) {
    OPERATION(is_ours(to), REAL(rename)(from, to), EIO);
}
