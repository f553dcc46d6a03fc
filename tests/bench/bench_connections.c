/* What an idle session costs the daemon in resident memory. */
#include <stdio.h>

#include "tests/bench/bench.h"

#define SESSIONS 1000
#define ROUNDS 3

/* KiB a session, of sessions that have said hello, made one call and wait; `tcp`: over loopback. */
static double session_kib(struct bench *bench, bool tcp, unsigned sessions, bool called)
{
	static opd_client *clients[SESSIONS];
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	const char *address = tcp ? daemon.tcp_address : daemon.unix_address;
	opd_client *first = call_connect(address);
	opd_request *request = call_tiny(first);
	for (int i = 0; i < 100; i++)
		call_run(first, request); /* what the daemon keeps however many sessions it has */
	uint64_t before = daemon_resident_bytes(&daemon);
	for (unsigned i = 0; i < sessions; i++) {
		clients[i] = call_connect(address);
		if (called)
			call_run(clients[i], request);
	}
	uint64_t after = daemon_resident_bytes(&daemon);
	opd_request_destroy(request);
	opd_close(first);
	for (unsigned i = 0; i < sessions; i++)
		opd_close(clients[i]);
	daemon_stop(&daemon);
	return ((double)after - (double)before) / 1024 / sessions;
}

void bench_connections(struct bench *bench)
{
	report_section("Idle sessions: the daemon's resident memory");
	for (int variant = 0; variant < 3; variant++) {
		static const char *const names[] = {"1,000 sessions after Hello, Unix", "1,000 sessions after one call each, Unix",
		                                    "1,000 sessions after one call each, TCP"};
		unsigned rounds = bench->quick ? 1 : ROUNDS;
		double kib[ROUNDS];
		for (unsigned i = 0; i < rounds; i++)
			kib[i] = session_kib(bench, variant == 2, SESSIONS, variant != 0);
		report_row(&(struct report_row){.what = names[variant],
		                                .unit = "KiB",
		                                .floor = REPORT_NONE,
		                                .value = report_median(kib, rounds),
		                                .kernel = REPORT_NONE,
		                                .ratio = REPORT_NONE,
		                                .bound = REPORT_VALUE_MAX,
		                                .limit = 16});
	}
}
