#include "server/confine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define OWN_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define OWN_ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#define OWN_ARCHITECTURE 0
#endif

#define X32_CALLS 0x40000000u /* another table of the same calls on x86-64 */
#define WRITING ((uint32_t)(O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_APPEND))
#define PROGRAM_MAX 512u

/* By what they are for. Numbers that a machine doesn't have are left out. */
static const uint32_t refused[] = {
	/* other processes */
	SYS_execve, SYS_execveat, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kill, SYS_tkill, SYS_pidfd_open, SYS_pidfd_getfd, SYS_pidfd_send_signal, SYS_rt_sigqueueinfo,
	SYS_rt_tgsigqueueinfo, SYS_kcmp, SYS_setpgid, SYS_setsid,
#ifdef SYS_fork
	SYS_fork, SYS_vfork,
#endif
	/* the network: what it was given it keeps */
	SYS_socket, SYS_connect, SYS_bind, SYS_listen,
	/* files */
	SYS_unlinkat, SYS_renameat2, SYS_linkat, SYS_symlinkat, SYS_mkdirat, SYS_mknodat, SYS_truncate, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_utimensat, SYS_setxattr, SYS_lsetxattr,
	SYS_fsetxattr, SYS_removexattr, SYS_name_to_handle_at, SYS_open_by_handle_at, SYS_chroot, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_swapon,
#ifdef SYS_renameat
	SYS_renameat,
#endif
#ifdef SYS_open
	SYS_creat, SYS_unlink, SYS_rename, SYS_link, SYS_symlink, SYS_mkdir, SYS_rmdir, SYS_mknod, SYS_chmod, SYS_chown, SYS_lchown, SYS_utime, SYS_utimes, SYS_futimesat,
#endif
	/* ways around */
	SYS_unshare, SYS_setns, SYS_io_uring_setup, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_keyctl, SYS_add_key, SYS_request_key, SYS_seccomp,
};

struct program {
	unsigned short count;
	struct sock_filter code[PROGRAM_MAX];
};

static void add(struct program *program, uint16_t code, uint32_t value, uint8_t if_true, uint8_t if_false)
{
	program->code[program->count++] = (struct sock_filter)BPF_JUMP(code, value, if_true, if_false);
}

static void give_back(struct program *program, uint32_t verdict)
{
	add(program, BPF_RET | BPF_K, verdict, 0, 0);
}

static void load(struct program *program, size_t offset)
{
	add(program, BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

static uint32_t fails_with(int number)
{
	return SECCOMP_RET_ERRNO | (uint32_t)number;
}

/* The low half of an argument: both machines are little-endian, and these arguments are int. */
static size_t argument(unsigned index)
{
	return offsetof(struct seccomp_data, args) + sizeof(uint64_t) * index;
}

static void refuse(struct program *program, uint32_t call, int number)
{
	add(program, BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1);
	give_back(program, fails_with(number));
}

/* Four instructions that a call of another number jumps over: `test` of an argument against `value` decides. */
static void decide(struct program *program, uint32_t call, unsigned index, uint16_t test, uint32_t value, uint32_t if_true, uint32_t if_false)
{
	add(program, BPF_JMP | BPF_JEQ | BPF_K, call, 0, 4);
	load(program, argument(index));
	add(program, (uint16_t)(BPF_JMP | test | BPF_K), value, 0, 1);
	give_back(program, if_true);
	give_back(program, if_false);
}

static void write_program(struct program *program)
{
	load(program, offsetof(struct seccomp_data, arch));
	add(program, BPF_JMP | BPF_JEQ | BPF_K, OWN_ARCHITECTURE, 1, 0);
	give_back(program, SECCOMP_RET_KILL_PROCESS);
	load(program, offsetof(struct seccomp_data, nr));
#if defined(__x86_64__)
	add(program, BPF_JMP | BPF_JGE | BPF_K, X32_CALLS, 0, 1);
	give_back(program, fails_with(ENOSYS));
#endif
	for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
		refuse(program, refused[i], EPERM);
	/* Their flags lie in memory, where nothing can be looked at: libc asks again by the older call. */
	refuse(program, SYS_clone3, ENOSYS);
	refuse(program, SYS_openat2, ENOSYS);
	decide(program, SYS_clone, 0, BPF_JSET, CLONE_THREAD, SECCOMP_RET_ALLOW, fails_with(EPERM));
	decide(program, SYS_tgkill, 0, BPF_JEQ, (uint32_t)getpid(), SECCOMP_RET_ALLOW, fails_with(EPERM));
	decide(program, SYS_prlimit64, 0, BPF_JEQ, 0, SECCOMP_RET_ALLOW, fails_with(EPERM));
	decide(program, SYS_openat, 2, BPF_JSET, WRITING, fails_with(EACCES), SECCOMP_RET_ALLOW);
#ifdef SYS_open
	decide(program, SYS_open, 1, BPF_JSET, WRITING, fails_with(EACCES), SECCOMP_RET_ALLOW);
#endif
	give_back(program, SECCOMP_RET_ALLOW);
}

bool confine_calls(void)
{
	struct program program;
	program.count = 0;
	write_program(&program);
	const struct sock_fprog filter = {.len = program.count, .filter = program.code};
	errno = ENOSYS;
	return OWN_ARCHITECTURE != 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}
