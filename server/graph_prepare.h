/* What the files that prepare a graph share: graph_prepare.c walks the nodes and chooses, graph_place.c says where tensors lie.
 *
 * Layer: server, private to them. Threads: one lane's. Life: one call of prepared_make. graph_arrange.c then says which steps run at once. */
#ifndef OPD_SERVER_GRAPH_PREPARE_H
#define OPD_SERVER_GRAPH_PREPARE_H

#include "server/graph_layout.h"
#include "server/graph_run.h"

#define BASE_ARENA 0u
#define NO_ITEM UINT32_MAX

/* Where a value lies. */
struct place {
	uint32_t base;
	uint32_t item; /* of the arena */
};

struct pending_patch {
	opd_tensor *tensor;
	struct place place;
};

/* What is only needed while preparing; in `scratch`. */
struct preparing {
	struct graph_run *run;
	struct graph *graph;
	struct prepared *prepared;
	const struct bound *operands; /* the run's */
	struct plans *plans;
	struct log *log;
	struct arena scratch;
	const opd_tensor **values; /* [value_count]: descriptions */
	struct place *places;      /* [value_count] */
	struct layout_item *items;
	uint32_t item_count;
	uint32_t item_room;
	struct layout_use *uses;
	uint32_t use_count;
	uint32_t use_room;
	struct pending_patch *patches;
	uint32_t patch_count;
	uint32_t patch_room;
	uint32_t copy_room;
	uint32_t donate_count;
	uint32_t device; /* that the nodes so far run on; 0: the CPU, or none so far */
	opd_error *error;
};

static inline opd_status prepare_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

/* Of a row-major tensor that was checked where it was described. */
static inline uint64_t prepare_bytes(const opd_tensor *tensor)
{
	return tensor->elements * opd_dtype_bytes(tensor->dtype);
}

/* Notes that the tensor's address is that of the place. False: out of memory. */
OPD_MUST_USE bool prepare_patch(struct preparing *p, opd_tensor *tensor, struct place place);
/* A step reads or writes what lies at the place; step_count: it must be there at the end. */
OPD_MUST_USE bool prepare_use(struct preparing *p, struct place place, uint32_t step);
OPD_MUST_USE bool prepare_copy(struct preparing *p, const opd_tensor *from, const opd_tensor *to);
/* In the arena; NULL: full. */
opd_tensor *prepare_tensor(struct arena *arena, const opd_tensor *tensor);

/* Describes an operand of step `step` by what it names, and notes where it lies. */
OPD_MUST_USE opd_status prepare_operand(struct preparing *p, uint32_t step, const struct op *op, struct operand *operand);
/* The step's implementation is chosen: where its results and its scratch lie. */
OPD_MUST_USE opd_status prepare_results(struct preparing *p, uint32_t index, struct step *step, const struct op *op);
/* graph_arrange.c. All steps are there: which run at once, in which order they stand, where their memory lies. */
OPD_MUST_USE opd_status prepare_arrange(struct preparing *p);

#endif
