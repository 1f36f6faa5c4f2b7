// Prefill mass by plain fp32 multiply-adds, for fp32 inputs and for those that 16-byte loads or tensor cores cannot read:
// any type, head dim and stride. Same steps and same scratch as prefill_mass.cuh. Four lanes share a key: a warp multiplies
// 8 keys by one row. In prefill_received_fma the keys stay in registers and rows stream past; in
// prefill_row_statistics_fma a row stays and keys stream past, read once per row (from L1 and L2 after the first).
#pragma once

#include "prefill_mass.cuh"

namespace sgl::cuda {

constexpr int kReceivedFmaWarps = 8, kFmaKeys = 8;

// The dimensions of one row that a lane holds: kPiece elements of every 4 kPiece.
template <class T, int kDim>
struct RowPart {
  static constexpr int kPieces = ceil_div(kDim, 4 * kPiece<T>);
  float value[kPieces][kPiece<T>];

  template <bool kAligned>
  __device__ __forceinline__ void load(const T* row, bool present, int dim) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      unpack<T>(load_piece<T, kAligned, false>(row, first(i), dim, present), value[i]);
  }
  // The product with another row, read from memory, the same in the four lanes.
  template <bool kAligned>
  __device__ __forceinline__ float multiply(const T* row, bool present, int dim) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float other[kPiece<T>];
      unpack<T>(load_piece<T, kAligned, false>(row, first(i), dim, present), other);
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) sum = fmaf(value[i][e], other[e], sum);
    }
    return lane_sum<1, 2>(sum);
  }

 private:
  static __device__ __forceinline__ int first(int piece) { return (4 * piece + threadIdx.x % 4) * kPiece<T>; }
};

template <class T, int kDim, bool kAligned>
__global__ void __launch_bounds__(32 * kReceivedFmaWarps, 1) prefill_received_fma(const PrefillArgs a) {
  wait_for_previous_launch();
  const int request = blockIdx.y, warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4;
  const float scale = a.scale * kLog2e;
  auto* all = reinterpret_cast<float*>(shared_memory());  // (heads, kFmaKeys)
  const int key = visual_key(a, request, blockIdx.x * kFmaKeys + row);
  for (int head = warp; head < a.heads; head += kReceivedFmaWarps) {
    const T* keys = static_cast<const T*>(a.k) + request * a.k_batch + head / (a.heads / a.kv_heads) * a.k_head;
    const T* queries = static_cast<const T*>(a.q) + request * a.q_batch + head * a.q_head;
    RowPart<T, kDim> part;
    part.template load<kAligned>(keys + key * a.k_row, key != kNoKey, a.dim);
    float sum = 0.0f;
    for (int r = 0; r < a.query.count; ++r) {
      const int position = counted_row(a, request, r);
      if (!__any_sync(kWholeWarp, key <= position)) continue;
      const float logit = part.template multiply<kAligned>(queries + position * a.q_row, true, a.dim) * scale;
      if (key <= position) sum += received(logit, row_lse(a, request, head, r, position));
    }
    if (threadIdx.x % 4 == 0) all[head * kFmaKeys + row] = sum;
  }
  __syncthreads();
  add_received<kFmaKeys>(a, request, all, all + a.heads * kFmaKeys);
}

template <class T, int kDim, bool kAligned>
__global__ void __launch_bounds__(32 * kLseWarps, 1) prefill_row_statistics_fma(const PrefillArgs a) {
  allow_next_launch();
  const int request = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = blockIdx.x * kLseSplit, end = min(a.length, begin + kLseSplit);
  const float scale = a.scale * kLog2e;
  const T* keys = static_cast<const T*>(a.k) + request * a.k_batch + head / (a.heads / a.kv_heads) * a.k_head;
  const T* queries = static_cast<const T*>(a.q) + request * a.q_batch + head * a.q_head;
  for (int r = warp; r < a.query.count; r += kLseWarps) {
    const int position = counted_row(a, request, r);
    RowPart<T, kDim> part;
    part.template load<kAligned>(queries + position * a.q_row, position >= 0, a.dim);
    float largest = minus_infinity(), sum = 0.0f;
    for (int first = begin; first < min(end, position + 1); first += 8) {
      const int key = first + lane / 4;
      const float logit = part.template multiply<kAligned>(keys + key * a.k_row, key < end, a.dim) * scale;
      if (key <= position && key < end) {
        const float now = fmaxf(largest, logit);
        sum = sum * rescale(largest, now) + weight(logit, now);
        largest = now;
      }
    }
    const float most = lane_max<4, 8, 16>(largest);
    sum = lane_sum<4, 8, 16>(sum * rescale(largest, most));
    float* statistics = row_statistics(a, request, head, r, blockIdx.x);
    if (lane == 0) statistics[0] = most, statistics[1] = sum;
  }
}

}  // namespace sgl::cuda
