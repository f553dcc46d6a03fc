#include "server/stranger.h"

#include "server/conn.h"
#include "server/daemon.h"

void stranger_remove(struct conn *conn)
{
	struct strangers *all = &conn->io->strangers;
	struct stranger *own = &conn->stranger;
	if (!own->is)
		return;
	*(own->previous == NULL ? &all->oldest : &own->previous->stranger.next) = own->next;
	*(own->next == NULL ? &all->newest : &own->next->stranger.previous) = own->previous;
	all->count--;
	*own = (struct stranger){0};
}

void stranger_add(struct conn *conn)
{
	struct strangers *all = &conn->io->strangers;
	conn->stranger = (struct stranger){.previous = all->newest, .is = true};
	*(all->newest == NULL ? &all->oldest : &all->newest->stranger.next) = conn;
	all->newest = conn;
	all->count++;
	const uint32_t limit = conn->server->config->limits.handshakes / conn->server->loop_count;
	if (all->count <= limit || all->oldest == conn)
		return;
	struct conn *oldest = all->oldest;
	stranger_remove(oldest);
	conn_close(oldest, LOG_WARN, "no Hello yet, and a newer connection needs the place (limits.handshakes)");
}
