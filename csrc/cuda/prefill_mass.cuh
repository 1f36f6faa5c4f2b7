// Prefill mass on tensor cores, for 16-bit inputs. prefill_received is key-stationary: a block owns 16 or 32 visual slots and
// reads their keys once per query head into registers, one warp a head; the counted rows of q stream past them (from L2
// after the first block has read them), 8 at a time, and leave sums of probabilities. The block then adds its heads up in
// a fixed order. Nothing of size rows x keys is ever stored.
// Without an lse, prefill_row_statistics first reads every key up to the last counted row once per query head and 32
// rows, rows stationary in registers, and prefill_row_lse merges what the splits of kLseSplit keys found.
#pragma once

#include "fragments.cuh"

namespace sgl::cuda {

constexpr int kLseWarps = 4;
constexpr int kHeadParts = 8;  // heads are added up in this many parts, whatever the block: the order is part of the result

// Position of counted row r, or -1: an invisible row, before every key.
__device__ __forceinline__ int counted_row(const PrefillArgs& a, int request, int r) {
  const int position = r < a.query.count ? a.query.at(request, r) : -1;
  return position < a.length ? position : -1;
}
// Position of visual slot n, or INT_MAX: a key after every row.
constexpr int kNoKey = 0x7fffffff;
__device__ __forceinline__ int visual_key(const PrefillArgs& a, int request, int n) {
  const int position = n < a.visual.count ? a.visual.at(request, n) : -1;
  return position >= 0 && position < a.length ? position : kNoKey;
}
// Log of the softmax denominator of counted row r, in units of log 2.
__device__ __forceinline__ float row_lse(const PrefillArgs& a, int request, int head, int r, int position) {
  if (position < 0) return 0.0f;
  if (a.lse) return a.lse[request * a.lse_batch + head * a.lse_head + position * a.lse_row] * kLog2e;
  return a.row_lse[(static_cast<int64_t>(request) * a.heads + head) * a.query.count + r];
}
// What a key before a row receives from it; a row whose logits are all -inf gives NaN, as softmax does.
__device__ __forceinline__ float received(float logit, float lse) { return exp2_of(logit - lse); }

// received (heads, keys) in shared memory, added to head_mass and, in a fixed order, to mass.
template <int kKeys>
__device__ __forceinline__ void add_received(const PrefillArgs& a, int request, const float* all, float* parts) {
  const int key = threadIdx.x % kKeys, part = threadIdx.x / kKeys, slot = blockIdx.x * kKeys + key;
  const bool present = part < kHeadParts && visual_key(a, request, slot) != kNoKey;
  const int per_part = ceil_div(a.heads, kHeadParts);
  float sum = 0.0f;
  if (present) {
    for (int head = part * per_part; head < min(a.heads, (part + 1) * per_part); ++head) {
      const float value = all[head * kKeys + key];
      if (a.head_mass) a.head_mass[request * a.head_mass_batch + head * a.head_mass_head + slot] += value;
      sum += value;
    }
  }
  if (part < kHeadParts) parts[threadIdx.x] = sum;
  __syncthreads();
  if (part == 0 && present) {
    for (int p = 1; p < kHeadParts; ++p) sum += parts[p * kKeys + key];
    a.mass[request * a.mass_batch + slot] += sum;
  }
}

template <class T, int kDim, int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) prefill_received(const PrefillArgs a) {
  wait_for_previous_launch();
  constexpr int kKeys = 16 * kTiles;
  const int request = blockIdx.y, warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const float scale = a.scale * kLog2e;
  auto* all = reinterpret_cast<float*>(shared_memory());  // (heads, kKeys)
  int key[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) key[t][i] = visual_key(a, request, blockIdx.x * kKeys + 16 * t + row + 8 * i);

  for (int head = warp; head < a.heads; head += kWarps) {
    const T* keys = static_cast<const T*>(a.k) + request * a.k_batch + head / (a.heads / a.kv_heads) * a.k_head;
    const T* queries = static_cast<const T*>(a.q) + request * a.q_batch + head * a.q_head;
    KeyTile<T, kDim> tile[kTiles];
    float sum[kTiles][2] = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      tile[t].template load<false>(keys + key[t][0] * a.k_row, keys + key[t][1] * a.k_row, key[t][0] != kNoKey,
                                   key[t][1] != kNoKey, a.dim);
    for (int r = 0; r < a.query.count; r += 8) {
      const int own = counted_row(a, request, r + row);
      const int position[2] = {__shfl_sync(kWholeWarp, own, column * 4), __shfl_sync(kWholeWarp, own, column * 4 + 4)};
      bool any = false;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) any |= min(key[t][0], key[t][1]) <= max(position[0], position[1]);
      if (!__any_sync(kWholeWarp, any)) continue;  // causal: no key of the block comes before these rows
      QueryTile<T, kDim> query;
      query.load(queries + own * a.q_row, own >= 0, a.dim);
      const float lse[2] = {row_lse(a, request, head, r + column, position[0]),
                            row_lse(a, request, head, r + column + 1, position[1])};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float logit[4];
        query.multiply(tile[t], logit);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (key[t][i / 2] <= position[i % 2]) sum[t][i / 2] += received(logit[i] * scale, lse[i % 2]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float total = lane_sum<1, 2>(sum[t][i]);
        if (column == 0) all[head * kKeys + 16 * t + row + 8 * i] = total;
      }
  }
  __syncthreads();
  add_received<kKeys>(a, request, all, all + a.heads * kKeys);
}

template <class T, int kDim>
constexpr int kRowTiles = kDim <= 128 ? 4 : 2;

// Where the statistics of one counted row over one split lie.
__device__ __forceinline__ float* row_statistics(const PrefillArgs& a, int request, int head, int r, int split) {
  const int64_t row = (static_cast<int64_t>(request) * a.heads + head) * a.query.count + r;
  return a.statistics + 2 * (row * a.max_splits + split);
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kLseWarps, 1) prefill_row_statistics(const PrefillArgs a) {
  allow_next_launch();
  constexpr int kTiles = kRowTiles<T, kDim>, kRows = 8 * kTiles;
  const int request = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, column = lane % 4 * 2;
  const int begin = blockIdx.x * kLseSplit, end = min(a.length, begin + kLseSplit);
  const float scale = a.scale * kLog2e;
  const T* keys = static_cast<const T*>(a.k) + request * a.k_batch + head / (a.heads / a.kv_heads) * a.k_head;
  const T* queries = static_cast<const T*>(a.q) + request * a.q_batch + head * a.q_head;
  auto* largest = reinterpret_cast<float*>(shared_memory());  // (warps, kRows)
  float* sum = largest + kLseWarps * kRows;

  for (int first = 0; first < a.query.count; first += kRows) {
    QueryTile<T, kDim> query[kTiles];
    SoftmaxPair softmax[kTiles];
    int position[kTiles][2], last = -1;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int own = counted_row(a, request, first + 8 * t + row);
      query[t].load(queries + own * a.q_row, own >= 0, a.dim);
      softmax[t].start();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        position[t][i] = __shfl_sync(kWholeWarp, own, (column + i) * 4);
        last = max(last, position[t][i]);
      }
    }
    last = max(last, __shfl_xor_sync(kWholeWarp, last, 1));
    last = max(last, __shfl_xor_sync(kWholeWarp, last, 2));
    for (int key = begin + 16 * warp; key < min(end, last + 1); key += 16 * kLseWarps) {
      const int low = key + row, high = low + 8;
      KeyTile<T, kDim> tile;
      tile.template load<false>(keys + low * a.k_row, keys + high * a.k_row, low < end, high < end, a.dim);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float logit[4];
        query[t].multiply(tile, logit);
#pragma unroll
        for (int i = 0; i < 4; ++i) logit[i] *= scale;
        softmax[t].add(logit, {low <= position[t][0], low <= position[t][1], high <= position[t][0], high <= position[t][1]});
      }
    }
    __syncthreads();  // the rows before these have been merged
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      softmax[t].finish();
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (row == 0) {
          largest[warp * kRows + 8 * t + column + i] = softmax[t].largest[i];
          sum[warp * kRows + 8 * t + column + i] = softmax[t].sum[i];
        }
    }
    __syncthreads();
    if (const int r = threadIdx.x; r < kRows && first + r < a.query.count) {
      float most = largest[r], total = 0.0f;
      for (int w = 1; w < kLseWarps; ++w) most = fmaxf(most, largest[w * kRows + r]);
      for (int w = 0; w < kLseWarps; ++w) total += sum[w * kRows + r] * rescale(largest[w * kRows + r], most);
      float* statistics = row_statistics(a, request, head, first + r, blockIdx.x);
      statistics[0] = most, statistics[1] = total;
    }
  }
}

// One thread a counted row and head. Splits past the row hold nothing.
__global__ void __launch_bounds__(128) prefill_row_lse(const PrefillArgs a) {
  wait_for_previous_launch();
  const int request = blockIdx.z, head = blockIdx.y, r = blockIdx.x * 128 + threadIdx.x;
  if (r >= a.query.count) return;
  const int splits = counted_row(a, request, r) / kLseSplit + 1;
  const float* statistics = row_statistics(a, request, head, r, 0);
  float most = minus_infinity(), sum = 0.0f;
  for (int s = 0; s < splits; ++s) most = fmaxf(most, statistics[2 * s]);
  for (int s = 0; s < splits; ++s) sum += statistics[2 * s + 1] * rescale(statistics[2 * s], most);
  a.row_lse[(static_cast<int64_t>(request) * a.heads + head) * a.query.count + r] = most + log2f(sum);
}

}  // namespace sgl::cuda
