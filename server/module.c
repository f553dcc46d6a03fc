#include "server/module.h"

#include <dlfcn.h>
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/text.h"
#include "server/installed.h"
#include "server/isolated.h"

static bool others_may_write(const struct stat *file)
{
	return (file->st_uid != 0 && file->st_uid != geteuid()) || (file->st_mode & (S_IWGRP | S_IWOTH)) != 0;
}

/* A folder that others can write lets them put another file in its place, unless it is sticky. Folders above need no look: what somebody moved
 * here in their stead would have to be ours, too. */
static opd_status check_folder(const char *path, opd_error *error)
{
	char folder[PATH_MAX];
	(void)snprintf(folder, sizeof folder, "%s", path);
	struct stat file;
	if (stat(dirname(folder), &file) != 0)
		return opd_fail(error, OPD_NOT_FOUND, "%s: %s", path, strerror(errno));
	if (others_may_write(&file) && (file.st_mode & S_ISVTX) == 0)
		return opd_fail(error, OPD_PERMISSION_DENIED, "%s: its folder is owned by uid %u with mode %04o: others could have written there", path,
		                (unsigned)file.st_uid, (unsigned)(file.st_mode & 07777));
	return OPD_OK;
}

/* Code is loaded only from a file that nobody but root or the daemon's own user can have written. `path` has no symbolic link. */
static opd_status check_writers(const char *path, opd_error *error)
{
	struct stat file;
	if (stat(path, &file) != 0)
		return opd_fail(error, OPD_NOT_FOUND, "%s: %s", path, strerror(errno));
	if (!S_ISREG(file.st_mode))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: not a regular file", path);
	if (others_may_write(&file))
		return opd_fail(error, OPD_PERMISSION_DENIED, "%s: owned by uid %u with mode %04o: others could have written it", path,
		                (unsigned)file.st_uid, (unsigned)(file.st_mode & 07777));
	return check_folder(path, error);
}

/* True unless a part that the loader would map ends behind the file. What is no ELF file of this machine is left to the loader,
 * which says so. */
static bool parts_fit(FILE *file, uint64_t file_bytes)
{
	ElfW(Ehdr) head;
	if (fread(&head, sizeof head, 1, file) != 1 || memcmp(head.e_ident, ELFMAG, SELFMAG) != 0 ||
	    head.e_phentsize != sizeof(ElfW(Phdr)))
		return true;
	for (unsigned i = 0; i < head.e_phnum; i++) {
		ElfW(Phdr) part;
		if (head.e_phoff > LONG_MAX - i * sizeof part || fseek(file, (long)(head.e_phoff + i * sizeof part), SEEK_SET) != 0 ||
		    fread(&part, sizeof part, 1, file) != 1)
			return false;
		if (part.p_type == PT_LOAD && (part.p_offset > file_bytes || part.p_filesz > file_bytes - part.p_offset))
			return false;
	}
	return true;
}

/* The loader maps what the headers say, and the process gets SIGBUS where the file is shorter than that: a copy that was
 * interrupted. */
static opd_status check_whole(const char *path, opd_error *error)
{
	struct stat status;
	FILE *file = fopen(path, "rbe");
	if (file == NULL || fstat(fileno(file), &status) != 0) {
		if (file != NULL)
			(void)fclose(file);
		return opd_fail(error, OPD_FAILED_PRECONDITION, "%s: %s", path, strerror(errno));
	}
	bool whole = parts_fit(file, (uint64_t)status.st_size);
	(void)fclose(file);
	if (whole)
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "%s: the file is cut off: %llu bytes are less than its headers name", path,
	                (unsigned long long)status.st_size);
}

opd_status module_check(const opd_module *def, opd_error *error)
{
	if (def == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s returned NULL", OPD_MODULE_SYMBOL);
	if (def->abi != OPD_PROVIDER_ABI)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "built for provider ABI %u, this opd has %u", (unsigned)def->abi,
		                (unsigned)OPD_PROVIDER_ABI);
	if (def->struct_bytes < offsetof(opd_module, close) + sizeof def->close)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "opd_module has %u bytes, expected at least %zu", (unsigned)def->struct_bytes,
		                offsetof(opd_module, close) + sizeof def->close);
	if (def->name == NULL || !text_is_name(def->name, strlen(def->name))) {
		char shown[160];
		return opd_fail(error, OPD_INVALID_ARGUMENT, "provider name \"%s\": expected [a-z_][a-z_0-9]*",
		                def->name == NULL ? "" : text_escape(def->name, strnlen(def->name, 256), shown, sizeof shown));
	}
	if (def->open == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "provider %s has no open function", def->name);
	if (def->state_bytes > 1u << 30)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "provider %s: state_bytes %llu, at most 1 GiB", def->name,
		                (unsigned long long)def->state_bytes);
	return OPD_OK;
}

opd_status module_resolve(const char *path, char *real, opd_error *error)
{
	if (realpath(path, real) == NULL)
		return opd_fail(error, errno == EACCES ? OPD_PERMISSION_DENIED : OPD_NOT_FOUND, "%s: %s%s", path, strerror(errno), errno == ENOENT ? installed_hint(path) : "");
	opd_status status = check_writers(real, error);
	return status == OPD_OK ? check_whole(real, error) : status;
}

opd_status module_find(const char *path, void **library_out, const opd_module **def_out, opd_error *error)
{
	char real[PATH_MAX];
	opd_status status = module_resolve(path, real, error);
	if (status != OPD_OK)
		return status;
	void *library = dlopen(real, RTLD_NOW | RTLD_LOCAL);
	if (library == NULL)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "%s", dlerror());
	/* POSIX promises that a function's address survives the trip through void *. */
	union {
		void *object;
		opd_module_get_fn function;
	} symbol = {.object = dlsym(library, OPD_MODULE_SYMBOL)};
	if (symbol.object == NULL) {
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: no symbol %s: not an opd provider module", path, OPD_MODULE_SYMBOL);
	} else {
		const opd_module *def = symbol.function();
		status = module_check(def, error);
		if (status == OPD_OK) {
			*library_out = library;
			*def_out = def;
			return OPD_OK;
		}
		(void)opd_error_prefix(error, status, "%s", path);
	}
	(void)dlclose(library);
	return status;
}

opd_status module_failure(opd_status status, opd_error *error, const char *format, ...)
{
	if (status <= OPD_OK || status > OPD_UNAUTHENTICATED)
		status = OPD_UNKNOWN;
	error->status = (int32_t)status;
	error->text[sizeof error->text - 1] = '\0';
	if (error->text[0] == '\0') {
		va_list args;
		va_start(args, format);
		(void)vsnprintf(error->text, sizeof error->text, format, args);
		va_end(args);
	}
	return status;
}

/* What an op's table has come to hold since the first: an older one ends before it. */
static opd_check_long_fn check_long_of(const opd_op *op)
{
	return op->struct_bytes >= offsetof(opd_op, check_long) + sizeof op->check_long ? op->check_long : NULL;
}

opd_status module_check_contents(const struct module *module, const opd_op *op, const opd_call *call, struct lane_exec *lane, opd_error *error)
{
	const opd_check_long_fn check_long = check_long_of(op);
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = 1, .host = &module->host, .lane = lane};
	if (op->check == NULL)
		return OPD_OK;
	error->text[0] = '\0';
	opd_status status = check_long == NULL ? op->check(op, call, error) : check_long(op, call, lane == NULL ? NULL : &exec, error);
	if (status == OPD_OK)
		return OPD_OK;
	return module_failure(status, error, "%.*s: the operands' contents are refused", (int)strcspn(op->schema, "("), op->schema);
}

void module_unload(void *library)
{
	if (library != NULL)
		(void)dlclose(library);
}

struct module *module_create(struct registry *registry, const opd_module *def, void *library)
{
	struct module *module = calloc(1, sizeof *module);
	if (module == NULL)
		return NULL;
	module->registry = registry;
	module->def = def;
	module->library = library;
	module->state = calloc(1, def->state_bytes > 0 ? def->state_bytes : 1);
	if (module->state == NULL) {
		free(module);
		return NULL;
	}
	return module;
}

void module_destroy(struct module *module, bool opened)
{
	if (opened && module->def->close != NULL)
		module->def->close(&module->host, module->state);
	isolated_destroy(module->isolated);
	free(module->state);
	module_unload(module->library);
	free(module);
}
