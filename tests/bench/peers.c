#include "tests/bench/peers.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/bench/report.h"
#include "tests/lib/pin.h"

/* ---- Processes ---- */

/* Runs a program with pipes at its standard input (commands_out; NULL: none) and output. */
static pid_t spawn(char *const *arguments, FILE **commands_out, FILE **answers_out)
{
	int in[2], out[2];
	if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0)
		bench_fail("pipe: %s", strerror(errno));
	(void)fflush(stdout);
	pid_t pid = fork();
	if (pid < 0)
		bench_fail("fork: %s", strerror(errno));
	if (pid == 0) {
		if (dup2(in[0], STDIN_FILENO) >= 0 && dup2(out[1], STDOUT_FILENO) >= 0)
			(void)execv(arguments[0], arguments);
		(void)fprintf(stderr, "bench: %s: %s\n", arguments[0], strerror(errno));
		_exit(127);
	}
	(void)close(in[0]);
	(void)close(out[1]);
	if (commands_out == NULL)
		(void)close(in[1]);
	else
		*commands_out = fdopen(in[1], "w");
	*answers_out = fdopen(out[0], "r");
	if (*answers_out == NULL || (commands_out != NULL && *commands_out == NULL))
		bench_fail("fdopen: %s", strerror(errno));
	return pid;
}

static void peer_answer(struct peer *peer, FILE *from, char *line, int line_bytes)
{
	if (fgets(line, line_bytes, from) == NULL)
		bench_fail("%s: its program has ended", peer->name);
	line[strcspn(line, "\n")] = '\0';
}

void peer_start(struct peer *peer, const char *binary, const char *directory)
{
	char port[32];
	FILE *from;
	(void)pin_allowed(); /* before anything is pinned */
	if (binary == NULL)
		return;
	peer->why_skipped = NULL;
	if ((size_t)snprintf(peer->path, sizeof peer->path, "%s/%s.sock", directory, peer->name) >= sizeof peer->path)
		bench_fail("%s: %s: the path is too long for a Unix socket", peer->name, directory);
	peer->server = spawn((char *[]){(char *)(uintptr_t)binary, "serve", peer->path, NULL}, NULL, &from);
	peer_answer(peer, from, port, sizeof port);
	(void)fclose(from);
	peer->client =
	    spawn((char *[]){(char *)(uintptr_t)binary, "call", peer->path, port, NULL}, &peer->commands, &peer->answers);
}

void peer_stop(struct peer *peer)
{
	if (peer->why_skipped != NULL)
		return;
	(void)fclose(peer->commands);
	(void)fclose(peer->answers);
	const pid_t pids[] = {peer->client, peer->server};
	for (size_t i = 0; i < 2; i++) {
		(void)kill(pids[i], SIGKILL);
		(void)waitpid(pids[i], NULL, 0);
	}
	(void)unlink(peer->path);
}

void peer_pin(const struct peer *peer, int server, int client)
{
	if (peer->why_skipped == NULL && (!pin_process(peer->server, server) || !pin_process(peer->client, client)))
		bench_fail("%s: can't pin its processes to cores %d and %d", peer->name, client, server);
}

/* ---- Commands ---- */

static void peer_ask(struct peer *peer, const char *command)
{
	char line[64];
	if (peer->why_skipped != NULL)
		return;
	(void)fprintf(peer->commands, "%s\n", command);
	(void)fflush(peer->commands);
	peer_answer(peer, peer->answers, line, sizeof line);
	if (strcmp(line, "ok") != 0)
		bench_fail("%s: %s: answered %s", peer->name, command, line);
}

void peer_connect(struct peer *peer, bool tcp)
{
	peer_ask(peer, tcp ? "connect tcp" : "connect unix");
}

void peer_close(struct peer *peer)
{
	peer_ask(peer, "close");
}

struct peer_block peer_block(struct peer *peer, const char *op, size_t elements, uint64_t calls, uint64_t window, bool timed)
{
	char line[128];
	struct peer_block block = {.calls = calls / peer->divisor > window ? calls / peer->divisor : window};
	if (peer->why_skipped != NULL)
		return block;
	(void)fprintf(peer->commands, "block %s %zu %" PRIu64 " %" PRIu64 " %d\n", op, elements, block.calls, window, timed);
	(void)fflush(peer->commands);
	peer_answer(peer, peer->answers, line, sizeof line);
	if (sscanf(line, "%" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &block.total_ns, &block.kernel_ns,
	           &block.quantile_ns[0], &block.quantile_ns[1], &block.quantile_ns[2]) != 5)
		bench_fail("%s: %s: answered %s", peer->name, op, line);
	return block;
}

/* ---- Rows ---- */

void peer_series_add(struct peer_series *series, double value, double kernel, double floor, double opd)
{
	unsigned round = series->rounds++;
	series->value[round] = value;
	series->kernel[round] = kernel;
	series->ratio[round] = (value - kernel) / floor;
	series->versus[round] = opd / (value - kernel);
}

void peer_series_print(struct peer_series *series, const struct peer *peer, const char *unit, bool kernel)
{
	char note[96];
	if (peer->why_skipped != NULL) {
		report_peer(&(struct report_row){.what = peer->name, .unit = unit, .note = peer->why_skipped});
		return;
	}
	unsigned rounds = series->rounds;
	double low = report_quantile(series->versus, rounds, 0.1), high = report_quantile(series->versus, rounds, 0.9);
	(void)snprintf(note, sizeof note, "opd is %.2f of it (%.2f to %.2f)", report_median(series->versus, rounds), low, high);
	report_peer(&(struct report_row){.what = peer->name,
	                                 .unit = unit,
	                                 .floor = REPORT_NONE,
	                                 .value = report_median(series->value, rounds),
	                                 .kernel = kernel ? report_median(series->kernel, rounds) : REPORT_NONE,
	                                 .ratio = report_median(series->ratio, rounds),
	                                 .note = note});
}
