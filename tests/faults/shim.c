/* Makes the nth call of one class fail, in a program that it is preloaded into. Counts calls of every class and writes the counts to OPD_FAULT_COUNTS when the program ends.
 *
 * OPD_FAULT="alloc:17": the 17th. Classes: alloc (malloc, calloc, realloc, aligned_alloc, posix_memalign, mmap of no file), read and write (of sockets), log (writes to files), accept, thread (pthread_create), open (dlopen).
 * Once it has failed, nothing fails any more. OPD_FAULT_TRACE: who called it goes to stderr. */
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum class { ALLOC, READ, WRITE, LOG, ACCEPT, THREAD, OPEN, CLASSES };

static const char *const names[CLASSES] = {"alloc", "read", "write", "log", "accept", "thread", "open"};
static _Atomic unsigned long counts[CLASSES];
static enum class armed = CLASSES;
static unsigned long armed_at;
static bool ready;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* dlsym allocates the first time that it is asked on a thread: this memory is never freed. */
static _Alignas(64) char early[1 << 16];
static _Atomic size_t early_used;

static void *early_alloc(size_t bytes)
{
	const size_t at = atomic_fetch_add(&early_used, (bytes + 63) & ~(size_t)63);
	return at + bytes <= sizeof early ? early + at : NULL;
}

static bool is_early(const void *memory)
{
	return (const char *)memory >= early && (const char *)memory < early + sizeof early;
}

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void (*next_free)(void *);
static void *(*next_mmap)(void *, size_t, int, int, int, off_t);
static ssize_t (*next_read)(int, void *, size_t);
static ssize_t (*next_recvmsg)(int, struct msghdr *, int);
static ssize_t (*next_write)(int, const void *, size_t);
static ssize_t (*next_writev)(int, const struct iovec *, int);
static ssize_t (*next_sendmsg)(int, const struct msghdr *, int);
static int (*next_accept4)(int, struct sockaddr *, socklen_t *, int);
static int (*next_accept)(int, struct sockaddr *, socklen_t *);
static int (*next_pthread_create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
static void *(*next_dlopen)(const char *, int);

static void arm(const char *text)
{
	const char *colon = text == NULL ? NULL : strchr(text, ':');
	for (unsigned i = 0; colon != NULL && i < CLASSES; i++)
		if (strlen(names[i]) == (size_t)(colon - text) && strncmp(names[i], text, (size_t)(colon - text)) == 0) {
			armed = (enum class)i;
			armed_at = strtoul(colon + 1, NULL, 10);
		}
}

__attribute__((constructor)) static void start(void)
{
	next_malloc = NEXT(malloc);
	next_calloc = NEXT(calloc);
	next_realloc = NEXT(realloc);
	next_aligned_alloc = NEXT(aligned_alloc);
	next_posix_memalign = NEXT(posix_memalign);
	next_free = NEXT(free);
	next_mmap = NEXT(mmap);
	next_read = NEXT(read);
	next_recvmsg = NEXT(recvmsg);
	next_write = NEXT(write);
	next_writev = NEXT(writev);
	next_sendmsg = NEXT(sendmsg);
	next_accept4 = NEXT(accept4);
	next_accept = NEXT(accept);
	next_pthread_create = NEXT(pthread_create);
	next_dlopen = NEXT(dlopen);
	arm(getenv("OPD_FAULT"));
	ready = true;
}

__attribute__((destructor)) static void finish(void)
{
	const char *path = getenv("OPD_FAULT_COUNTS");
	FILE *file = path == NULL ? NULL : fopen(path, "we");
	for (unsigned i = 0; file != NULL && i < CLASSES; i++)
		(void)fprintf(file, "%s %lu\n", names[i], atomic_load(&counts[i]));
	if (file != NULL)
		(void)fclose(file);
}

static bool fails(enum class class)
{
	const unsigned long count = atomic_fetch_add(&counts[class], 1) + 1;
	if (class != armed || count != armed_at)
		return false;
	if (getenv("OPD_FAULT_TRACE") != NULL) {
		void *frames[32];
		backtrace_symbols_fd(frames, backtrace(frames, 32), STDERR_FILENO);
	}
	return true;
}

static bool is_kind(int fd, mode_t kind)
{
	struct stat status;
	const int before = errno;
	const bool is = fstat(fd, &status) == 0 && (status.st_mode & S_IFMT) == kind;
	errno = before;
	return is;
}

#define FAIL(number, value) (errno = (number), (value))

void *malloc(size_t bytes)
{
	if (!ready)
		return next_malloc == NULL ? early_alloc(bytes) : next_malloc(bytes);
	return fails(ALLOC) ? FAIL(ENOMEM, NULL) : next_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
	if (!ready)
		return next_calloc == NULL ? early_alloc(count * bytes) : next_calloc(count, bytes);
	return fails(ALLOC) ? FAIL(ENOMEM, NULL) : next_calloc(count, bytes);
}

void *realloc(void *memory, size_t bytes)
{
	if (!ready && next_realloc == NULL)
		return early_alloc(bytes);
	if (ready && fails(ALLOC))
		return FAIL(ENOMEM, NULL);
	return is_early(memory) ? memcpy(next_malloc(bytes), memory, bytes < 64 ? bytes : 64) : next_realloc(memory, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
	return ready && fails(ALLOC) ? FAIL(ENOMEM, NULL) : next_aligned_alloc(alignment, bytes);
}

int posix_memalign(void **memory, size_t alignment, size_t bytes)
{
	return ready && fails(ALLOC) ? ENOMEM : next_posix_memalign(memory, alignment, bytes);
}

void free(void *memory)
{
	if (memory != NULL && !is_early(memory))
		next_free(memory);
}

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	if (next_mmap == NULL)
		next_mmap = NEXT(mmap);
	return ready && fd < 0 && fails(ALLOC) ? FAIL(ENOMEM, MAP_FAILED) : next_mmap(address, bytes, protection, flags, fd, offset);
}

ssize_t read(int fd, void *data, size_t bytes)
{
	if (next_read == NULL)
		next_read = NEXT(read);
	return ready && is_kind(fd, S_IFSOCK) && fails(READ) ? FAIL(ECONNRESET, -1) : next_read(fd, data, bytes);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	return fails(READ) ? FAIL(ECONNRESET, -1) : next_recvmsg(fd, message, flags);
}

ssize_t write(int fd, const void *data, size_t bytes)
{
	if (next_write == NULL)
		next_write = NEXT(write);
	if (ready && is_kind(fd, S_IFSOCK) && fails(WRITE))
		return FAIL(EPIPE, -1);
	return ready && is_kind(fd, S_IFREG) && fails(LOG) ? FAIL(ENOSPC, -1) : next_write(fd, data, bytes);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
	return is_kind(fd, S_IFSOCK) && fails(WRITE) ? FAIL(EPIPE, -1) : next_writev(fd, parts, count);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	return fails(WRITE) ? FAIL(EPIPE, -1) : next_sendmsg(fd, message, flags);
}

int accept4(int fd, struct sockaddr *address, socklen_t *bytes, int flags)
{
	return fails(ACCEPT) ? FAIL(EMFILE, -1) : next_accept4(fd, address, bytes, flags);
}

int accept(int fd, struct sockaddr *address, socklen_t *bytes)
{
	return fails(ACCEPT) ? FAIL(EMFILE, -1) : next_accept(fd, address, bytes);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
	return fails(THREAD) ? EAGAIN : next_pthread_create(thread, attributes, run, argument);
}

void *dlopen(const char *path, int flags)
{
	return fails(OPEN) ? NULL : next_dlopen(path, flags);
}
