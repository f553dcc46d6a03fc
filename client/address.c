#include "client/address.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void write_path(const char *prefix, char *out, size_t out_bytes)
{
	const char *runtime = getenv("XDG_RUNTIME_DIR");
	if (runtime != NULL && runtime[0] == '/')
		(void)snprintf(out, out_bytes, "%s%s/opd.sock", prefix, runtime);
	else if (geteuid() == 0)
		(void)snprintf(out, out_bytes, "%s/run/opd/opd.sock", prefix);
	else
		(void)snprintf(out, out_bytes, "%s/tmp/opd-%lu/opd.sock", prefix, (unsigned long)geteuid());
}

void address_default_socket(char *out, size_t out_bytes)
{
	write_path("", out, out_bytes);
}

void address_default(char *out, size_t out_bytes)
{
	write_path("unix:", out, out_bytes);
}
