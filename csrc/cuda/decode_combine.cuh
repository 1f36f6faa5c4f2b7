// The second and last launch of decode attention: merges the splits of each head, and folds in the mass. Blocks come
// in two kinds: the first `heads` of a request write one row of `out` each (they read its partial outputs once); the
// rest own 64 visual slots each, read the logits that the splits left at those slots once, and add probabilities to
// head_mass and, over the heads in a fixed order, to mass. Every block merges the statistics it needs by itself, so the
// mass takes no launch of its own.
#pragma once

#include "primitives.cuh"

namespace sgl::cuda {

constexpr int kCombineThreads = 256, kCombineWarps = kCombineThreads / 32;
constexpr int kMassSlots = 64, kMassParts = kCombineThreads / kMassSlots;  // heads are added up in this many parts
static_assert(kMaxSplits == 64, "a lane merges two splits");

// The largest logit of a head and the sum of 2^(logit - largest) over its keys, the same in every lane of a warp.
__device__ __forceinline__ float2 merge_statistics(const DecodeArgs& a, int64_t head_row, int splits) {
  const auto* statistics = reinterpret_cast<const float2*>(a.statistics) + head_row * a.max_splits;
  const int lane = threadIdx.x % 32;
  const float2 empty = make_float2(minus_infinity(), 0.0f);
  const float2 first = lane < splits ? statistics[lane] : empty;
  const float2 second = lane + 32 < splits ? statistics[lane + 32] : empty;
  const float most = lane_max<1, 2, 4, 8, 16>(fmaxf(first.x, second.x));
  const float sum = first.y * rescale(first.x, most) + second.y * rescale(second.x, most);
  return make_float2(most, lane_sum<1, 2, 4, 8, 16>(sum));
}

template <class T>
__device__ void combine_output(const DecodeArgs& a, int request, int head, int length) {
  auto* factor = reinterpret_cast<float*>(shared_memory());  // (kMaxSplits)
  float* parts = factor + kMaxSplits;                        // (kCombineThreads, 4)
  const int splits = num_splits(length);
  const int64_t row = static_cast<int64_t>(request) * a.heads + head;
  T* out = static_cast<T*>(a.out) + row * a.dim;
  if (length == 0) {
    for (int d = threadIdx.x; d < a.dim; d += blockDim.x) out[d] = from_float<T>(0.0f);
    return;
  }
  if (threadIdx.x < 32) {
    const float2 total = merge_statistics(a, row, splits);
    for (int s = threadIdx.x; s < splits; s += 32)
      factor[s] = rescale(a.statistics[2 * (row * a.max_splits + s)], total.x) / total.y;
  }
  __syncthreads();
  // As many groups of threads as fit a row each take every so many-th split; then the first adds the groups up.
  const int lanes = ceil_div(a.dim, 4), groups = kCombineThreads / lanes;
  const int group = threadIdx.x / lanes, first = threadIdx.x % lanes * 4;
  float sum[4] = {};
  if (group < groups) {
#pragma unroll 4
    for (int s = group; s < splits; s += groups) {
      const float* partial = a.partial + (row * a.max_splits + s) * a.dim + first;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (first + e < a.dim) sum[e] = fmaf(partial[e], factor[s], sum[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) parts[threadIdx.x * 4 + e] = sum[e];
  __syncthreads();
  for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
    float value = 0.0f;
    for (int g = 0; g < groups; ++g) value += parts[g * lanes * 4 + d];
    out[d] = from_float<T>(value);
  }
}

__device__ __forceinline__ void combine_mass(const DecodeArgs& a, int request, int tile, int length) {
  auto* total = reinterpret_cast<float2*>(shared_memory());                // (heads): largest logit, 1 / sum
  auto* parts = reinterpret_cast<float*>(total + a.heads);                 // (kMassParts, kMassSlots)
  const int warp = threadIdx.x / 32;
  for (int head = warp; head < a.heads; head += kCombineWarps) {
    const float2 merged = merge_statistics(a, static_cast<int64_t>(request) * a.heads + head, num_splits(length));
    if (threadIdx.x % 32 == 0) total[head] = make_float2(merged.x, 1.0f / merged.y);
  }
  __syncthreads();
  const int slot = tile * kMassSlots + threadIdx.x % kMassSlots, part = threadIdx.x / kMassSlots;
  const int position = slot < static_cast<int>(a.visual.count) ? a.visual.at(request, slot) : -1;
  const bool seen = position >= 0 && position < length;
  const int per_part = ceil_div(a.heads, kMassParts);
  float sum = 0.0f;
  if (seen) {
    const float* logits = a.logits + static_cast<int64_t>(request) * a.heads * a.slots + position;
#pragma unroll 4
    for (int head = part * per_part; head < min(a.heads, (part + 1) * per_part); ++head) {
      const float prob = exp2_of(logits[static_cast<int64_t>(head) * a.slots] - total[head].x) * total[head].y;
      if (a.head_mass)
        a.head_mass[request * a.head_mass_batch + head * a.head_mass_head + slot] += prob;
      sum += prob;
    }
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (part == 0 && seen && a.mass) {
    for (int p = 1; p < kMassParts; ++p) sum += parts[p * kMassSlots + slot % kMassSlots];
    a.mass[request * a.mass_batch + slot] += sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads) decode_combine(const DecodeArgs a) {
  wait_for_previous_launch();
  const int request = blockIdx.y, length = a.length(request), block = blockIdx.x;
  if (block < a.heads)
    combine_output<T>(a, request, block, length);
  else
    combine_mass(a, request, block - a.heads, length);
}

inline int combine_shared(const DecodeArgs& a) {
  const int output = (kMaxSplits + 4 * kCombineThreads) * static_cast<int>(sizeof(float));
  const int mass = a.heads * static_cast<int>(sizeof(float2)) + kCombineThreads * static_cast<int>(sizeof(float));
  return max_of(output, a.logits ? mass : 0);
}

}  // namespace sgl::cuda
