#include "server/installed.h"

#include <dlfcn.h>
#include <libgen.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ITEM(name) name,
const char *const installed_modules[] = {INSTALLED_NAMES(ITEM, ITEM) NULL};

bool installed_is(const char *name)
{
	for (size_t i = 0; installed_modules[i] != NULL; i++)
		if (strcmp(installed_modules[i], name) == 0)
			return true;
	return false;
}

/* The folder of the file that this code was loaded from. */
static bool own_folder(char folder[PATH_MAX])
{
	Dl_info info;
	struct link_map *map = NULL;
	if (dladdr1(installed_modules, &info, (void **)&map, RTLD_DL_LINKMAP) == 0 || map == NULL)
		return false;
	/* The program itself has no name here. */
	if (realpath(map->l_name[0] != '\0' ? map->l_name : "/proc/self/exe", folder) == NULL)
		return false;
	(void)memmove(folder, dirname(folder), strlen(folder) + 1);
	return true;
}

bool installed_path(const char *name, char path[PATH_MAX])
{
	/* From a library beside them; from an installed program; from a program or a library of a build. */
	static const char *const ways[] = {"opd", OPD_MODULES_FROM_BIN, "../lib/opd"};
	char folder[PATH_MAX];
	(void)snprintf(path, PATH_MAX, "opd-provider-%s.so", name);
	if (!own_folder(folder))
		return false;
	for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
		char tried[PATH_MAX];
		const int bytes = snprintf(tried, sizeof tried, "%s/%s/opd-provider-%s.so", folder, ways[i], name);
		if (bytes < 0 || (size_t)bytes >= sizeof tried)
			return false;
		if (realpath(tried, path) != NULL)
			return true;
		(void)strcpy(path, tried);
	}
	return false;
}

const char *installed_hint(const char *path)
{
	for (size_t i = 0; installed_modules[i] != NULL; i++) {
		char file[64];
		const int bytes = snprintf(file, sizeof file, "/opd-provider-%s.so", installed_modules[i]);
		if (strlen(path) > (size_t)bytes && strcmp(path + strlen(path) - (size_t)bytes, file) == 0)
			return " (a module that comes with opd, where it was built and installed with what that needs)";
	}
	return "";
}

opd_status installed_resolve(const char *text, const char *what, char path[PATH_MAX], opd_error *error)
{
	if (text[0] == '/' && strlen(text) < PATH_MAX) {
		(void)strcpy(path, text);
		return OPD_OK;
	}
	if (!installed_is(text))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s \"%.200s\": expected " INSTALLED_EXPECTED, what, text);
	(void)installed_path(text, path);
	return OPD_OK;
}
