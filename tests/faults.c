/* Make one file operation of a process fail, or the process die at it. Preloaded; steered by the environment:

   FAULT_ROOTS    colon-separated path prefixes; operations on other files are not counted
   FAULT_OPS      which operations count: letters out of o(pen, also mkdir) r(ead) w(rite) t(runcate) f(sync) l(ink) m(ove)
                  u(nlink, also rmdir)
   FAULT_AT       the n-th of them, counted from 1, has the fault; 0 has none
   FAULT_WHAT     set: only if it is this one, as the log has it after the count
   FAULT_HOW      an errno to fail with, "short" for half a write, "kill" for SIGKILL before it happens
   FAULT_FOREVER  set: all later ones too
   FAULT_LOG      file to which each operation is appended, a line each: its count, the function, the path

   Counts are per process and start anew in a forked child; several processes may have one log. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int n_ops;
static pid_t counted_pid;

static int wanted(const char *path) {
  const char *roots = getenv("FAULT_ROOTS");
  while (roots && *roots) {
    size_t n = strcspn(roots, ":");
    if (n && !strncmp(path, roots, n)) return 1;
    roots += n + (roots[n] == ':');
  }
  return 0;
}

/* 0: go on; -1: fail with errno set; 1: half of it only */
static int fault(char op, const char *function, const char *path) {
  const char *ops = getenv("FAULT_OPS"), *at = getenv("FAULT_AT"), *how = getenv("FAULT_HOW");
  if (!ops || !strchr(ops, op) || !wanted(path)) return 0;
  pthread_mutex_lock(&mutex);
  if (counted_pid != getpid()) counted_pid = getpid(), n_ops = 0;
  int n = ++n_ops;
  pthread_mutex_unlock(&mutex);
  char what[PATH_MAX + 32];
  snprintf(what, sizeof what, "%s %s", function, path);
  const char *log = getenv("FAULT_LOG"), *only = getenv("FAULT_WHAT");
  if (log) {
    char line[sizeof what + 16];
    int size = snprintf(line, sizeof line, "%d %s\n", n, what);
    int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    syscall(SYS_write, fd, line, size);
    syscall(SYS_close, fd);
  }
  int first = at ? atoi(at) : 0;
  if (!first || !(n == first || (n > first && getenv("FAULT_FOREVER")))) return 0;
  if (only && strcmp(only, what)) return 0;
  if (!strcmp(how, "kill")) kill(getpid(), SIGKILL);
  if (!strcmp(how, "short")) return 1;
  errno = atoi(how);
  return -1;
}

/* Of an open file, or of `name` in an open directory. */
static int fault_fd(char op, const char *function, int fd, const char *name) {
  char link[64], path[PATH_MAX + NAME_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  if (n < 0) return 0;
  path[n] = 0;
  if (name) snprintf(path + n, sizeof path - n, "/%s", name);
  return fault(op, function, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define FAULT(op, path) fault(op, __func__, path)
#define FAULT_FD(op, fd) fault_fd(op, __func__, fd, NULL)

ssize_t write(int fd, const void *data, size_t n) {
  int f = FAULT_FD('w', fd);
  return f < 0 ? -1 : REAL(write)(fd, data, f && n > 1 ? n / 2 : n);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
  int f = FAULT_FD('w', fd);
  return f < 0 ? -1 : REAL(pwrite64)(fd, data, f && n > 1 ? n / 2 : n, at);
}
ssize_t read(int fd, void *data, size_t n) { return FAULT_FD('r', fd) < 0 ? -1 : REAL(read)(fd, data, n); }
ssize_t pread64(int fd, void *data, size_t n, off64_t at) {
  return FAULT_FD('r', fd) < 0 ? -1 : REAL(pread64)(fd, data, n, at);
}
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t at) {
  return FAULT_FD('r', fd) < 0 ? -1 : REAL(preadv64)(fd, parts, n, at);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int n, off64_t at, int flags) {
  return FAULT_FD('r', fd) < 0 ? -1 : REAL(preadv64v2)(fd, parts, n, at, flags);
}
int fsync(int fd) { return FAULT_FD('f', fd) < 0 ? -1 : REAL(fsync)(fd); }
int ftruncate64(int fd, off64_t n) { return FAULT_FD('t', fd) < 0 ? -1 : REAL(ftruncate64)(fd, n); }
int truncate64(const char *path, off64_t n) { return FAULT('t', path) < 0 ? -1 : REAL(truncate64)(path, n); }
int rename(const char *from, const char *to) { return FAULT('m', from) < 0 ? -1 : REAL(rename)(from, to); }
int link(const char *from, const char *to) { return FAULT('l', to) < 0 ? -1 : REAL(link)(from, to); }
int unlink(const char *path) { return FAULT('u', path) < 0 ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
  int is_whole = dir == AT_FDCWD || *path == '/';
  int f = is_whole ? FAULT('u', path) : fault_fd('u', __func__, dir, path);
  return f < 0 ? -1 : REAL(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) { return FAULT('u', path) < 0 ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { return FAULT('o', path) < 0 ? -1 : REAL(mkdir)(path, mode); }
int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = va_arg(rest, mode_t);
  va_end(rest);
  return FAULT('o', path) < 0 ? -1 : REAL(open64)(path, flags, mode);
}
