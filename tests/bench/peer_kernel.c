/* The kernels of the peers: plain C for the compiler to vectorise, built for this machine (CMakeLists.txt). */
#include <math.h>
#include <string.h>

#include "tests/bench/peer_program.h"
#include "tests/lib/clock.h"

static const char *const names[PEER_OPS] = {"rms_norm", "relu", "probe", "keep", "fetch"};

const char *peer_op_name(peer_op op)
{
	return names[op];
}

peer_op peer_op_of(const char *name, size_t bytes)
{
	for (int op = 0; op < PEER_OPS; op++)
		if (strlen(names[op]) == bytes && memcmp(names[op], name, bytes) == 0)
			return (peer_op)op;
	return PEER_OPS;
}

size_t peer_call_inputs(const struct peer_call *call)
{
	return call->op == PEER_FETCH ? 0 : call->elements;
}

size_t peer_call_results(peer_op op, size_t elements)
{
	switch (op) {
	case PEER_PROBE:
		return 2;
	case PEER_KEEP:
		return 0;
	default:
		return elements;
	}
}

static void rms_norm(const float *restrict x, const float *restrict weight, float *restrict y, size_t elements)
{
	float sum = 0;
	for (size_t i = 0; i < elements; i++)
		sum += x[i] * x[i];
	float factor = 1 / sqrtf(sum / (float)elements + PEER_EPSILON);
	for (size_t i = 0; i < elements; i++)
		y[i] = x[i] * factor * weight[i];
}

static void relu(const float *restrict x, float *restrict y, size_t elements)
{
	for (size_t i = 0; i < elements; i++)
		y[i] = x[i] > 0 ? x[i] : 0;
}

uint64_t peer_kernel(peer_op op, const float *x, const float *kept, size_t elements, float *y, bool timed)
{
	uint64_t begin = timed ? clock_ns() : 0;
	if (op == PEER_NORM)
		rms_norm(x, kept, y, elements);
	else if (op == PEER_FETCH)
		relu(kept, y, elements);
	else if (op == PEER_PROBE)
		y[0] = x[0], y[1] = x[elements - 1];
	else
		relu(x, y, elements);
	return timed ? clock_ns() - begin : 0;
}
