/* Tensor files that a user was given: .npy and .safetensors. */
#include "client/npy.h"
#include "client/safetensors.h"
#include "fuzz.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

/* Reads every byte: a sanitizer sees it when there are fewer than the tensor says. */
static void touch(const struct file_tensor *tensor)
{
	uint8_t sum = 0;
	for (uint64_t i = 0; i < tensor->bytes; i++)
		sum ^= ((const uint8_t *)tensor->data)[i];
	volatile uint8_t sink = sum;
	(void)sink;
}

static void try_npy(const char *path, opd_dtype raw_as)
{
	struct file_tensor tensor;
	opd_error error;
	if (npy_read(path, raw_as, &tensor, &error) != OPD_OK)
		return;
	touch(&tensor);
	file_tensor_fini(&tensor);
}

static void try_safetensors(const char *path)
{
	struct safetensors *file;
	opd_error error;
	if (safetensors_open(path, &file, &error) != OPD_OK)
		return;
	(void)safetensors_metadata(file, "format");
	for (size_t i = 0; i < safetensors_count(file); i++) {
		const struct safetensors_entry *entry = safetensors_at(file, i);
		struct file_tensor tensor;
		if (safetensors_find(file, entry->name) != entry)
			fuzz_fail("tensor %zu isn't found by its name", i);
		if (safetensors_read(file, entry, &tensor, &error) == OPD_OK) {
			touch(&tensor);
			file_tensor_fini(&tensor);
		}
	}
	safetensors_close(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	if (bytes == 0)
		return 0;
	const char *path = fuzz_file(data + 1, bytes - 1);
	if (data[0] % 2 == 0)
		try_npy(path, (data[0] & 2) != 0 ? OPD_bf16 : OPD_DTYPE_NONE);
	else
		try_safetensors(path);
	return 0;
}
