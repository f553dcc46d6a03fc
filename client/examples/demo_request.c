#include <stdlib.h>
#include <string.h>

#include "client/examples/demo.h"

opd_operand operand_of_file(const struct file_tensor *tensor)
{
	return (opd_operand){
	    .struct_bytes = sizeof(opd_operand),
	    .dtype = tensor->dtype,
	    .rank = tensor->rank,
	    .shape = tensor->shape,
	    .data = tensor->data,
	};
}

opd_operand operand_of_tensor(const opd_tensor *tensor)
{
	return (opd_operand){
	    .struct_bytes = sizeof(opd_operand),
	    .dtype = tensor->dtype,
	    .rank = tensor->rank,
	    .shape = tensor->shape,
	    .data = opd_tensor_data(tensor),
	};
}

opd_operand operand_of_ids(const struct demo_model *model)
{
	return (opd_operand){
	    .struct_bytes = sizeof(opd_operand),
	    .dtype = OPD_i32,
	    .rank = 1,
	    .shape = &model->tokens,
	    .data = model->ids,
	};
}

opd_operand operand_of_result(opd_ticket ticket)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = ticket};
}

static opd_request *create(const char *op)
{
	opd_request *request = opd_request_create(op);
	if (request == NULL) {
		(void)fputs("demo: out of memory\n", stderr);
		exit(EXIT_FAILURE);
	}
	return request;
}

opd_request *embedding_request(const struct demo_model *model)
{
	const opd_operand ids = operand_of_ids(model), table = operand_of_file(&model->table);
	opd_request *request = create("embedding");
	opd_request_tensor(request, "ids", &ids);
	opd_request_tensor(request, "table", &table);
	return request;
}

opd_request *rms_norm_request(const struct demo_model *model, const opd_operand *x)
{
	const opd_operand weight = operand_of_file(&model->norm);
	opd_request *request = create("rms_norm");
	opd_request_tensor(request, "x", x);
	opd_request_tensor(request, "weight", &weight);
	opd_request_float(request, "epsilon", DEMO_EPSILON);
	return request;
}

opd_request *linear_request(const struct demo_model *model, const opd_operand *x)
{
	const opd_operand weight = operand_of_file(&model->query);
	opd_request *request = create("linear");
	opd_request_tensor(request, "x", x);
	opd_request_tensor(request, "weight", &weight);
	return request;
}

opd_result *run(struct demo *demo, opd_request *request)
{
	opd_error error;
	opd_result *result = NULL;
	const opd_status status = opd_run(demo->client, request, &result, &error);
	opd_request_destroy(request);
	if (status == OPD_OK)
		return result;
	opd_result_destroy(result);
	(void)failed("a request", status, &error);
	return NULL;
}

bool failed(const char *what, opd_status status, const opd_error *error)
{
	(void)fflush(stdout);
	(void)fprintf(stderr, "demo: %s failed: %s: %s\n", what, opd_status_name(status), shown(error->text));
	return false;
}

bool ran_on(const opd_result *result, const char *provider)
{
	return strcmp(opd_result_provider(result), provider) == 0;
}

bool same_bits(const opd_result *a, const opd_result *b)
{
	const opd_tensor *left = opd_result_tensor(a, 0), *right = opd_result_tensor(b, 0);
	if (left == NULL || right == NULL || left->data == NULL || right->data == NULL)
		return false;
	return left->dtype == right->dtype && opd_tensor_same_shape(left, right) &&
	       memcmp(opd_tensor_data(left), opd_tensor_data(right), (size_t)left->elements * opd_dtype_bytes(left->dtype)) == 0;
}
