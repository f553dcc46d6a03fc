/* The configuration file: any bytes give a configuration or an error that names the line. */
#include "fuzz.h"
#include "server/config.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	opd_error error = {0};
	struct config *config = config_create();
	if (config == NULL)
		return 0;
	if (config_load(config, fuzz_file(data, bytes), &error) == OPD_OK) {
		if (config_check(config, false, &error) == OPD_OK && config->listener_count == 0)
			fuzz_fail("a checked configuration has no listener");
	} else if (error.text[0] == '\0') {
		fuzz_fail("a refused configuration has no reason");
	}
	config_destroy(config);
	return 0;
}
