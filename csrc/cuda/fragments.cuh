// What the tensor-core kernels share: a warp multiplies 16 keys by 8 columns, the columns being query heads (decode) or
// rows of the prompt (prefill). Operands go from device memory to registers as the 16-byte pieces they are read in.
#pragma once

#include "primitives.cuh"

namespace sgl::cuda {

// 16 keys of a warp: its lane holds dimensions 8 (lane % 4) .. + 8 of every 32 of keys lane / 4 and lane / 4 + 8.
template <class T, int kDim>
struct KeyTile {
  static constexpr int kChunks = kDim / 32;
  uint4 low[kChunks], high[kChunks];

  template <bool kStreaming>
  __device__ __forceinline__ void load(const T* low_row, const T* high_row, bool has_low, bool has_high, int dim) {
    const int first = threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      low[i] = load_piece<T, true, kStreaming>(low_row, 32 * i + first, dim, has_low);
      high[i] = load_piece<T, true, kStreaming>(high_row, 32 * i + first, dim, has_high);
    }
  }
};

// 8 columns: the lane holds the same dimensions of column lane / 4.
template <class T, int kDim>
struct QueryTile {
  static constexpr int kChunks = kDim / 32;
  uint4 piece[kChunks];

  __device__ __forceinline__ void load(const T* row, bool present, int dim) {
    const int first = threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) piece[i] = load_piece<T, true, false>(row, 32 * i + first, dim, present);
  }

  // Products of keys and columns: [0], [1] of key lane / 4, [2], [3] of key lane / 4 + 8, with columns
  // 2 (lane % 4) and 2 (lane % 4) + 1.
  __device__ __forceinline__ void multiply(const KeyTile<T, kDim>& keys, float (&products)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 &a = keys.low[i], &b = keys.high[i], &q = piece[i];
      mma<T>(products, a.x, b.x, a.y, b.y, q.x, q.y);
      mma<T>(products, a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }
};

// Softmax statistics of 8 columns in a warp: each lane those of columns 2 (lane % 4) and 2 (lane % 4) + 1. `sum` is of
// the keys that this lane saw, until `finish`.
struct SoftmaxPair {
  float largest[2], sum[2];
  struct Has {  // which of the four logits count
    bool of[4];
  };

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = minus_infinity(), sum[i] = 0.0f;
  }
  // Turns logits, laid out as QueryTile::multiply leaves them, into probabilities relative to the new largest; returns
  // the factors of what was summed before.
  __device__ __forceinline__ float2 add(float (&logit)[4], const Has& has) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = has.of[i] ? logit[i] : minus_infinity(), high = has.of[2 + i] ? logit[2 + i] : minus_infinity();
      const float now = fmaxf(largest[i], lane_max<4, 8, 16>(fmaxf(low, high)));
      factor[i] = rescale(largest[i], now);
      largest[i] = now;
      logit[i] = has.of[i] ? weight(logit[i], now) : 0.0f;
      logit[2 + i] = has.of[2 + i] ? weight(logit[2 + i], now) : 0.0f;
      sum[i] = sum[i] * factor[i] + logit[i] + logit[2 + i];
    }
    return make_float2(factor[0], factor[1]);
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = lane_sum<4, 8, 16>(sum[i]);
  }
};

}  // namespace sgl::cuda
