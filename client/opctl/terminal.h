/* A terminal that a command fills and keeps filling: another screen, keys as they are typed, its size, and the way back.
 *
 * Layer: client/opctl. Threads: one, and one terminal a process.
 * Life: terminal_open → terminal_key… → terminal_close. Whatever ends the command (Ctrl-C, SIGTERM, SIGHUP) arrives as KEY_QUIT, so that the terminal is always given back as it was; Ctrl-Z gives it back
 * until the command goes on. */
#ifndef OPCTL_TERMINAL_H
#define OPCTL_TERMINAL_H

#include <stdbool.h>
#include <stdint.h>

/* What is typed is its character; the rest: */
enum {
	KEY_NONE = 0, /* the time is over */
	KEY_QUIT = 256,
	KEY_RESIZE, /* the size is another one, or the screen was somebody else's: draw it again */
	KEY_UP,
	KEY_DOWN,
	KEY_PAGE_UP,
	KEY_PAGE_DOWN,
};

/* False: stdin or stdout is no terminal, and nothing was done. */
bool terminal_open(void);
/* Waits so long for a key. */
int terminal_key(uint64_t wait_us);
/* 24 by 80 where it doesn't say. */
void terminal_size(uint32_t *rows_out, uint32_t *columns_out);
/* May be called without terminal_open, and twice. */
void terminal_close(void);

#endif
