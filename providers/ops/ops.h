/* The op catalogue, version 1: one file a family, each with schema, shape function, content check, input generator, tolerances, doc and
 * native kernel of its ops.
 *
 * Layer: providers, internal to the native module. Threads: constants and pure functions.
 * To add an op: write its `const opd_op`, put its address into its family's list. Nothing else knows it by name. */
#ifndef OPD_PROVIDERS_OPS_OPS_H
#define OPD_PROVIDERS_OPS_OPS_H

#include "providers/provider.h"

/* Families, NULL-terminated lists, in the order in which `opctl ops` shows them. */
extern const opd_op *const ops_norm[];        /* norm.c: rms_norm, fused_add_rms_norm, layer_norm */
extern const opd_op *const ops_activation[];  /* activation.c: silu_and_mul … sigmoid, gelu_and_mul_sparse */
extern const opd_op *const ops_elementwise[]; /* elementwise.c: add, sub, mul, cast */
extern const opd_op *const ops_reduce[];      /* reduce.c: softmax, argmax, topk */
extern const opd_op *const ops_matmul[];      /* matmul.c: linear, matmul, scaled_mm */
extern const opd_op *const ops_position[];    /* position.c: embedding, rotary_embedding */
extern const opd_op *const ops_attention[];   /* attention.c: attention, paged_attention, reshape_and_cache */
extern const opd_op *const ops_quant[];       /* quant.c: static_quant_fp8, dynamic_quant_fp8 */

#endif
