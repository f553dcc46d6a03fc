#include "proto/element.h"

#include <math.h>
#include <string.h>

/* A binary float of at most 16 bits: sign, exponent, mantissa. `infinite`: the top exponent holds infinity and NaN, as IEEE has
 * it; otherwise (e4m3fn) only its all-ones mantissa is NaN. `saturates`: overflow gives the largest finite value. */
struct format {
	int exponent_bits;
	int mantissa_bits;
	bool infinite;
	bool saturates;
};

static const struct format f16_format = {5, 10, true, false};
static const struct format bf16_format = {8, 7, true, false};
static const struct format e4m3fn_format = {4, 3, false, true};
static const struct format e5m2_format = {5, 2, true, true};

static uint32_t format_encode(const struct format *format, double value)
{
	const int bias = (1 << (format->exponent_bits - 1)) - 1;
	const uint32_t top = (1u << format->exponent_bits) - 1;
	const uint32_t ones = (1u << format->mantissa_bits) - 1;
	const uint32_t sign = (signbit(value) ? 1u : 0u) << (format->exponent_bits + format->mantissa_bits);
	const uint32_t infinity = top << format->mantissa_bits;
	/* Codes of finite numbers rise with the number, so the largest finite code is the one below infinity or NaN. */
	const uint32_t largest = format->infinite ? infinity - 1 : (infinity | ones) - 1;

	if (isnan(value)) {
		uint32_t quiet = format->infinite ? 1u << (format->mantissa_bits - 1) : ones;
		return sign | infinity | quiet;
	}
	if (isinf(value))
		return sign | (format->saturates ? largest : infinity);

	int exponent;
	double magnitude = fabs(value);
	(void)frexp(magnitude, &exponent); /* magnitude = m·2^exponent, m in [0.5, 1) */
	int unbiased = exponent - 1;
	if (unbiased < 1 - bias)
		unbiased = 1 - bias; /* subnormal: the spacing stops shrinking */
	/* In units of the last place: exact, since only the exponent changes; nearbyint then rounds once, ties to even. */
	double units = nearbyint(ldexp(magnitude, format->mantissa_bits - unbiased));
	/* A carry out of the mantissa moves into the exponent by itself: codes are consecutive. */
	uint64_t code;
	if (units < (double)(1u << format->mantissa_bits))
		code = (uint64_t)units; /* subnormal or zero */
	else
		code = ((uint64_t)(unbiased + bias - 1) << format->mantissa_bits) + (uint64_t)units;
	if (code > largest)
		code = format->saturates ? largest : infinity;
	return sign | (uint32_t)code;
}

static double format_decode(const struct format *format, uint32_t bits)
{
	const int bias = (1 << (format->exponent_bits - 1)) - 1;
	const uint32_t top = (1u << format->exponent_bits) - 1;
	const uint32_t ones = (1u << format->mantissa_bits) - 1;
	const uint32_t mantissa = bits & ones;
	const uint32_t exponent = (bits >> format->mantissa_bits) & top;
	const double sign = (bits >> (format->exponent_bits + format->mantissa_bits)) & 1 ? -1.0 : 1.0;

	if (exponent == top && format->infinite)
		return mantissa != 0 ? (double)NAN : sign * (double)INFINITY;
	if (exponent == top && mantissa == ones && !format->infinite)
		return (double)NAN;
	if (exponent == 0)
		return sign * ldexp((double)mantissa, 1 - bias - format->mantissa_bits);
	return sign * ldexp((double)(mantissa | (ones + 1)), (int)exponent - bias - format->mantissa_bits);
}

static uint32_t float_bits(float value)
{
	uint32_t bits;
	memcpy(&bits, &value, sizeof bits);
	return bits;
}

float element_f16_to_f32(uint16_t half)
{
	uint32_t sign = (uint32_t)(half & 0x8000) << 16;
	uint32_t exponent = (half >> 10) & 0x1f;
	uint32_t mantissa = half & 0x3ff;
	uint32_t bits;
	if (exponent == 0x1f) {
		bits = sign | 0x7f800000u | mantissa << 13;
	} else if (exponent != 0) {
		bits = sign | (exponent + 112) << 23 | mantissa << 13;
	} else {
		float magnitude = (float)mantissa * 0x1p-24f;
		bits = sign | float_bits(magnitude);
	}
	float value;
	memcpy(&value, &bits, sizeof value);
	return value;
}

uint16_t element_f32_to_f16(float value)
{
	uint32_t bits = float_bits(value);
	uint32_t sign = bits >> 16 & 0x8000;
	bits &= 0x7fffffffu;
	if (bits > 0x7f800000u)
		return (uint16_t)(sign | 0x7e00);
	if (bits >= 0x47800000u) /* 2^16 and up */
		return (uint16_t)(sign | 0x7c00);
	if (bits < 0x38800000u) /* under 2^-14: subnormal, in units of 2^-24 */
		return (uint16_t)format_encode(&f16_format, (double)value);
	/* The spare 13 bits round to even; a carry moves into the exponent, and from 65520 on to infinity. */
	bits += 0xfffu + (bits >> 13 & 1);
	return (uint16_t)(sign | ((bits >> 13) - (112u << 10)));
}

uint16_t element_f32_to_bf16(float value)
{
	uint32_t bits = float_bits(value);
	if ((bits & 0x7fffffffu) > 0x7f800000u)
		return (uint16_t)((bits >> 16 & 0x8000u) | 0x7fc0u);
	return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Truncates and saturates to [low, high]; NaN is 0. high + 1 is a power of two, hence exact in a double. */
static int64_t truncate_to(double value, double low, double past_high, int64_t low_integer, int64_t high_integer)
{
	if (isnan(value))
		return 0;
	if (value <= low)
		return low_integer;
	if (value >= past_high)
		return high_integer;
	return (int64_t)value;
}

#define LOAD(type)                       \
	({                                   \
		type element;                    \
		memcpy(&element, at, sizeof element); \
		element;                         \
	})
#define STORE(type, number)              \
	do {                                 \
		type element = (type)(number);   \
		memcpy(at, &element, sizeof element); \
	} while (0)

double element_load_f64(opd_dtype dtype, const void *at)
{
	switch (dtype) {
	case OPD_f16:
		return (double)element_f16_to_f32(LOAD(uint16_t));
	case OPD_bf16:
		return (double)element_bf16_to_f32(LOAD(uint16_t));
	case OPD_f32:
		return (double)LOAD(float);
	case OPD_f64:
		return LOAD(double);
	case OPD_f8_e4m3fn:
		return format_decode(&e4m3fn_format, LOAD(uint8_t));
	case OPD_f8_e5m2:
		return format_decode(&e5m2_format, LOAD(uint8_t));
	default:
		return (double)element_load_i64(dtype, at);
	}
}

float element_load_f32(opd_dtype dtype, const void *at)
{
	switch (dtype) {
	case OPD_f16:
		return element_f16_to_f32(LOAD(uint16_t));
	case OPD_bf16:
		return element_bf16_to_f32(LOAD(uint16_t));
	case OPD_f32:
		return LOAD(float);
	case OPD_i64:
		return (float)LOAD(int64_t); /* not through f64: that would round twice */
	default:
		return (float)element_load_f64(dtype, at);
	}
}

int64_t element_load_i64(opd_dtype dtype, const void *at)
{
	switch (dtype) {
	case OPD_bool:
		return LOAD(uint8_t) != 0;
	case OPD_u8:
		return LOAD(uint8_t);
	case OPD_i8:
		return LOAD(int8_t);
	case OPD_i16:
		return LOAD(int16_t);
	case OPD_i32:
		return LOAD(int32_t);
	case OPD_i64:
		return LOAD(int64_t);
	default:
		return truncate_to(element_load_f64(dtype, at), -0x1p63, 0x1p63, INT64_MIN, INT64_MAX);
	}
}

void element_store_f64(opd_dtype dtype, void *at, double value)
{
	switch (dtype) {
	case OPD_DTYPE_NONE:
		break;
	case OPD_bool:
		STORE(uint8_t, value != 0);
		break;
	case OPD_u8:
		STORE(uint8_t, truncate_to(value, 0, 0x1p8, 0, UINT8_MAX));
		break;
	case OPD_i8:
		STORE(int8_t, truncate_to(value, -0x1p7, 0x1p7, INT8_MIN, INT8_MAX));
		break;
	case OPD_i16:
		STORE(int16_t, truncate_to(value, -0x1p15, 0x1p15, INT16_MIN, INT16_MAX));
		break;
	case OPD_i32:
		STORE(int32_t, truncate_to(value, -0x1p31, 0x1p31, INT32_MIN, INT32_MAX));
		break;
	case OPD_i64:
		STORE(int64_t, truncate_to(value, -0x1p63, 0x1p63, INT64_MIN, INT64_MAX));
		break;
	case OPD_f16:
		STORE(uint16_t, format_encode(&f16_format, value));
		break;
	case OPD_bf16:
		STORE(uint16_t, format_encode(&bf16_format, value));
		break;
	case OPD_f32:
		STORE(float, value);
		break;
	case OPD_f64:
		STORE(double, value);
		break;
	case OPD_f8_e4m3fn:
		STORE(uint8_t, format_encode(&e4m3fn_format, value));
		break;
	case OPD_f8_e5m2:
		STORE(uint8_t, format_encode(&e5m2_format, value));
		break;
	}
}

void element_store_f32(opd_dtype dtype, void *at, float value)
{
	switch (dtype) {
	case OPD_f16:
		STORE(uint16_t, element_f32_to_f16(value));
		break;
	case OPD_bf16:
		STORE(uint16_t, element_f32_to_bf16(value));
		break;
	case OPD_f32:
		STORE(float, value);
		break;
	default:
		element_store_f64(dtype, at, (double)value);
	}
}

/* The double next to an i64 that is not exactly one, moved away from ties so that a second rounding to a narrower format gives what one
 * rounding would ("round to odd"): its last mantissa bit is set when bits were lost. */
static double i64_to_odd(int64_t value)
{
	uint64_t magnitude = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
	int shift = 0;
	while (magnitude >> shift >= 1ull << 53)
		shift++;
	uint64_t kept = magnitude >> shift;
	if ((kept << shift) != magnitude)
		kept |= 1;
	double result = ldexp((double)kept, shift);
	return value < 0 ? -result : result;
}

void element_store_i64(opd_dtype dtype, void *at, int64_t value)
{
	switch (dtype) {
	case OPD_DTYPE_NONE:
		break;
	case OPD_bool:
		STORE(uint8_t, value != 0);
		break;
	case OPD_u8:
	case OPD_i8:
		STORE(uint8_t, value);
		break;
	case OPD_i16:
		STORE(uint16_t, value);
		break;
	case OPD_i32:
		STORE(uint32_t, value);
		break;
	case OPD_i64:
		STORE(int64_t, value);
		break;
	case OPD_f32:
		STORE(float, value);
		break;
	case OPD_f64:
		STORE(double, value);
		break;
	default:
		element_store_f64(dtype, at, i64_to_odd(value));
	}
}
