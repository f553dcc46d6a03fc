/* The readers and writers of .npy and .safetensors: round trips, the golden cases, truncation at every byte, hostile headers.
 *
 * Run as `test_files [GOLDEN_DIRECTORY]`; prints each broken promise and exits 1 if there is one. Files are made in a fresh
 * directory under TMPDIR. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client/address.h"
#include "client/npy.h"
#include "client/safetensors.h"
#include "proto/tensor.h"

static unsigned failures;
static char directory[4096];

static bool check(bool holds, const char *promise, const char *detail)
{
	if (!holds) {
		failures++;
		(void)printf("FAIL %s (%s)\n", promise, detail);
	}
	return holds;
}

static const char *path_of(const char *name)
{
	static char path[4200];
	(void)snprintf(path, sizeof path, "%s/%s", directory, name);
	return path;
}

static void put_file(const char *path, const void *data, size_t bytes)
{
	FILE *file = fopen(path, "wb");
	if (file == NULL || fwrite(data, 1, bytes, file) != bytes || fclose(file) != 0) {
		perror(path);
		exit(2);
	}
}

static unsigned char *get_file(const char *path, size_t *bytes_out)
{
	FILE *file = fopen(path, "rb");
	struct stat status;
	if (file == NULL || fstat(fileno(file), &status) != 0) {
		perror(path);
		exit(2);
	}
	unsigned char *data = malloc((size_t)status.st_size + 1);
	*bytes_out = data == NULL ? 0 : fread(data, 1, (size_t)status.st_size, file);
	(void)fclose(file);
	return data;
}

static void make_tensor(opd_tensor *tensor, opd_dtype dtype, uint32_t rank, const int64_t *shape, int64_t *strides, void *data)
{
	tensor_row_major(rank, shape, strides);
	memset(tensor, 0, sizeof *tensor);
	tensor_describe(tensor, dtype, rank, shape, strides, 0);
	tensor->data = data;
}

static bool same(const struct file_tensor *got, const opd_tensor *want)
{
	uint64_t bytes;
	if (!tensor_bytes(want->dtype, want->rank, want->shape, &bytes) || got->dtype != want->dtype || got->rank != want->rank ||
	    got->bytes != bytes)
		return false;
	for (uint32_t i = 0; i < want->rank; i++)
		if (got->shape[i] != want->shape[i] || got->strides[i] != want->strides[i])
			return false;
	return memcmp(got->data, want->data, (size_t)bytes) == 0;
}

/* ---- Round trips ---- */

static const struct {
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
} shapes[] = {{0, {0}}, {1, {0}}, {1, {7}}, {2, {3, 5}}, {3, {2, 0, 4}}, {8, {1, 2, 1, 2, 1, 2, 1, 2}}};

static void round_trip(opd_dtype dtype, const opd_tensor *tensor)
{
	struct file_tensor read = {0};
	opd_error error = {0};
	const char *npy = path_of("t.npy");
	if (check(npy_write(npy, tensor, &error) == OPD_OK, "an .npy can be written", error.text) &&
	    check(npy_read(npy, npy_is_raw(dtype) ? dtype : OPD_DTYPE_NONE, &read, &error) == OPD_OK, "a written .npy can be read",
	          error.text))
		check(same(&read, tensor), "an .npy comes back bit for bit", opd_dtype_name(dtype));
	file_tensor_fini(&read);

	const char *path = path_of("t.safetensors");
	const struct safetensors_item items[2] = {{"out.0", tensor}, {"in.x", tensor}};
	const struct safetensors_text texts[1] = {{"note", "quote \" and \x01"}};
	struct safetensors *file = NULL;
	if (!check(safetensors_write(path, items, 2, texts, 1, &error) == OPD_OK, "a .safetensors can be written", error.text) ||
	    !check(safetensors_open(path, &file, &error) == OPD_OK, "a written .safetensors opens", error.text))
		return;
	check(safetensors_count(file) == 2 && strcmp(safetensors_metadata(file, "note"), texts[0].value) == 0, "metadata comes back",
	      "note");
	check(safetensors_metadata(file, "op") == NULL && safetensors_find(file, "out.1") == NULL, "what isn't there is NULL",
	      "op, out.1");
	const struct safetensors_entry *entry = safetensors_find(file, "in.x");
	if (check(entry != NULL && safetensors_read(file, entry, &read, &error) == OPD_OK, "a written tensor can be read",
	          error.text))
		check(same(&read, tensor), "a .safetensors comes back bit for bit", opd_dtype_name(dtype));
	file_tensor_fini(&read);
	safetensors_close(file);
}

static void test_round_trips(void)
{
	unsigned char data[1024];
	for (size_t i = 0; i < sizeof data; i++)
		data[i] = (unsigned char)(i * 37 + 11);
	for (int dtype = 1; dtype < OPD_DTYPE_COUNT; dtype++) {
		for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
			int64_t strides[OPD_RANK_MAX];
			opd_tensor tensor;
			make_tensor(&tensor, (opd_dtype)dtype, shapes[i].rank, shapes[i].shape, strides, data);
			round_trip((opd_dtype)dtype, &tensor);
		}
	}
}

/* ---- Truncation, and bytes added or changed ---- */

static bool opens(const char *path, bool npy)
{
	opd_error error = {0};
	bool good;
	if (npy) {
		struct file_tensor tensor = {0};
		good = npy_read(path, OPD_DTYPE_NONE, &tensor, &error) == OPD_OK;
		file_tensor_fini(&tensor);
	} else {
		struct safetensors *file = NULL;
		good = safetensors_open(path, &file, &error) == OPD_OK;
		for (size_t i = 0; good && i < safetensors_count(file); i++) {
			struct file_tensor tensor = {0};
			if (safetensors_read(file, safetensors_at(file, i), &tensor, &error) == OPD_OK)
				file_tensor_fini(&tensor);
		}
		safetensors_close(file);
	}
	if (!good)
		check(strstr(error.text, "bad") != NULL && strlen(error.text) > strlen(path) + 8,
		      "an error names the file and what is wrong", error.text);
	return good;
}

/* Every prefix is refused; every file with one byte more is refused; every changed byte is answered, one way or the other,
 * without a fault. */
static void damage(const char *source, bool npy)
{
	size_t bytes;
	unsigned char *data = get_file(source, &bytes);
	char path[4200];
	(void)snprintf(path, sizeof path, "%s/bad", directory);
	for (size_t cut = 0; cut < bytes; cut++) {
		put_file(path, data, cut);
		char detail[64];
		(void)snprintf(detail, sizeof detail, "%zu of %zu bytes", cut, bytes);
		check(!opens(path, npy), "a truncated file is refused", detail);
	}
	data[bytes] = 0;
	put_file(path, data, bytes + 1);
	check(!opens(path, npy), "a file with a byte too many is refused", source);
	for (size_t i = 0; i < bytes && i < 400; i++) {
		const unsigned char old = data[i];
		for (unsigned bit = 0; bit < 8; bit++) {
			data[i] = (unsigned char)(old ^ (1u << bit));
			put_file(path, data, bytes);
			(void)opens(path, npy);
		}
		data[i] = old;
	}
	free(data);
}

static void test_damage(void)
{
	float data[6] = {1, 2, 3, 4, 5, 6};
	const int64_t shape[2] = {2, 3};
	int64_t strides[2];
	opd_tensor tensor;
	make_tensor(&tensor, OPD_f32, 2, shape, strides, data);
	char path[4200];
	(void)snprintf(path, sizeof path, "%s/whole", directory);
	const struct safetensors_item items[2] = {{"a", &tensor}, {"b", &tensor}};
	opd_error error = {0};
	check(npy_write(path, &tensor, &error) == OPD_OK, "an .npy can be written", error.text);
	damage(path, true);
	check(safetensors_write(path, items, 2, NULL, 0, &error) == OPD_OK, "a .safetensors can be written", error.text);
	damage(path, false);
}

/* ---- Hostile headers ---- */

static void put_safetensors(const char *path, const char *json, uint64_t declared, size_t data_bytes)
{
	const size_t length = strlen(json);
	unsigned char *file = calloc(1, 8 + length + data_bytes);
	if (file == NULL)
		exit(2);
	const uint64_t said = declared == 0 ? length : declared;
	for (unsigned i = 0; i < 8; i++)
		file[i] = (unsigned char)(said >> (8 * i));
	memcpy(file + 8, json, length);
	put_file(path, file, 8 + length + data_bytes);
	free(file);
}

static const struct {
	const char *json;
	size_t data_bytes;
	bool good;
} headers[] = {
    {"{}", 0, true},
    {"{}   ", 0, true},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, true},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"b\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]"
     "}}",
     1, true},
    {"{\"a\":{\"dtype\":\"F4_X\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, true}, /* opens; that tensor can't be read */
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, true},
    {"", 0, false},
    {"[]", 0, false},
    {"null", 0, false},
    {"{", 0, false},
    {"{}x", 0, false},
    {"{} {}", 0, false},
    {"{}", 1, false},
    {"{\"a\":1}", 0, false},
    {"{\"a\":{}}", 0, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.5]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,8]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1e300],\"data_offsets\":[0,8]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2147483648,2147483648,4,0],\"data_offsets\":[0,8]}}", 8, false},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":\"2\",\"data_offsets\":[0,8]}}", 8, false},
    {"{\"a\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, false},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]"
     "}}",
     6, false},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]"
     "}}",
     4, false},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[6,8]"
     "}}",
     8, false},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]"
     "}}",
     8, false},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_"
     "offsets\":[1,2]}}",
     2, false},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[9223372036854775808],\"data_offsets\":[0,9223372036854775808]}}", 0, false},
    {"{\"a\":{\"dtype\":\"Z\",\"shape\":[1],\"data_offsets\":[0,18446744073709551615]}}", 0, false},
    {"{\"__metadata__\":{\"op\":\"add\"}}", 0, true},
    {"{\"__metadata__\":[]}", 0, false},
    {"{\"__metadata__\":{\"op\":1}}", 0, false},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, false},
};

static void test_hostile_safetensors(void)
{
	char path[4200];
	(void)snprintf(path, sizeof path, "%s/bad", directory);
	for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
		put_safetensors(path, headers[i].json, 0, headers[i].data_bytes);
		check(opens(path, false) == headers[i].good, headers[i].good ? "a good header is taken" : "a bad header is refused",
		      headers[i].json);
	}
	static const uint64_t lengths[] = {3,          1u << 24,   (1u << 24) + 1, 0x7fffffff,    0xffffffff,
	                                   1ull << 32, 1ull << 63, UINT64_MAX,     UINT64_MAX - 7};
	for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
		put_safetensors(path, "{}", lengths[i], 0);
		check(!opens(path, false), "a header length past the file is refused", "{}");
	}
	enum { DEPTH = 200000 };
	char *deep = malloc(DEPTH + 1);
	if (deep == NULL)
		exit(2);
	memset(deep, '[', DEPTH);
	deep[DEPTH] = '\0';
	put_safetensors(path, deep, 0, 0);
	check(!opens(path, false), "deep nesting is refused", "200000 times [");
	free(deep);
}

static void put_npy(const char *path, int version, const char *dictionary, const void *data, size_t data_bytes)
{
	unsigned char file[4096] = {0x93, 'N', 'U', 'M', 'P', 'Y', (unsigned char)version};
	const size_t length = strlen(dictionary), start = version == 1 ? 10 : 12;
	file[8] = (unsigned char)length;
	file[9] = (unsigned char)(length >> 8);
	memcpy(file + start, dictionary, length);
	if (data_bytes > 0)
		memcpy(file + start + length, data, data_bytes);
	put_file(path, file, start + length + data_bytes);
}

static const struct {
	const char *dictionary;
	size_t data_bytes;
	bool good;
} dictionaries[] = {
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n", 8, true},
    {"{\"shape\":(2 , 1),\"descr\":\"<i4\",\"fortran_order\":True}", 8, true},
    {"{'descr': '|b1', 'fortran_order': False, 'shape': ()}", 1, true},
    {"{'descr': '>f8', 'fortran_order': False, 'shape': (1L,)}", 8, true},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 5)}", 0, true},
    {"", 0, false},
    {"{}", 0, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': 2}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4)}", 0, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,2)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False}", 8, false},
    {"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}", 8, false},
    {"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", 8, false},
    {"{'descr': '<u2', 'fortran_order': False, 'shape': (4,)}", 8, false},
    {"{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", 8, false},
    {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}", 8, false},
    {"{'descr': '', 'fortran_order': False, 'shape': (2,)}", 8, false},
    {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)} x", 8, false},
    {"{'descr': '<fffffffffffffffffffffffffffffffff4', 'fortran_order': False, 'shape': (2,)}", 8, false},
};

static void test_hostile_npy(void)
{
	static const unsigned char data[8];
	char path[4200];
	(void)snprintf(path, sizeof path, "%s/bad", directory);
	for (size_t i = 0; i < sizeof dictionaries / sizeof dictionaries[0]; i++)
		for (int version = 1; version <= 3; version++) {
			put_npy(path, version, dictionaries[i].dictionary, data, dictionaries[i].data_bytes);
			check(opens(path, true) == dictionaries[i].good,
			      dictionaries[i].good ? "a good .npy is taken" : "a bad .npy is refused", dictionaries[i].dictionary);
		}
	put_npy(path, 4, dictionaries[0].dictionary, data, 8);
	check(!opens(path, true), "an unknown version is refused", "4");
}

static void test_npy_orders(void)
{
	char path[4200];
	(void)snprintf(path, sizeof path, "%s/order", directory);
	static const unsigned char big[8] = {0, 0, 0, 1, 0xff, 0xff, 0xff, 0xfe};
	struct file_tensor tensor = {0};
	opd_error error = {0};
	put_npy(path, 1, "{'descr': '>i4', 'fortran_order': False, 'shape': (2,)}", big, sizeof big);
	if (check(npy_read(path, OPD_DTYPE_NONE, &tensor, &error) == OPD_OK, "big-endian can be read", error.text))
		check(((int32_t *)tensor.data)[0] == 1 && ((int32_t *)tensor.data)[1] == -2, "big-endian is swapped", "1, -2");
	file_tensor_fini(&tensor);
	put_npy(path, 1, "{'descr': '|i1', 'fortran_order': True, 'shape': (2, 4)}", big, sizeof big);
	if (check(npy_read(path, OPD_DTYPE_NONE, &tensor, &error) == OPD_OK, "Fortran order can be read", error.text))
		check(tensor.strides[0] == 1 && tensor.strides[1] == 2, "Fortran order is strides", "1, 2");
	file_tensor_fini(&tensor);
	put_npy(path, 1, "{'descr': '<V2', 'fortran_order': False, 'shape': (4,)}", big, sizeof big);
	check(npy_read(path, OPD_bf16, &tensor, &error) == OPD_OK && tensor.dtype == OPD_bf16, "raw words are bf16 when asked for",
	      error.text);
	file_tensor_fini(&tensor);
	check(npy_read(path, OPD_f32, &tensor, &error) == OPD_INVALID_ARGUMENT, "raw words of another size are refused", "f32");
}

/* ---- Files that aren't ---- */

static void test_odd_paths(void)
{
	struct file_tensor tensor = {0};
	opd_error error = {0};
	check(npy_read(path_of("nothing"), OPD_DTYPE_NONE, &tensor, &error) == OPD_NOT_FOUND, "a missing file is NOT_FOUND",
	      error.text);
	check(npy_read(directory, OPD_DTYPE_NONE, &tensor, &error) == OPD_INVALID_ARGUMENT, "a directory is refused", error.text);
	check(npy_read("/dev/zero", OPD_DTYPE_NONE, &tensor, &error) == OPD_INVALID_ARGUMENT, "a device is refused", error.text);
	char fifo[4200];
	(void)snprintf(fifo, sizeof fifo, "%s/fifo", directory);
	if (mkfifo(fifo, 0600) == 0)
		check(npy_read(fifo, OPD_DTYPE_NONE, &tensor, &error) == OPD_INVALID_ARGUMENT, "a FIFO is refused without waiting",
		      error.text);
	float one = 1;
	int64_t shape[1] = {1}, strides[1];
	opd_tensor tensor1;
	make_tensor(&tensor1, OPD_f32, 1, shape, strides, &one);
	check(npy_write("/dev/null", &tensor1, &error) == OPD_INVALID_ARGUMENT, "a device isn't replaced", error.text);
	check(npy_write(directory, &tensor1, &error) == OPD_INVALID_ARGUMENT, "a directory isn't replaced", error.text);
	check(npy_write(path_of("no/such/y.npy"), &tensor1, &error) == OPD_NOT_FOUND, "a missing folder is NOT_FOUND", error.text);
	const struct safetensors_item twice[2] = {{"a", &tensor1}, {"a", &tensor1}};
	check(safetensors_write(path_of("twice"), twice, 2, NULL, 0, &error) == OPD_INVALID_ARGUMENT,
	      "a name given twice isn't written", error.text);
	check(access(path_of("twice"), F_OK) != 0, "a refused write leaves no file", "twice");
}

static void test_golden(const char *golden)
{
	DIR *folder = opendir(golden);
	if (!check(folder != NULL, "the golden folder is there", golden))
		return;
	unsigned count = 0;
	for (struct dirent *item; (item = readdir(folder)) != NULL;) {
		if (strstr(item->d_name, ".safetensors") == NULL)
			continue;
		char path[4200];
		(void)snprintf(path, sizeof path, "%s/%s", golden, item->d_name);
		struct safetensors *file = NULL;
		opd_error error = {0};
		count++;
		if (!check(safetensors_open(path, &file, &error) == OPD_OK, "every golden case opens", error.text))
			continue;
		check(safetensors_metadata(file, "op") != NULL && safetensors_metadata(file, "attrs") != NULL,
		      "a case names op and attrs", item->d_name);
		for (size_t i = 0; i < safetensors_count(file); i++) {
			struct file_tensor tensor = {0};
			check(safetensors_read(file, safetensors_at(file, i), &tensor, &error) == OPD_OK, "every golden tensor can be read",
			      error.text);
			file_tensor_fini(&tensor);
		}
		safetensors_close(file);
	}
	(void)closedir(folder);
	check(count > 0, "the golden folder has cases", golden);
}

static void test_address(void)
{
	char text[64];
	(void)setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
	address_default(text, sizeof text);
	check(strcmp(text, "unix:/run/user/7/opd.sock") == 0, "XDG_RUNTIME_DIR decides the default address", text);
	(void)unsetenv("XDG_RUNTIME_DIR");
	address_default_socket(text, sizeof text);
	char want[64] = "/run/opd/opd.sock";
	if (geteuid() != 0)
		(void)snprintf(want, sizeof want, "/tmp/opd-%lu/opd.sock", (unsigned long)geteuid());
	check(strcmp(text, want) == 0, "without it root's and others' sockets differ", text);
}

static void remove_directory(void)
{
	static const char *const names[] = {"t.npy", "t.safetensors", "bad", "whole", "order", "fifo"};
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
		(void)unlink(path_of(names[i]));
	check(rmdir(directory) == 0, "nothing is left behind, no temporary file either", directory);
}

int main(int argc, char **argv)
{
	const char *base = getenv("TMPDIR");
	(void)snprintf(directory, sizeof directory, "%s/opd-files-XXXXXX", base == NULL ? "/tmp" : base);
	if (mkdtemp(directory) == NULL) {
		perror(directory);
		return 2;
	}
	test_round_trips();
	test_damage();
	test_hostile_safetensors();
	test_hostile_npy();
	test_npy_orders();
	test_odd_paths();
	test_address();
	test_golden(argc > 1 ? argv[1] : "tests/golden");
	remove_directory();
	(void)printf("%s\n", failures == 0 ? "all promises hold" : "some promises are broken");
	return failures == 0 ? 0 : 1;
}
