/* The provider modules that come with opd, by their names alone: `opd --module onednn` instead of a path.
 *
 * They lie where this installation (or build) put them, found from the file whose code this is (the program, or libopd-embedded): neither environment
 * nor working folder choose what is loaded, and a module's path is checked like any other (server/module.h).
 * Layer: server, below config. Threads: any. */
#ifndef OPD_SERVER_INSTALLED_H
#define OPD_SERVER_INSTALLED_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>

#include "opd/status.h"

/* What stands for all of them. */
#define INSTALLED_ALL "all"
/* Their names, in the order in which they are opened: those that bring a device before those that run on it. */
#define INSTALLED_NAMES(NAME, LAST) NAME("openblas") NAME("onednn") NAME("opencl") NAME("cuda") NAME("cublaslt") LAST("cudnn")
/* For messages: what a module may be given by. */
#define INSTALLED_EXPECTED "an absolute path, or one of " INSTALLED_NAMES(INSTALLED_AND, INSTALLED_LAST)
#define INSTALLED_AND(name) name ", "
#define INSTALLED_LAST(name) name

/* NULL ends it. */
extern const char *const installed_modules[];

bool installed_is(const char *name);
/* The file that the module called `name` (of installed_modules) would be loaded from, whether or not it exists. Room: PATH_MAX bytes. False: it has
 * not been built or installed; the path is then where it was looked for. */
bool installed_path(const char *name, char path[PATH_MAX]);
/* For a message about a file that isn't there: " (…)" where it is to be one of these modules, "" elsewhere. Static. */
const char *installed_hint(const char *path);
/* A path as it is, a name of ours as installed_path says. INVALID_ARGUMENT: neither, told with `what` in front. */
OPD_MUST_USE opd_status installed_resolve(const char *text, const char *what, char path[PATH_MAX], opd_error *error);

#endif
