#include "tests/conformance/derived.h"

#include <stdlib.h>
#include <string.h>

#include "tests/conformance/host.h"

struct derived_copy {
	struct derived_copy *next;
	uint64_t id;
	uint64_t version;
	uint32_t key_bytes;
	bool kept;
	void *memory;
	unsigned char key[];
};

const void *derived_copies_find(struct derived_copies *copies, const opd_tensor *tensor, const void *key, uint32_t key_bytes)
{
	copies->asked++;
	if ((tensor->flags & OPD_TENSOR_CONSTANT) == 0 || tensor->id == 0)
		return NULL;
	for (struct derived_copy *copy = copies->first; copy != NULL; copy = copy->next) {
		if (!copy->kept || copy->id != tensor->id || copy->version != tensor->version || copy->key_bytes != key_bytes ||
		    (key_bytes != 0 && memcmp(copy->key, key, key_bytes) != 0))
			continue;
		copies->found++;
		return copy->memory;
	}
	return NULL;
}

void *derived_copies_make(struct derived_copies *copies, const opd_tensor *tensor, const void *key, uint32_t key_bytes, uint64_t bytes)
{
	if ((tensor->flags & OPD_TENSOR_CONSTANT) == 0 || tensor->id == 0 || bytes == 0)
		return NULL;
	struct derived_copy *copy = calloc(1, sizeof *copy + key_bytes);
	if (copy == NULL || (copy->memory = host_memory(bytes)) == NULL) {
		free(copy);
		return NULL;
	}
	memset(copy->memory, 0xff, bytes); /* NaN: what isn't filled in shows */
	copy->id = tensor->id;
	copy->version = tensor->version;
	copy->key_bytes = key_bytes;
	if (key_bytes != 0)
		memcpy(copy->key, key, key_bytes);
	copy->next = copies->first;
	copies->first = copy;
	return copy->memory;
}

void derived_copies_keep(struct derived_copies *copies, const void *memory)
{
	for (struct derived_copy *copy = copies->first; copy != NULL; copy = copy->next)
		if (copy->memory == memory)
			copy->kept = true;
}

void derived_copies_drop(struct derived_copies *copies)
{
	while (copies->first != NULL) {
		struct derived_copy *copy = copies->first;
		copies->first = copy->next;
		free(copy->memory);
		free(copy);
	}
}
