/* One worker process: starting it, its shared memory, its messages, its end.
 *
 * Layer: server, private to isolated*.c. Threads: whoever has the process.
 * Life: process_start → process_reserve, process_tell, process_wait… → process_end.
 * Nothing but process_wait, and process_end that asks, waits for the worker, each with a limit. It reads all that it is sent before it answers, and is sent a dozen packets a call: one whose queue is full doesn't
 * read. It is then killed, as one that the system can't bring a packet: what it would run isn't what it was told to. */
#ifndef OPD_SERVER_ISOLATED_PROCESS_H
#define OPD_SERVER_ISOLATED_PROCESS_H

#include <sys/types.h>

#include "server/isolated_call.h"
#include "server/isolated_constant.h"
#include "server/log.h"
#include "server/tensors.h"

struct process {
	struct process *next; /* of idle ones */
	pid_t pid;
	int socket;
	int helpers;             /* over which lane threads wake threads of the worker; reading there gives up after HELP_LOOK_US; -1: none yet */
	const char *fault;       /* it can't be used any more, and was killed for this ("doesn't read what it is sent"); NULL: nothing */
	uint64_t unwanted_ns;    /* since when nobody has wanted what it runs; 0: it is wanted */
	struct account *account; /* referenced: pays for the memory */
	struct log *log;
	struct log_limit *lines; /* of what its module says */
	const char *provider;    /* for log lines; borrowed */
	unsigned char *memory;   /* NULL: none yet */
	uint64_t memory_bytes;
	struct constant *slots[PACKED_SLOTS]; /* what it has mapped, referenced */
	uint64_t dropped; /* of them, as far as it was looked: constants.dropped */
	struct isolated_message message; /* the last one that came */
};

/* Runs `program --worker PID PATH`; confined: one that ends where this kernel doesn't confine it. log, lines and provider are borrowed. */
OPD_MUST_USE opd_status process_start(const char *program, const char *path, bool confined, struct account *account, struct log *log, struct log_limit *lines,
                                      const char *provider, struct process **process_out, opd_error *error);
/* At least so much memory; what was there is forgotten. RESOURCE_EXHAUSTED. */
OPD_MUST_USE opd_status process_reserve(struct process *process, uint64_t bytes, opd_error *error);
/* It has the constant mapped from here on, in the slot that is returned. */
uint32_t process_keep(struct process *process, struct constant *constant);
#define HELP_LOOK_US 100000

/* The worker's loops can be helped from here on, if the system has a socket pair for it. */
void process_offer_help(struct process *process);
/* Lets go of those that were dropped. */
void process_forget(struct process *process, const struct constants *constants);
/* Memory that was large is given back. */
void process_trim(struct process *process);

typedef enum process_event {
	PROCESS_MESSAGE = 0, /* process->message */
	PROCESS_DIED,
	PROCESS_OVERDUE, /* limit_ns is over */
	PROCESS_UNWANTED, /* nobody has wanted the result for a while */
} process_event;

#define CANCEL_GRACE_NS 1000000000u

/* Sends it a message, without waiting; what can't be sent is a fault. fd: passed along, -1: none. */
void process_tell(struct process *process, const struct isolated_message *message, int fd);
/* Before a call is sent: it is wanted. */
void process_begin(struct process *process);
/* It has done what it mustn't: kills it. The first fault is the one that is told. */
void process_condemn(struct process *process, const char *fault);
/* Waits for a message that isn't a log line (those are logged). limit_ns: when to give up, of CLOCK_MONOTONIC; 0: never. exec: NULL, or the kernel's: the worker is told when it is cancelled. */
process_event process_wait(struct process *process, uint64_t limit_ns, const opd_exec *exec, bool (*cancelled)(const opd_exec *exec));

/* It runs nothing any more: whoever waits for it, also over process->helpers, sees that soon. process_end still follows. */
void process_kill(const struct process *process);
/* Ends it, by force unless `ask`: then it has a moment to do so itself. Says how it ended in `text`: "died of signal 11 (Segmentation fault)", "doesn't read what it is sent, and was ended". */
void process_end(struct process *process, bool ask, char *text, size_t text_bytes);

#endif
