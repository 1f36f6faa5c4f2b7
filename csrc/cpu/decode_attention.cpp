// One new query row per request against its KV cache, split over the keys.
//
// A task owns one KV head and one block of kKeyBlock keys. It reads those rows of K and V from memory once and serves
// every query head of the group from them, up to kMaxGroup heads at a time with the queries in L1 and accumulators in
// registers. It leaves an unnormalised sum of V, the largest logit and the sum of exponentials; when a mass is wanted,
// also the exponentials, which stay in L2. The combine step, which knows the final denominator, turns the sums into the
// output and the exponentials into probabilities: 4 bytes a key and head, instead of a second pass over K.

#include "simd.h"

namespace sgl::SGL_ISA {
namespace {

constexpr int kMaxGroup = W < 8 ? W : 8;

// logits[g * kKeyBlock + key] for GB heads: W dot products at a time, GB heads by W / GB keys.
template <class T, int GB>
void group_logits(const float* q, int64_t dim, const T* k, int64_t k_slot, int64_t keys, float scale,
                  float* logits, int64_t logits_stride) {
  constexpr int KB = W / GB;
  const int64_t padded = ceil_div(dim, W) * W;
  for (int64_t key = 0; key < keys; key += KB) {
    const T* row[KB];
    for (int i = 0; i < KB; ++i) row[i] = k + (key + i < keys ? key + i : keys - 1) * k_slot;
    V acc[W] = {};
    auto step = [&](int64_t d, auto&& fetch) __attribute__((always_inline)) {
      V kv[KB];
#pragma GCC unroll 16
      for (int i = 0; i < KB; ++i) kv[i] = fetch(row[i] + d);
#pragma GCC unroll 16
      for (int g = 0; g < GB; ++g) {
        V qv = load(q + g * padded + d);
#pragma GCC unroll 16
        for (int i = 0; i < KB; ++i) acc[g * KB + i] += qv * kv[i];
      }
    };
    int64_t d = 0;
    for (; d + W <= dim; d += W) step(d, [](const T* p) { return load(p); });
    if (d < dim) step(d, [&](const T* p) { return load_first(p, dim - d); });
    float dots[W];
    store(dots, sum_each<W>(acc) * scale);
    const int64_t n = keys - key < KB ? keys - key : KB;
    for (int g = 0; g < GB; ++g)
      for (int64_t i = 0; i < n; ++i) logits[g * logits_stride + key + i] = dots[g * KB + i];
  }
}

// out[g * dim + d] = sum over keys of p[g][key] * v[key][d], for GB heads and DB vectors of d.
template <class T, int GB, int DB>
void weighted_values(const float* p, int64_t p_stride, const T* v, int64_t v_slot, int64_t keys, int64_t width,
                     float* out, int64_t out_stride) {
  V acc[GB * DB] = {};
  auto run = [&](auto&& fetch) __attribute__((always_inline)) {
    for (int64_t key = 0; key < keys; ++key) {
      V vv[DB];
#pragma GCC unroll 16
      for (int j = 0; j < DB; ++j) vv[j] = fetch(v + key * v_slot + j * W);
#pragma GCC unroll 16
      for (int g = 0; g < GB; ++g) {
        V weight = splat(p[g * p_stride + key]);
#pragma GCC unroll 16
        for (int j = 0; j < DB; ++j) acc[g * DB + j] += weight * vv[j];
      }
    }
  };
  if (width >= DB * W)
    run([](const T* x) { return load(x); });
  else
    run([&](const T* x) { return load_first(x, width); });
  for (int g = 0; g < GB; ++g)
    for (int j = 0; j < DB; ++j) store_upto(out + g * out_stride + j * W, acc[g * DB + j], width - j * W);
}

template <class T, int GB>
void group_values(const float* p, int64_t p_stride, const T* v, int64_t v_slot, int64_t keys, int64_t dim,
                  float* out, int64_t out_stride) {
  constexpr int DB = (W == 4 ? 8 : W) / GB;
  int64_t d = 0;
  for (; d + DB * W <= dim; d += DB * W)
    weighted_values<T, GB, DB>(p, p_stride, v + d, v_slot, keys, DB * W, out + d, out_stride);
  for (; d < dim; d += W)
    weighted_values<T, GB, 1>(p, p_stride, v + d, v_slot, keys, dim - d, out + d, out_stride);
}

// Turns the logits of one head into exponentials relative to their maximum; the tail of the last vector becomes 0.
void exponentials(float* row, int64_t keys, float* max_out, float* sum_out) {
  const int64_t padded = ceil_div(keys, W) * W;
  for (int64_t i = keys; i < padded; ++i) row[i] = -kInf;
  V best = splat(-kInf);
  for (int64_t i = 0; i < padded; i += W) best = max_number(best, load(row + i));
  const float max = largest(best);
  const V shift = splat(max == -kInf ? 0.f : max);  // -inf minus -inf would be NaN where softmax has 0
  V total = {};
  for (int64_t i = 0; i < padded; i += W) {
    V e = exp(load(row + i) - shift);
    store(row + i, e);
    total += e;
  }
  *max_out = max;
  *sum_out = sum(total);
}

template <class T, int GB>
void split_group(const DecodeArgs& a, int64_t b, int64_t kv, int64_t split, int64_t first, int64_t heads) {
  const int64_t begin = split * kKeyBlock;
  const int64_t keys = a.length(b) - begin < kKeyBlock ? a.length(b) - begin : kKeyBlock;
  const int64_t padded = ceil_div(a.dim, W) * W;
  alignas(64) float q[GB * kMaxHeadDim];
  for (int g = 0; g < GB; ++g) {  // a group that is not full computes its last head again
    const T* row = (const T*)a.q + b * a.q_batch + (first + (g < heads ? g : heads - 1)) * a.q_head;
    for (int64_t d = 0; d < padded; d += W) store(q + g * padded + d, load_upto(row + d, a.dim - d));
  }
  const T* k = (const T*)a.k + b * a.k_batch + kv * a.k_head + begin * a.k_slot;
  const T* v = (const T*)a.v + b * a.v_batch + kv * a.v_head + begin * a.v_slot;

  alignas(64) float tile[GB * kKeyBlock];
  group_logits<T, GB>(q, a.dim, k, a.k_slot, keys, a.scale, tile, kKeyBlock);
  const int64_t stat = (b * a.heads + first) * a.splits + split;
  for (int64_t g = 0; g < heads; ++g) {
    float* row = tile + g * kKeyBlock;
    exponentials(row, keys, a.split_max + stat + g * a.splits, a.split_scale + stat + g * a.splits);
    if (a.probs) {
      float* keep = a.probs + ((b * a.heads + first + g) * a.splits + split) * kKeyBlock;
      for (int64_t i = 0; i < keys; i += W) store(keep + i, load(row + i));
    }
  }
  alignas(64) float sums[GB * kMaxHeadDim];
  group_values<T, GB>(tile, kKeyBlock, v, a.v_slot, keys, a.dim, sums, padded);
  for (int64_t g = 0; g < heads; ++g) {
    float* out = a.partial + (stat + g * a.splits) * a.dim;
    for (int64_t d = 0; d < a.dim; d += W) store_upto(out + d, load(sums + g * padded + d), a.dim - d);
  }
}

template <class T>
void split_task(const DecodeArgs& a, int64_t b, int64_t kv, int64_t split) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t g = 0; g < group;) {
    const int64_t first = kv * group + g, left = group - g;
    if (left > 4 && kMaxGroup == 8) {
      const int64_t heads = left < 8 ? left : 8;
      split_group<T, kMaxGroup>(a, b, kv, split, first, heads);
      g += heads;
    } else if (left > 2) {
      const int64_t heads = left < 4 ? left : 4;
      split_group<T, 4>(a, b, kv, split, first, heads);
      g += heads;
    } else if (left == 2) {
      split_group<T, 2>(a, b, kv, split, first, 2);
      g += 2;
    } else {
      split_group<T, 1>(a, b, kv, split, first, 1);
      g += 1;
    }
  }
}

// Replaces split_scale by the factor that turns a split's exponentials into probabilities.
void final_factors(const float* max, float* scale, int64_t used) {
  float best = -kInf, total = 0.f;
  for (int64_t i = 0; i < used; ++i) best = max[i] > best ? max[i] : best;
  for (int64_t i = 0; i < used; ++i) total += scale[i] * exp(max[i] - best);
  for (int64_t i = 0; i < used; ++i) scale[i] = exp(max[i] - best) / total;
}

template <class T>
void combine_task(const DecodeArgs& a, int64_t b, int64_t h) {
  const int64_t used = ceil_div(a.length(b), kKeyBlock);
  const int64_t row = b * a.heads + h;
  float* factor = a.split_scale + row * a.splits;
  final_factors(a.split_max + row * a.splits, factor, used);

  T* out = (T*)a.out + row * a.dim;
  const float* partial = a.partial + row * a.splits * a.dim;
  for (int64_t d = 0; d < a.dim; d += W) {
    V acc = {};
    for (int64_t i = 0; i < used; ++i) acc += load_upto(partial + i * a.dim + d, a.dim - d) * factor[i];
    for (int64_t i = 0; i < W && d + i < a.dim; ++i) round_to(out + d + i, acc[i]);
  }
  if (!a.head_mass) return;
  const float* probs = a.probs + row * a.splits * kKeyBlock;
  float* head_mass = a.head_mass + b * a.head_mass_batch + h * a.head_mass_head;
  for (int64_t n = 0; n < a.visual.count; ++n) {
    const int64_t at = a.visual.at(b, n);
    if (at >= 0 && at < a.length(b)) head_mass[n] += probs[at] * factor[at / kKeyBlock];
  }
}

}  // namespace

void decode_split(const DecodeArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % a.splits, kv = task / a.splits % a.kv_heads, b = task / a.splits / a.kv_heads;
    if (split * kKeyBlock >= a.length(b)) continue;
    with_dtype(a.dtype, [&](auto t) { split_task<decltype(t)>(a, b, kv, split); });
  }
}

void decode_combine(const DecodeArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    with_dtype(a.dtype, [&](auto t) { combine_task<decltype(t)>(a, task / a.heads, task % a.heads); });
}

// Heads are added in their order, for all keys first: that loop is dense, the pick of the visual slots is not.
void decode_mass(const DecodeArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t length = a.length(b);
    float* total = a.key_mass + b * a.splits * kKeyBlock;
    for (int64_t i = 0; i < length; i += W) {
      const int64_t split = i / kKeyBlock;
      V acc = {};
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t row = (b * a.heads + h) * a.splits;
        acc += load(a.probs + row * kKeyBlock + i) * a.split_scale[row + split];
      }
      store(total + i, acc);
    }
    float* mass = a.mass + b * a.mass_batch;
    for (int64_t n = 0; n < a.visual.count; ++n) {
      const int64_t at = a.visual.at(b, n);
      if (at >= 0 && at < length) mass[n] += total[at];
    }
  }
}

}  // namespace sgl::SGL_ISA
