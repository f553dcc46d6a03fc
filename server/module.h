/* One provider module, linked in or loaded: its table of host services and what it registered.
 *
 * Layer: server, beside the registry (which alone uses it). Threads: under the registry's lock, but for host services marked "any thread" in opd/provider.h. */
#ifndef OPD_SERVER_MODULE_H
#define OPD_SERVER_MODULE_H

#include "providers/provider.h"

struct isolated;
struct registry;
struct provider;

struct module {
	opd_host host; /* first: host.context is the module */
	struct registry *registry;
	const opd_module *def;
	void *library; /* dlopen's; NULL: linked in, or isolated */
	struct isolated *isolated; /* its code runs in worker processes; NULL: in this one */
	void *state;
	struct provider *provider;
	struct module *next;
};

/* The file at path without links, if nobody but root and the daemon's user can have written it and it is whole. Room: PATH_MAX bytes. */
OPD_MUST_USE opd_status module_resolve(const char *path, char *real, opd_error *error);
/* Finds the module's table in the .so at path and checks what can be checked before `open`: the symbol, ABI, struct size, name. The reason is in the text. */
OPD_MUST_USE opd_status module_find(const char *path, void **library_out, const opd_module **def_out, opd_error *error);
OPD_MUST_USE opd_status module_check(const opd_module *def, opd_error *error);

/* After a function of a module has failed: makes sure that error->status is `status` (UNKNOWN when that is no code), and that there is a text: the
 * given one where the module wrote none. Callers clear error->text before they call a module. */
OPD_PRINTF(3, 4)
opd_status module_failure(opd_status status, opd_error *error, const char *format, ...);

/* An op's check of the contents that its kernels index with, if it has one; lane: whose job may be cancelled meanwhile, NULL: nobody's. OPD_OK, or a failure with its text. */
struct lane_exec;
OPD_MUST_USE opd_status module_check_contents(const struct module *module, const opd_op *op, const opd_call *call, struct lane_exec *lane, opd_error *error);

void module_unload(void *library); /* NULL is allowed */

/* Zeroed state, not yet opened. NULL: out of memory. */
struct module *module_create(struct registry *registry, const opd_module *def, void *library);
/* Calls the module's close if `opened` was tried, and frees it. */
void module_destroy(struct module *module, bool opened);

#endif
