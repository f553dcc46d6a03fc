/* .safetensors files: named tensors and a map of texts.
 *
 * Layer: client, internal. Threads: a file belongs to one thread at a time.
 * Life: safetensors_open (reads and checks the header, keeps the file open) → find, read → safetensors_close.
 * Checked on opening: the header's length (at most 16 MiB, and the file's), its JSON, names given twice, every range against
 * dtype, shape and file; ranges that overlap, leave a gap or a tail are refused, as the format demands. A tensor of a dtype or
 * rank that opd doesn't have leaves the others readable. Not here: sharded files and their index. */
#ifndef OPD_CLIENT_SAFETENSORS_H
#define OPD_CLIENT_SAFETENSORS_H

#include "client/file_tensor.h"

struct safetensors;

struct safetensors_entry {
	const char *name;
	const char *dtype_name; /* as the file has it */
	opd_dtype dtype;        /* OPD_DTYPE_NONE: not one of opd's, or of too high a rank; it can't be read */
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t offset; /* in the file */
	uint64_t bytes;
};

OPD_MUST_USE opd_status safetensors_open(const char *path, struct safetensors **file_out, opd_error *error);
void safetensors_close(struct safetensors *file);

/* Entries in the order of their names; borrowed until close. */
size_t safetensors_count(const struct safetensors *file);
const struct safetensors_entry *safetensors_at(const struct safetensors *file, size_t index);
/* NULL: no such tensor. */
const struct safetensors_entry *safetensors_find(const struct safetensors *file, const char *name);

/* The text of a key of `__metadata__`, borrowed; NULL: not there. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);

/* Reads one tensor; fini it. */
OPD_MUST_USE opd_status safetensors_read(const struct safetensors *file, const struct safetensors_entry *entry,
                                         struct file_tensor *tensor_out, opd_error *error);

struct safetensors_item {
	const char *name;
	const opd_tensor *tensor; /* row-major, in host memory */
};

struct safetensors_text {
	const char *key;
	const char *value;
};

/* Writes a file, atomically. Names must differ; count may be 0. */
OPD_MUST_USE opd_status safetensors_write(const char *path, const struct safetensors_item *items, size_t count,
                                          const struct safetensors_text *texts, size_t text_count, opd_error *error);

#endif
