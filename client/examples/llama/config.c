/* What a model's config.json says. */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/examples/llama/llama.h"
#include "client/file_tensor.h"

#define CONFIG_BYTES_MAX (1u << 20)
#define WHOLE_MAX (1 << 24)

struct reading {
	const char *path;
	const cJSON *root;
	opd_error *error;
	opd_status status;
};

/* Absent or null. */
static bool absent(const struct reading *reading, const char *key)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(reading->root, key);
	return item == NULL || cJSON_IsNull(item);
}

static void read_number(struct reading *reading, const char *key, double low, double high, const double *fallback, double *out)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(reading->root, key);
	if (reading->status != OPD_OK)
		return;
	if (absent(reading, key) && fallback != NULL)
		*out = *fallback;
	else if (!cJSON_IsNumber(item) || !(item->valuedouble >= low && item->valuedouble <= high))
		reading->status = opd_fail(reading->error, OPD_INVALID_ARGUMENT, "%s: %s is %s, expected a number from %g to %g", reading->path, key,
		                           item == NULL ? "missing" : cJSON_IsNumber(item) ? "out of range" : "no number", low, high);
	else
		*out = item->valuedouble;
}

/* fallback 0: none. */
static int64_t read_whole(struct reading *reading, const char *key, int64_t high, int64_t fallback)
{
	const double instead = (double)fallback;
	double value = 0;
	read_number(reading, key, 1, (double)high, fallback == 0 ? NULL : &instead, &value);
	if (reading->status == OPD_OK && value != floor(value))
		reading->status = opd_fail(reading->error, OPD_INVALID_ARGUMENT, "%s: %s is %g, expected a whole number", reading->path, key, value);
	return (int64_t)value;
}

static bool read_flag(const struct reading *reading, const char *key)
{
	return cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(reading->root, key));
}

static bool says(const struct reading *reading, const char *key, const char *text)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(reading->root, key);
	return cJSON_IsString(item) && strcmp(item->valuestring, text) == 0;
}

static void read_eos(struct reading *reading, struct llama_config *config)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(reading->root, "eos_token_id");
	if (cJSON_IsNumber(item))
		config->eos[config->eos_count++] = (int64_t)item->valuedouble;
	const cJSON *entry;
	cJSON_ArrayForEach(entry, item)
		if (cJSON_IsNumber(entry) && config->eos_count < LLAMA_EOS_MAX)
			config->eos[config->eos_count++] = (int64_t)entry->valuedouble;
}

/* What would change the result and isn't done here is refused. */
static void refuse_variants(struct reading *reading)
{
	const char *what = NULL;
	if (!absent(reading, "hidden_act") && !says(reading, "hidden_act", "silu"))
		what = "hidden_act other than silu";
	else if (!absent(reading, "rope_scaling"))
		what = "rope_scaling";
	else if (read_flag(reading, "attention_bias") || read_flag(reading, "mlp_bias"))
		what = "attention_bias or mlp_bias";
	else if (!absent(reading, "sliding_window"))
		what = "sliding_window";
	else if (!absent(reading, "model_type") && !says(reading, "model_type", "llama"))
		what = "model_type other than llama";
	if (what != NULL && reading->status == OPD_OK)
		reading->status = opd_fail(reading->error, OPD_UNIMPLEMENTED, "%s: %s isn't supported", reading->path, what);
}

static opd_status read_fields(struct reading *reading, struct llama_config *config)
{
	static const double theta = 10000;
	refuse_variants(reading);
	config->hidden = read_whole(reading, "hidden_size", WHOLE_MAX, 0);
	config->intermediate = read_whole(reading, "intermediate_size", WHOLE_MAX, 0);
	config->layers = read_whole(reading, "num_hidden_layers", LLAMA_LAYERS_MAX, 0);
	config->heads = read_whole(reading, "num_attention_heads", 4096, 0);
	config->kv_heads = read_whole(reading, "num_key_value_heads", 4096, config->heads == 0 ? 1 : config->heads);
	config->vocabulary = read_whole(reading, "vocab_size", WHOLE_MAX, 0);
	config->positions = read_whole(reading, "max_position_embeddings", WHOLE_MAX, 0);
	read_number(reading, "rms_norm_eps", 0, 1, NULL, &config->epsilon);
	read_number(reading, "rope_theta", 1, 1e12, &theta, &config->theta);
	if (reading->status != OPD_OK)
		return reading->status;
	const int64_t divided = config->hidden / config->heads;
	config->head_dim = read_whole(reading, "head_dim", 4096, divided == 0 ? 1 : divided);
	config->tied = read_flag(reading, "tie_word_embeddings");
	config->bytes = says(reading, "tokenizer", "bytes");
	read_eos(reading, config);
	if (reading->status == OPD_OK && (config->heads % config->kv_heads != 0 || config->head_dim % 2 != 0))
		return opd_fail(reading->error, OPD_INVALID_ARGUMENT, "%s: %lld heads of %lld, %lld of keys: expected a multiple of the latter, and an even size",
		                reading->path, (long long)config->heads, (long long)config->head_dim, (long long)config->kv_heads);
	if (reading->status == OPD_OK && config->bytes && config->vocabulary < 256)
		return opd_fail(reading->error, OPD_INVALID_ARGUMENT, "%s: vocab_size is %lld, expected 256 or more where a token is a byte", reading->path,
		                (long long)config->vocabulary);
	return reading->status;
}

/* The file's text, to be freed. */
static opd_status read_text(const char *path, char **text_out, opd_error *error)
{
	int fd;
	uint64_t bytes;
	opd_status status = file_open(path, &fd, &bytes, error);
	if (status != OPD_OK)
		return status;
	char *text = bytes > CONFIG_BYTES_MAX ? NULL : malloc(bytes + 1);
	if (bytes > CONFIG_BYTES_MAX)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s has %llu bytes, at most %u", path, (unsigned long long)bytes, CONFIG_BYTES_MAX);
	else if (text == NULL)
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	else
		status = file_read_at(fd, path, 0, text, bytes, error);
	(void)close(fd);
	if (status != OPD_OK) {
		free(text);
		return status;
	}
	text[bytes] = '\0';
	*text_out = text;
	return OPD_OK;
}

opd_status llama_read_config(const char *folder, struct llama_config *config_out, opd_error *error)
{
	char path[4096];
	char *text;
	const char *end = strrchr(folder, '.');
	const bool file = end != NULL && strcmp(end, ".json") == 0;
	if (snprintf(path, sizeof path, "%s%s", folder, file ? "" : "/config.json") >= (int)sizeof path)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "model: the folder's name has more than %zu bytes", sizeof path);
	opd_status status = read_text(path, &text, error);
	if (status != OPD_OK)
		return status;
	cJSON *root = cJSON_Parse(text);
	free(text);
	struct reading reading = {.path = path, .root = root, .error = error, .status = OPD_OK};
	*config_out = (struct llama_config){0};
	status = cJSON_IsObject(root) ? read_fields(&reading, config_out) : opd_fail(error, OPD_INVALID_ARGUMENT, "%s: no JSON object", path);
	cJSON_Delete(root);
	return status;
}
