// A vector of W floats for the instruction set that this translation unit is compiled for. Each kernel source is
// compiled once per instruction set into a namespace of its own. Nothing here may instantiate a standard library
// function: the linker would keep one copy for all, perhaps one that this CPU cannot run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef SGL_ISA
#define SGL_ISA baseline
#endif

namespace sgl::SGL_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

constexpr float kInf = __builtin_inff();

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint16_t VH __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

SGL_INLINE V splat(float x) { return x - V{}; }

template <class T>
SGL_INLINE T load_as(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

SGL_INLINE V load(const float* p) { return load_as<V>(p); }
SGL_INLINE V load(const bf16* p) { return (V)(__builtin_convertvector(load_as<VH>(p), VU) << 16); }

SGL_INLINE V load(const f16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VU bits = __builtin_convertvector(load_as<VH>(p), VU);
  VU magnitude = bits & 0x7fffu;
  V finite = (V)(magnitude << 13) * splat(0x1p112f);
  VU special = (magnitude << 13) | 0x7f800000u;  // inf, NaN
  VU value = (VI)(magnitude >= 0x7c00u) ? special : (VU)finite;
  return (V)(value | (bits & 0x8000u) << 16);
#endif
}

template <class T>
SGL_INLINE V load_first(const T* p, int64_t n) {  // zeros after n elements
  alignas(64) T padded[W] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
SGL_INLINE V load_upto(const T* p, int64_t n) {
  return n >= W ? load(p) : load_first(p, n);
}

SGL_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

SGL_INLINE void store_upto(float* p, V v, int64_t n) {
  if (n >= W) return store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// a > b ? a : b and a < b ? a : b: with a NaN on either side the result is b, as the instructions have it.
SGL_INLINE V greater(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

SGL_INLINE V lesser(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// NaN never becomes a maximum; it survives in the sum of exponentials.
SGL_INLINE V max_number(V best, V x) { return greater(x, best); }

SGL_INLINE float largest(V v) {
  float best = -kInf;
  for (int i = 0; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <size_t... I>
SGL_INLINE V add_neighbours(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Lane i of the result is the sum of v[i]. A tree of the same shape for each, whichever lane it ends in.
template <int N>
SGL_INLINE V sum_each(const V* v) {
  static_assert(N >= 1 && N <= W);
  V level[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) level[i] = v[i < N ? i : 0];
#pragma GCC unroll 16
  for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      level[i] = add_neighbours(level[2 * i], level[2 * i + 1], std::make_index_sequence<W>{});
  return level[0];
}

SGL_INLINE float sum(V v) {
  float s[W];
  store(s, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// e^x within 2 ulp: 0 for very small x, inf for very large, NaN kept.
SGL_INLINE V exp(V x) {
  V t = lesser(splat(128.f), greater(splat(-104.f), x));
  V shifted = t * 1.44269504088896341f + 12582912.f;  // the integer part lands in the low bits
  V n = shifted - 12582912.f;
#if defined(__FMA__) || defined(__aarch64__)
  V r = t - n * 0.69314718056f;
#else
  V r = t - n * 0.693359375f + n * 2.12194440e-4f;
#endif
  V p = splat(1.3814320554956794e-3f);
  p = p * r + 8.36885068565607e-3f;
  p = p * r + 0.041668400168418884f;
  p = p * r + 0.1666651964187622f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  V y = (V)((VI)p + ((VI)shifted << 23));
  y = x < splat(-86.f) ? V{} : y;
  y = x > splat(88.f) ? splat(kInf) : y;
  return x == x ? y : x;
#endif
}

SGL_INLINE float exp(float x) { return exp(splat(x))[0]; }

SGL_INLINE float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

SGL_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

SGL_INLINE void round_to(float* p, float x) { *p = x; }

SGL_INLINE void round_to(bf16* p, float x) {
  uint32_t bits = as_bits(x);
  p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

SGL_INLINE void round_to(f16* p, float x) {
  uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds to inf
  } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds at the right bit
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  p->bits = sign | half;
}

template <class F>
SGL_INLINE void with_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) return f(float{});
  if (dtype == Dtype::bf16) return f(bf16{});
  f(f16{});
}

}  // namespace sgl::SGL_ISA
