/* The smallest useful client: opd-hello [ADDRESS]. The root README shows its middle. */
#include <ctype.h>
#include <stdio.h>

#include "opd/client.h"
#include "opd/embedded.h"

/* Texts of a daemon may quote anybody: no control character of theirs gets to the terminal. */
static int fail(opd_status status, const opd_error *error)
{
	fprintf(stderr, "%s: ", opd_status_name(status));
	for (const char *at = error->text; *at != '\0'; at++)
		fputc(isprint((unsigned char)*at) ? *at : '?', stderr);
	fputc('\n', stderr);
	return 1;
}

static int hello(opd_client *client)
{
	float x[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}}, weight[4] = {1, 1, 1, 1};

	opd_request *request = opd_request_create("rms_norm");
	if (request == NULL)
		return 1;
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, 2, 4));
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, weight, 4));
	opd_request_float(request, "epsilon", 1e-5);
	opd_request_priority(request, (const char *const[]){"cpu", "native"}, 2);

	opd_error error;
	opd_result *result;
	opd_status status = opd_run(client, request, &result, &error);
	if (status == OPD_OK) {
		const float *y = opd_tensor_data(opd_result_tensor(result, 0));
		printf("%.4f %.4f %.4f %.4f …\n", y[0], y[1], y[2], y[3]);
	}
	opd_result_destroy(result);
	opd_request_destroy(request);
	return status == OPD_OK ? 0 : fail(status, &error);
}

int main(int argc, char **argv)
{
	opd_embedded_register(); /* for "embedded:"; a client of daemons alone leaves it out, and links libopd only */
	opd_client *client;
	opd_error error;
	opd_status status = opd_connect(argc > 1 ? argv[1] : "embedded:", NULL, &client, &error);
	if (status != OPD_OK)
		return fail(status, &error);
	int code = hello(client);
	opd_close(client);
	return code;
}
