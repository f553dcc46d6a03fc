/* The parts of provider `onednn`: the library's functions, opened at run time, and the implementations.
 *
 * Layer: providers/onednn. Threads: struct dnn doesn't change after open. A thread that creates or executes primitives calls dnn_enter first.
 * Written against the C interface of oneDNN 2.x (libdnnl.so.2). */
#ifndef OPD_ONEDNN_ONEDNN_H
#define OPD_ONEDNN_ONEDNN_H

#include <oneapi/dnnl/dnnl.h>

#include "providers/product.h"

#define DNN_FUNCTIONS(X)                                                                                                            \
	X(engine_create) X(engine_destroy) X(stream_create) X(stream_destroy) X(memory_create) X(memory_destroy)                        \
	X(memory_desc_init_by_strides) X(memory_desc_get_size) X(matmul_desc_init) X(primitive_attr_create) X(primitive_attr_destroy)   \
	X(primitive_attr_set_scratchpad_mode) X(primitive_desc_create) X(primitive_desc_destroy) X(primitive_desc_query_md)            \
	X(primitive_create) X(primitive_destroy) X(primitive_execute) X(memory_desc_init_by_tag) X(reorder_primitive_desc_create)

enum { DNN_IMPLS = 3 };

struct dnn {
	void *library;
	dnnl_engine_t engine;
	void (*set_threads)(int); /* of OpenMP, for the calling thread */
#define X(name) __typeof__(dnnl_##name) *name;
	DNN_FUNCTIONS(X)
#undef X
	bool has_bf16;     /* the processor multiplies it: elsewhere the library widens, slower than f32 */
	char missing[160]; /* why it can't be used; empty: it can */
	opd_impl impls[DNN_IMPLS];
};

/* From here on the library works on the calling thread alone. The lane's threads share a call by blocks: its own must not fight them. */
static inline void dnn_enter(const struct dnn *dnn)
{
	dnn->set_threads(1);
}

extern const opd_impl onednn_linear;
extern const opd_impl onednn_matmul;
extern const opd_impl onednn_scaled_mm;

/* The processor has instructions for bf16 products. */
bool onednn_has_bf16(void);
/* Where 8-bit products are exact: elsewhere they are summed in pairs in saturated 16 bits. NULL, or why it isn't so here. */
const char *onednn_scaled_mm_unsupported(void);

#endif
