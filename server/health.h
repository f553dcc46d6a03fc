/* How the daemon is: what keeps it from serving as it should, in words for a load balancer and its operator.
 *
 * Layer: server. Threads: the loop's.
 * Unhealthy is what should keep new work away: its memory or its sessions are used up; a lane is stuck; a provider that the configuration asks for can't run anything.
 * Degraded is what an operator should look at, while everything is served: one of several devices is lost, a module isn't there that no list names.
 * Each condition is one text, "object: what". A daemon that drains, and a loop that hangs, answer nobody: that is the asker's to see. */
#ifndef OPD_SERVER_HEALTH_H
#define OPD_SERVER_HEALTH_H

#include <stdint.h>

#include "proto/arena.h"
#include "proto/message.h"

struct server;
struct snapshot;

/* Once a second: whether lanes get on. */
void health_tick(struct server *server, uint64_t now_us);

/* Fills the two lists of *info_out; texts and lists are of the arena, or the snapshot's. False: out of memory. */
OPD_MUST_USE bool health_fill(const struct server *server, const struct snapshot *snapshot, struct arena *arena, struct msg_info *info_out);

#endif
