/* Element types: numbers of the wire and of the provider ABI, names, sizes.
 *
 * Layer: proto, public (installed as opd/dtype.h), header only. Threads: pure.
 * Not here: conversion between them (providers/ops/convert.h). */
#ifndef OPD_DTYPE_H
#define OPD_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* X(name, number, bytes, safetensors name). Numbers go on the wire and never change. bool is one byte: any non-zero is true,
 * written as 1. */
#define OPD_DTYPE_MAP(X)         \
	X(bool, 1, 1, "BOOL")        \
	X(u8, 2, 1, "U8")            \
	X(i8, 3, 1, "I8")            \
	X(i16, 4, 2, "I16")          \
	X(i32, 5, 4, "I32")          \
	X(i64, 6, 8, "I64")          \
	X(f16, 7, 2, "F16")          \
	X(bf16, 8, 2, "BF16")        \
	X(f32, 9, 4, "F32")          \
	X(f64, 10, 8, "F64")         \
	X(f8_e4m3fn, 11, 1, "F8_E4M3") \
	X(f8_e5m2, 12, 1, "F8_E5M2")

typedef enum opd_dtype {
	OPD_DTYPE_NONE = 0, /* no dtype: never that of a tensor */
#define X(name, number, bytes, safetensors) OPD_##name = number,
	OPD_DTYPE_MAP(X)
#undef X
} opd_dtype;

#define OPD_DTYPE_COUNT 13 /* numbers 0 to 12 */

static inline bool opd_dtype_valid(int64_t number)
{
	return number > 0 && number < OPD_DTYPE_COUNT;
}

/* Bytes of one element; 0 for a number that is no dtype. */
static inline size_t opd_dtype_bytes(opd_dtype dtype)
{
	switch (dtype) {
	case OPD_DTYPE_NONE:
		return 0;
#define X(name, number, bytes, safetensors) \
	case OPD_##name:                        \
		return bytes;
		OPD_DTYPE_MAP(X)
#undef X
	}
	return 0;
}

/* "bf16"; "invalid" for a number that is no dtype. */
static inline const char *opd_dtype_name(opd_dtype dtype)
{
	switch (dtype) {
	case OPD_DTYPE_NONE:
		break;
#define X(name, number, bytes, safetensors) \
	case OPD_##name:                        \
		return #name;
		OPD_DTYPE_MAP(X)
#undef X
	}
	return "invalid";
}

/* The dtype of a catalogue name ("f8_e4m3fn"); OPD_DTYPE_NONE when none has it. */
static inline opd_dtype opd_dtype_parse(const char *text)
{
#define X(name, number, bytes, safetensors) \
	if (strcmp(text, #name) == 0)           \
		return OPD_##name;
	OPD_DTYPE_MAP(X)
#undef X
	return OPD_DTYPE_NONE;
}

/* f16, bf16, f32, f64: what the catalogue calls a float dtype. */
static inline bool opd_dtype_is_float(opd_dtype dtype)
{
	return dtype == OPD_f16 || dtype == OPD_bf16 || dtype == OPD_f32 || dtype == OPD_f64;
}

static inline bool opd_dtype_is_f8(opd_dtype dtype)
{
	return dtype == OPD_f8_e4m3fn || dtype == OPD_f8_e5m2;
}

/* u8, i8, i16, i32, i64 */
static inline bool opd_dtype_is_integer(opd_dtype dtype)
{
	return dtype >= OPD_u8 && dtype <= OPD_i64;
}

#endif
