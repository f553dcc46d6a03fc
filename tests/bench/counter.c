/* A library for LD_PRELOAD that counts allocations and system calls (counter.h). glibc alone: it offers the allocator under a
 * second name, so that counting needs no dlsym while the allocator is still being set up. */
#include "tests/bench/counter.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t count, size_t bytes);
extern void *__libc_realloc(void *memory, size_t bytes);
extern void *__libc_memalign(size_t alignment, size_t bytes);

static struct counter_page unread; /* until, or if never, a page is mapped */
static struct counter_page *page = &unread;

static void count(counter_kind kind, uint64_t by)
{
	atomic_fetch_add_explicit(&page->counts[kind], by, memory_order_relaxed);
}

static ssize_t counted(counter_kind kind, counter_kind bytes_kind, ssize_t result)
{
	count(kind, 1);
	if (result > 0)
		count(bytes_kind, (uint64_t)result);
	return result;
}

EXPORT struct counter_page *counter_own(void)
{
	return page;
}

__attribute__((constructor)) static void counter_open(void)
{
	const char *path = getenv(COUNTER_ENVIRONMENT);
	int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return;
	void *memory = mmap(NULL, sizeof(struct counter_page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory != MAP_FAILED)
		page = memory;
	(void)close(fd);
}

/* ---- Allocations ---- */

EXPORT void *malloc(size_t bytes)
{
	count(COUNTER_ALLOCATIONS, 1);
	return __libc_malloc(bytes);
}

EXPORT void *calloc(size_t items, size_t bytes)
{
	count(COUNTER_ALLOCATIONS, 1);
	return __libc_calloc(items, bytes);
}

EXPORT void *realloc(void *memory, size_t bytes)
{
	count(COUNTER_ALLOCATIONS, 1);
	return __libc_realloc(memory, bytes);
}

EXPORT void *aligned_alloc(size_t alignment, size_t bytes)
{
	count(COUNTER_ALLOCATIONS, 1);
	return __libc_memalign(alignment, bytes);
}

EXPORT int posix_memalign(void **memory_out, size_t alignment, size_t bytes)
{
	count(COUNTER_ALLOCATIONS, 1);
	void *memory = __libc_memalign(alignment, bytes);
	if (memory == NULL)
		return ENOMEM;
	*memory_out = memory;
	return 0;
}

/* ---- System calls ---- */

/* NEXT(read): libc's own, looked up once; two threads may do so at once and find the same. */
#define NEXT(name)                                                                                                               \
	({                                                                                                                           \
		static __typeof__(&name) next_##name;                                                                                    \
		if (next_##name == NULL)                                                                                                 \
			*(void **)&next_##name = dlsym(RTLD_NEXT, #name);                                                                    \
		next_##name;                                                                                                             \
	})

EXPORT ssize_t read(int fd, void *bytes, size_t room)
{
	return counted(COUNTER_READS, COUNTER_READ_BYTES, NEXT(read)(fd, bytes, room));
}

EXPORT ssize_t readv(int fd, const struct iovec *pieces, int pieces_count)
{
	return counted(COUNTER_READS, COUNTER_READ_BYTES, NEXT(readv)(fd, pieces, pieces_count));
}

EXPORT ssize_t recv(int fd, void *bytes, size_t room, int flags)
{
	return counted(COUNTER_READS, COUNTER_READ_BYTES, NEXT(recv)(fd, bytes, room, flags));
}

EXPORT ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	return counted(COUNTER_READS, COUNTER_READ_BYTES, NEXT(recvmsg)(fd, message, flags));
}

EXPORT ssize_t write(int fd, const void *bytes, size_t size)
{
	return counted(COUNTER_WRITES, COUNTER_WRITTEN_BYTES, NEXT(write)(fd, bytes, size));
}

EXPORT ssize_t writev(int fd, const struct iovec *pieces, int pieces_count)
{
	return counted(COUNTER_WRITES, COUNTER_WRITTEN_BYTES, NEXT(writev)(fd, pieces, pieces_count));
}

EXPORT ssize_t send(int fd, const void *bytes, size_t size, int flags)
{
	return counted(COUNTER_WRITES, COUNTER_WRITTEN_BYTES, NEXT(send)(fd, bytes, size, flags));
}

EXPORT ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	return counted(COUNTER_WRITES, COUNTER_WRITTEN_BYTES, NEXT(sendmsg)(fd, message, flags));
}

EXPORT int epoll_wait(int fd, struct epoll_event *events, int room, int timeout_ms)
{
	count(COUNTER_WAITS, 1);
	return NEXT(epoll_wait)(fd, events, room, timeout_ms);
}

EXPORT int epoll_pwait(int fd, struct epoll_event *events, int room, int timeout_ms, const sigset_t *mask)
{
	count(COUNTER_WAITS, 1);
	return NEXT(epoll_pwait)(fd, events, room, timeout_ms, mask);
}

EXPORT int poll(struct pollfd *polled, nfds_t polled_count, int timeout_ms)
{
	count(COUNTER_WAITS, 1);
	return NEXT(poll)(polled, polled_count, timeout_ms);
}

EXPORT void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	count(COUNTER_OTHER, 1);
	return NEXT(mmap)(address, bytes, protection, flags, fd, offset);
}

EXPORT int munmap(void *address, size_t bytes)
{
	count(COUNTER_OTHER, 1);
	return NEXT(munmap)(address, bytes);
}

EXPORT int madvise(void *address, size_t bytes, int advice)
{
	count(COUNTER_OTHER, 1);
	return NEXT(madvise)(address, bytes, advice);
}
