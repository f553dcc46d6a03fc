/* The schema grammar: what parses has a canonical text that parses to the same schema. */
#include <stdlib.h>

#include "fuzz.h"
#include "server/schema.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct schema *schema, *again;
	opd_error error;
	char *text = malloc(bytes + 1);
	if (text == NULL)
		return 0;
	if (bytes != 0)
		memcpy(text, data, bytes);
	text[bytes] = '\0';
	if (schema_parse(text, &schema, &error) == OPD_OK) {
		uint32_t params;
		if (schema_parse(schema->text, &again, &error) != OPD_OK)
			fuzz_fail("the canonical text \"%s\" doesn't parse: %s", schema->text, error.text);
		if (strcmp(schema->text, again->text) != 0 || !schema_accepts(schema, again, &params) || params != schema->param_count)
			fuzz_fail("the canonical text \"%s\" is another schema", schema->text);
		for (uint32_t i = 0; i < schema->param_count; i++)
			if (schema_find(schema, schema->params[i].name, schema->params[i].name_bytes) != (int)i)
				fuzz_fail("parameter %s isn't found", schema->params[i].name);
		schema_destroy(again);
		schema_destroy(schema);
	}
	free(text);
	return 0;
}
