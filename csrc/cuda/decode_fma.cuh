// Decode attention by plain fp32 multiply-adds, for fp32 inputs and for those that 16-byte loads or tensor cores cannot
// read: any type, head dim and stride. Same division of work and same outputs as decode_attention.cuh, 8 query heads a
// block. Resident: the queries in shared memory as fp32; per warp 16 keys in flight, their probabilities in shared
// memory, the running output in registers. K and V are read once per 8 query heads of a KV head.
#pragma once

#include "decode_attention.cuh"

namespace sgl::cuda {

// The running output of 8 heads: the lane holds 16-byte pieces of dimensions, piece lane + 32 i.
template <class T, int kDim>
struct OutputRows {
  static constexpr int kPieces = ceil_div(kDim / kPiece<T>, 32);
  float acc[kPieces][kPiece<T>][8];

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e)
#pragma unroll
        for (int h = 0; h < 8; ++h)
          if (const int d = (lane + 32 * i) * kPiece<T> + e; d < kDim) f(d, h, acc[i][e][h]);
  }
};

// Logits of 16 keys and 8 heads, laid out as mma leaves them: see QueryTile::multiply. `queries` is (8, kDim).
template <class T, int kDim, bool kAligned>
__device__ __forceinline__ void multiply_rows(const T* low_row, const T* high_row, bool has_low, bool has_high, int dim,
                                              const float* queries, float (&logit)[4]) {
  constexpr int kStep = 4 * kPiece<T>;  // dimensions that the four lanes of a key read together
  const int column = threadIdx.x % 4;
  float low_sum[8] = {}, high_sum[8] = {};
#pragma unroll 2
  for (int first = column * kPiece<T>; first < kDim; first += kStep) {
    float low[kPiece<T>], high[kPiece<T>];
    unpack<T>(load_piece<T, kAligned, true>(low_row, first, dim, has_low), low);
    unpack<T>(load_piece<T, kAligned, true>(high_row, first, dim, has_high), high);
#pragma unroll
    for (int h = 0; h < 8; ++h)
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e)
        if (const float q = queries[h * kDim + first + e]; first + e < dim) {  // 0 * inf must not appear past the end
          low_sum[h] = fmaf(low[e], q, low_sum[h]);
          high_sum[h] = fmaf(high[e], q, high_sum[h]);
        }
  }
#pragma unroll
  for (int h = 0; h < 8; ++h) {
    const float low = lane_sum<1, 2>(low_sum[h]), high = lane_sum<1, 2>(high_sum[h]);
    if (h / 2 == column) logit[h % 2] = low, logit[2 + h % 2] = high;
  }
}

template <class T, int kDim, bool kAligned>
__global__ void __launch_bounds__(32 * kDecodeWarps) decode_split_fma(const DecodeArgs a) {
  allow_next_launch();
  const Split s = Split::of_block<8>(a);
  if (s.begin >= s.end) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const float scale = a.scale * kLog2e;
  const T* keys = static_cast<const T*>(a.k) + s.request * a.k_batch + s.kv_head * a.k_head;
  const T* values = static_cast<const T*>(a.v) + s.request * a.v_batch + s.kv_head * a.v_head;
  const T* query_rows = static_cast<const T*>(a.q) + s.request * a.q_batch + s.head * a.q_head;
  auto* queries = reinterpret_cast<float*>(shared_memory());    // (8, kDim)
  float* probs = queries + 8 * kDim + warp * (16 * 8 + 8);      // (16 keys, 8 heads) of this warp
  float* factors = probs + 16 * 8;                              // (8)
  for (int i = threadIdx.x; i < 8 * kDim; i += blockDim.x) {
    const int head = i / kDim, d = i % kDim;
    queries[i] = head < s.heads && d < a.dim ? to_float(query_rows[head * a.q_head + d]) : 0.0f;
  }
  __syncthreads();

  OutputRows<T, kDim> out[1] = {};
  SoftmaxPair softmax[1];
  softmax[0].start();
  for (int key = s.begin + 16 * warp; key < s.end; key += 16 * kDecodeWarps) {
    const bool has_low = key + row < s.end, has_high = key + row + 8 < s.end;
    const T* low = keys + (key + row) * a.k_slot;
    float logit[4];
    multiply_rows<T, kDim, kAligned>(low, low + 8 * a.k_slot, has_low, has_high, a.dim, queries, logit);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logit[i] *= scale;
      const int head = column + i % 2;
      if (a.logits && head < s.heads && (i < 2 ? has_low : has_high))
        a.logits[(static_cast<int64_t>(s.request) * a.heads + s.head + head) * a.slots + key + row + i / 2 * 8] = logit[i];
    }
    const float2 factor = softmax[0].add(logit, {has_low, has_low, has_high, has_high});
    __syncwarp();  // the values of the previous keys have been added
#pragma unroll
    for (int i = 0; i < 4; ++i) probs[(row + i / 2 * 8) * 8 + column + i % 2] = logit[i];
    if (row == 0) factors[column] = factor.x, factors[column + 1] = factor.y;
    __syncwarp();
    auto& acc = out[0].acc;
#pragma unroll
    for (int i = 0; i < OutputRows<T, kDim>::kPieces; ++i) {
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e)
#pragma unroll
        for (int h = 0; h < 8; ++h) acc[i][e][h] *= factors[h];
      const int first = (lane + 32 * i) * kPiece<T>;
#pragma unroll 4
      for (int k = 0; k < 16; ++k) {
        float value[kPiece<T>];
        unpack<T>(load_piece<T, kAligned, true>(values + (key + k) * a.v_slot, first, a.dim, key + k < s.end), value);
#pragma unroll
        for (int h = 0; h < 8; ++h)
#pragma unroll
          for (int e = 0; e < kPiece<T>; ++e) acc[i][e][h] = fmaf(value[e], probs[k * 8 + h], acc[i][e][h]);
      }
    }
  }
  softmax[0].finish();
  write_split<1, kDim>(a, s, out, softmax);
}

template <int kDim>
constexpr int kDecodeFmaShared =
    max_of(kDecodeShared<1, kDim>, (8 * kDim + kDecodeWarps * (16 * 8 + 8)) * static_cast<int>(sizeof(float)));

}  // namespace sgl::cuda
