#include "server/lanes.h"

#include "server/daemon.h"
#include "server/log.h"

static void wake(void *argument, uint32_t loop)
{
	struct server *server = argument;
	io_loop_wake(&server->loops[loop]);
}

/* Everybody's where nobody says: what the others leave of the machine. Loops that were asked for, behind the first, need cores as lanes do. Those that nobody asked for take none away: where few clients
 * are they sleep, and a lone client's kernels would do without a quarter of the machine. */
static uint32_t main_threads(const struct server *server)
{
	const struct config *config = server->config;
	const struct machine *machine = &server->machine;
	uint32_t kept = config->loops == 0 ? 0 : config->loops - 1;
	if (config->threads != 0)
		return config->threads;
	for (size_t i = 0; i < config->lane_count; i++)
		kept += config->lanes[i].threads;
	LOG(server->log, LOG_INFO, "machine", LOG_UINT("cores", machine->cores), LOG_UINT("processors", machine->processors), LOG_UINT("quota", machine->quota),
	    LOG_UINT("threads", machine->threads), LOG_UINT("kept", kept));
	return machine->threads > kept ? machine->threads - kept : 1;
}

opd_status lanes_start(struct server *server, opd_error *error)
{
	const struct config *config = server->config;
	struct lane_options options = {.threads = main_threads(server), .spin_ns = LANE_SPIN_NS_DEFAULT, .owners = server->loop_count, .wake = wake, .wake_argument = server};
	opd_status status = lane_create(&options, &server->lane, error);
	if (status != OPD_OK)
		return status;
	server->lanes[server->lane_count++].lane = server->lane;
	for (size_t i = 0; status == OPD_OK && i < config->lane_count; i++) {
		options.name = config->lanes[i].name;
		options.threads = config->lanes[i].threads;
		status = lane_create(&options, &server->lanes[server->lane_count].lane, error);
		server->lane_count += status == OPD_OK;
	}
	for (uint32_t i = 0; i < server->lane_count; i++)
		server->lanes[i].progress_us = server->started_us;
	lanes_bound(server);
	return status;
}

void lanes_bound(struct server *server)
{
	const struct config *config = server->config;
	for (uint32_t i = 0; i < server->lane_count; i++) {
		struct scheduler *scheduler = lane_scheduler_lock(server->lanes[i].lane);
		scheduler->flow_queue_max = config->limits.queue;
		scheduler->queue_max = config->limits.lane_queue;
		lane_scheduler_unlock(server->lanes[i].lane);
		lane_set_segment(server->lanes[i].lane, config->segment_ns);
		lane_set_batch(server->lanes[i].lane, config->batch_rows);
	}
}

void lanes_finish_done(struct io_loop *io)
{
	for (uint32_t i = 0; i < io->server->lane_count; i++)
		tally_add(&io->lanes_done[i], lane_finish_done(io->server->lanes[i].lane, io->number), false);
}

bool lanes_busy(const struct server *server)
{
	bool busy = false;
	for (uint32_t i = 0; i < server->lane_count; i++)
		busy = busy || lane_busy(server->lanes[i].lane);
	return busy;
}

uint32_t lanes_threads(const struct server *server)
{
	uint32_t threads = 0;
	for (uint32_t i = 0; i < server->lane_count; i++)
		threads += lane_threads(server->lanes[i].lane);
	return threads;
}

uint32_t lanes_stuck(const struct server *server)
{
	uint32_t stuck = 0;
	for (uint32_t i = 0; i < server->lane_count; i++)
		stuck += lane_stuck(server->lanes[i].lane);
	return stuck + device_lanes_stuck(server);
}

void lanes_stop(struct server *server)
{
	for (uint32_t i = 0; i < server->lane_count; i++)
		lane_stop(server->lanes[i].lane);
}

void lanes_destroy(struct server *server)
{
	for (uint32_t i = 0; i < server->lane_count; i++)
		lane_destroy(server->lanes[i].lane);
}
