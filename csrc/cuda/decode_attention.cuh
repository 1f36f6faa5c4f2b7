// Decode attention on tensor cores, for 16-bit inputs. A block of four warps owns one split of one request's keys and up
// to 16 query heads of one KV head: it reads that part of K and V once, straight into registers, and the queries once.
// Resident per warp: 16 keys and values, the query fragments, the running output of its heads (fp32). Each split writes
// its unnormalised output, its softmax statistics and, when a mass is wanted, its logits; the combine step in
// decode_combine.cuh reads those once.
#pragma once

#include "fragments.cuh"

namespace sgl::cuda {

constexpr int kDecodeWarps = 4;

// Where a block stands: request, KV head, the query heads from `head` on (`heads` of them), keys [begin, end).
struct Split {
  int request, kv_head, head, heads, index, begin, end;

  template <int kHeads>
  static __device__ __forceinline__ Split of_block(const DecodeArgs& a) {
    const int group = a.heads / a.kv_heads, tiles = ceil_div(group, kHeads);
    const int tile = blockIdx.y % tiles, length = a.length(blockIdx.z), size = split_keys(length);
    Split s;
    s.request = blockIdx.z, s.kv_head = blockIdx.y / tiles;
    s.head = s.kv_head * group + tile * kHeads;
    s.heads = min(kHeads, group - tile * kHeads);
    s.index = blockIdx.x, s.begin = s.index * size, s.end = min(length, s.begin + size);
    return s;
  }
};

// Where the scratch of one head of a split lies.
__device__ __forceinline__ int64_t split_row(const DecodeArgs& a, const Split& s, int head) {
  return (static_cast<int64_t>(s.request) * a.heads + s.head + head) * a.max_splits + s.index;
}

// The running output of 8 heads over kDim dimensions. acc[p][j] is an mma accumulator: rows are dimensions
// 128 p + 8 (lane / 4) + j and 64 more, columns the heads 2 (lane % 4) and 2 (lane % 4) + 1.
template <int kDim>
struct OutputTile {
  static constexpr int kPairs = ceil_div(kDim, 128);
  float acc[kPairs][8][4];

  __device__ __forceinline__ void scale(float first, float second) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        acc[p][j][0] *= first, acc[p][j][1] *= second;
        acc[p][j][2] *= first, acc[p][j][3] *= second;
      }
  }
  // f(dimension, column, value) for each element that this lane holds.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (kDim > 64 || i < 2) f(128 * p + 64 * (i / 2) + 8 * row + j, column + i % 2, acc[p][j][i]);
  }
};

// 16 values of a warp, 128 dimensions from 128 * pair on: of each 64 of them the lane holds 8 (lane / 4) .. + 8 of keys
// 2 (lane % 4) + {0, 1, 8, 9}.
template <class T, int kDim>
struct ValueTile {
  static constexpr int kHalves = kDim == 64 ? 1 : 2;
  uint4 piece[kHalves][4];

  __device__ __forceinline__ void load(const T* values, int64_t stride, int key, int end, int dim, int pair) {
    const int first = 128 * pair + threadIdx.x % 32 / 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = key + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
        piece[h][i] = load_piece<T, true, true>(values + k * stride, 64 * h + first, dim, k < end);
    }
  }
  // Adds values times probabilities; `low` and `high` hold the pairs of heads of keys lane / 4 and lane / 4 + 8.
  __device__ __forceinline__ void accumulate(float (&acc)[8][4], uint32_t low, uint32_t high) const {
    const uint32_t b0 = transpose8x8(low), b1 = transpose8x8(high);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t a0 = two_keys(piece[0][0], piece[0][1], j), a2 = two_keys(piece[0][2], piece[0][3], j);
      uint32_t a1 = 0, a3 = 0;
      if constexpr (kHalves > 1) a1 = two_keys(piece[1][0], piece[1][1], j), a3 = two_keys(piece[1][2], piece[1][3], j);
      mma<T>(acc[j], a0, a1, a2, a3, b0, b1);
    }
  }

 private:
  // Element j of two pieces side by side.
  static __device__ __forceinline__ uint32_t two_keys(const uint4& a, const uint4& b, int j) {
    const uint32_t from_a = j < 2 ? a.x : j < 4 ? a.y : j < 6 ? a.z : a.w;
    const uint32_t from_b = j < 2 ? b.x : j < 4 ? b.y : j < 6 ? b.z : b.w;
    return __byte_perm(from_a, from_b, j % 2 ? 0x7632 : 0x5410);
  }
};

// Where dimension d of a row lies in shared memory: what the lanes of a warp write at once, dimensions 8 apart of columns
// 2 apart, goes to 32 different banks.
__device__ __forceinline__ int bank_order(int d) { return (d & ~63) + d % 8 * 8 + d / 8 % 8; }

// Merges what the warps of a block hold of 8 * kTiles heads, in the order of the warps, and writes it as one split.
// Output::each(f) calls f(dimension, head of the tile, value) for what a lane holds.
template <int kTiles, int kDim, class Output>
__device__ __forceinline__ void write_split(const DecodeArgs& a, const Split& s, const Output (&out)[kTiles],
                            const SoftmaxPair (&softmax)[kTiles]) {
  constexpr int kHeads = 8 * kTiles, kStride = kDim + 4;
  auto* largest = reinterpret_cast<float*>(shared_memory());  // (warps, heads), as the two below
  float* sum = largest + kDecodeWarps * kHeads;
  float* factor = sum + kDecodeWarps * kHeads;
  float* merged = factor + kDecodeWarps * kHeads;  // (heads, kStride)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the kernel may have used shared memory
  if (lane < 4) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest[warp * kHeads + 8 * t + 2 * lane + i] = softmax[t].largest[i];
        sum[warp * kHeads + 8 * t + 2 * lane + i] = softmax[t].sum[i];
      }
  }
  __syncthreads();
  if (threadIdx.x < kHeads) {
    const int head = threadIdx.x;
    float most = largest[head], total = 0.0f;
    for (int w = 1; w < kDecodeWarps; ++w) most = fmaxf(most, largest[w * kHeads + head]);
    for (int w = 0; w < kDecodeWarps; ++w) {
      factor[w * kHeads + head] = rescale(largest[w * kHeads + head], most);
      total += sum[w * kHeads + head] * factor[w * kHeads + head];
    }
    if (head < s.heads) {
      float* statistics = a.statistics + 2 * split_row(a, s, head);
      statistics[0] = most, statistics[1] = total;
    }
  }
  __syncthreads();
  for (int w = 0; w < kDecodeWarps; ++w) {
    if (warp == w) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        out[t].each([&](int dimension, int column, float value) {
          float& place = merged[(8 * t + column) * kStride + bank_order(dimension)];
          const float moved = value * factor[w * kHeads + 8 * t + column];
          place = w == 0 ? moved : place + moved;
        });
    }
    __syncthreads();
  }
  for (int head = warp; head < s.heads; head += kDecodeWarps) {
    float* partial = a.partial + split_row(a, s, head) * a.dim;
    for (int d = lane; d < a.dim; d += 32) partial[d] = merged[head * kStride + bank_order(d)];
  }
}

template <int kTiles, int kDim>
constexpr int kDecodeShared = (3 * kDecodeWarps * 8 * kTiles + 8 * kTiles * (kDim + 4)) * sizeof(float);

template <class T, int kDim, int kTiles>
__global__ void __launch_bounds__(32 * kDecodeWarps) decode_split(const DecodeArgs a) {
  allow_next_launch();
  const Split s = Split::of_block<8 * kTiles>(a);
  if (s.begin >= s.end) return;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const float scale = a.scale * kLog2e;
  const T* keys = static_cast<const T*>(a.k) + s.request * a.k_batch + s.kv_head * a.k_head;
  const T* values = static_cast<const T*>(a.v) + s.request * a.v_batch + s.kv_head * a.v_head;
  const T* queries = static_cast<const T*>(a.q) + s.request * a.q_batch + s.head * a.q_head;

  QueryTile<T, kDim> query[kTiles];
  OutputTile<kDim> out[kTiles];
  SoftmaxPair softmax[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    query[t].load(queries + (8 * t + row) * a.q_head, 8 * t + row < s.heads, a.dim);
    softmax[t].start();
#pragma unroll
    for (int p = 0; p < OutputTile<kDim>::kPairs; ++p)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t].acc[p][j][i] = 0.0f;
  }

  for (int key = s.begin + 16 * warp; key < s.end; key += 16 * kDecodeWarps) {
    const bool has_low = key + row < s.end, has_high = key + row + 8 < s.end;
    const T* low = keys + (key + row) * a.k_slot;
    KeyTile<T, kDim> key_tile;
    ValueTile<T, kDim> value_tile;
    key_tile.template load<true>(low, low + 8 * a.k_slot, has_low, has_high, a.dim);
    value_tile.load(values, a.v_slot, key, s.end, a.dim, 0);
    uint32_t low_pair[kTiles], high_pair[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float logit[4];
      query[t].multiply(key_tile, logit);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logit[i] *= scale;
        const int head = 8 * t + column + i % 2;
        if (a.logits && head < s.heads && (i < 2 ? has_low : has_high))
          a.logits[(static_cast<int64_t>(s.request) * a.heads + s.head + head) * a.slots + key + row + i / 2 * 8] = logit[i];
      }
      const float2 factor = softmax[t].add(logit, {has_low, has_low, has_high, has_high});
      out[t].scale(factor.x, factor.y);
      low_pair[t] = pack<T>(logit[0], logit[1]), high_pair[t] = pack<T>(logit[2], logit[3]);
    }
#pragma unroll
    for (int p = 0; p < OutputTile<kDim>::kPairs; ++p) {
      if (p > 0) value_tile.load(values, a.v_slot, key, s.end, a.dim, p);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) value_tile.accumulate(out[t].acc[p], low_pair[t], high_pair[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) softmax[t].finish();
  write_split<kTiles, kDim>(a, s, out, softmax);
}

}  // namespace sgl::cuda
