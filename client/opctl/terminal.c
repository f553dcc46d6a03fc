#include "client/opctl/terminal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* The other screen, and no cursor; and back. */
#define ENTER "\x1b[?1049h\x1b[?25l"
#define LEAVE "\x1b[?25h\x1b[?1049l"
/* How long the rest of an arrow's bytes may take: a lone escape is none. */
#define ESCAPE_MS 50

static struct termios before;
static bool opened;
static volatile sig_atomic_t ending, stopping, resized;
static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGWINCH, SIGTSTP};
static sigset_t handled; /* those, which arrive only while a key is waited for: one that came just before would wait as long as the key */
static sigset_t waiting; /* what is blocked meanwhile */

static void on_signal(int number)
{
	if (number == SIGWINCH)
		resized = 1;
	else if (number == SIGTSTP)
		stopping = 1;
	else
		ending = 1;
}

/* Without SA_RESTART: they end a poll. */
static void handle(int number, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler};
	(void)sigemptyset(&action.sa_mask);
	(void)sigaction(number, &action, NULL);
}

static void say(const char *text)
{
	(void)fputs(text, stdout);
	(void)fflush(stdout);
}

/* Keys come one by one and aren't shown; Ctrl-C and Ctrl-Z stay signals. */
static void take(void)
{
	struct termios raw = before;
	raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
	raw.c_cc[VMIN] = 1;
	raw.c_cc[VTIME] = 0;
	(void)tcsetattr(STDIN_FILENO, TCSANOW, &raw);
	say(ENTER);
}

static void give_back(void)
{
	say(LEAVE);
	(void)tcsetattr(STDIN_FILENO, TCSANOW, &before);
}

bool terminal_open(void)
{
	if (!isatty(STDOUT_FILENO) || tcgetattr(STDIN_FILENO, &before) != 0)
		return false;
	(void)sigemptyset(&handled);
	for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++) {
		(void)sigaddset(&handled, signals[i]);
		handle(signals[i], on_signal);
	}
	(void)sigprocmask(SIG_BLOCK, &handled, &waiting);
	take();
	opened = true;
	return true;
}

void terminal_close(void)
{
	if (!opened)
		return;
	give_back();
	(void)sigprocmask(SIG_SETMASK, &waiting, NULL);
	opened = false;
}

/* Somebody else has the terminal until we are told to go on. */
static void stop(void)
{
	stopping = 0;
	give_back();
	handle(SIGTSTP, SIG_DFL);
	(void)raise(SIGTSTP);
	(void)sigprocmask(SIG_SETMASK, &waiting, NULL); /* here it stops */
	(void)sigprocmask(SIG_BLOCK, &handled, NULL);
	handle(SIGTSTP, on_signal);
	take();
}

void terminal_size(uint32_t *rows_out, uint32_t *columns_out)
{
	struct winsize size;
	const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row != 0 && size.ws_col != 0;
	*rows_out = known ? size.ws_row : 24;
	*columns_out = known ? size.ws_col : 80;
}

/* 1: there is something to read (or nobody there any more); 0: the time is over; -1: a signal. */
static int wait_for_input(uint64_t wait_us)
{
	struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
	const struct timespec time = {(time_t)(wait_us / 1000000), (long)(wait_us % 1000000) * 1000};
	return ppoll(&input, 1, &time, &waiting);
}

/* After an escape: an arrow or a page key, "[A", "OB", "[5~". */
static int read_escape(void)
{
	char rest[4] = {0};
	if (wait_for_input(ESCAPE_MS * 1000) != 1)
		return KEY_NONE;
	const ssize_t bytes = read(STDIN_FILENO, rest, sizeof rest - 1);
	if (bytes < 2 || (rest[0] != '[' && rest[0] != 'O'))
		return KEY_NONE;
	switch (rest[1]) {
	case 'A':
		return KEY_UP;
	case 'B':
		return KEY_DOWN;
	case '5':
		return KEY_PAGE_UP;
	case '6':
		return KEY_PAGE_DOWN;
	default:
		return KEY_NONE;
	}
}

static int read_key(void)
{
	unsigned char key;
	const ssize_t bytes = read(STDIN_FILENO, &key, 1);
	if (bytes == 0 || (bytes < 0 && errno != EINTR && errno != EAGAIN)) /* the terminal is gone */
		return KEY_QUIT;
	if (bytes < 0)
		return KEY_NONE;
	return key == 0x1b ? read_escape() : key;
}

int terminal_key(uint64_t wait_us)
{
	const int ready = ending ? -1 : wait_for_input(wait_us);
	if (ending)
		return KEY_QUIT;
	if (stopping) {
		stop();
		return KEY_RESIZE;
	}
	if (resized) {
		resized = 0;
		return KEY_RESIZE;
	}
	return ready > 0 ? read_key() : KEY_NONE;
}
