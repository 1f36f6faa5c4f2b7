// greedy_token and token_logprobs: one pass over the logits. A block owns kVocabBlock tokens of one row, read once into
// registers, and leaves their largest logit, the sum of 2^(logit - largest) and the best id; a second launch of one warp
// a row merges the blocks. Which thread owns a token follows from the token's index and from whether rows can be read in
// 16-byte pieces, never from the batch, so a row gives the same bits alone.
#pragma once

#include <climits>

#include "primitives.cuh"

namespace sgl::cuda {

constexpr int kVocabThreads = 256, kVocabWarps = kVocabThreads / 32;
constexpr int kVocabItems = kVocabBlock / kVocabThreads;

// NaN ranks below everything and the lowest id wins between equals; `id` of nothing at all is INT_MAX.
struct Best {
  float logit;
  int id;
};
__device__ __forceinline__ bool beats(const Best& a, const Best& b) {
  if (b.id == INT_MAX) return a.id != INT_MAX;
  if (a.id == INT_MAX) return false;
  const bool a_nan = a.logit != a.logit, b_nan = b.logit != b.logit;
  if (a_nan || b_nan) return a_nan == b_nan ? a.id < b.id : b_nan;
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}
__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const Best other{__shfl_xor_sync(kWholeWarp, best.logit, bits), __shfl_xor_sync(kWholeWarp, best.id, bits)};
    if (beats(other, best)) best = other;
  }
  return best;
}

struct BlockTerms {  // one float4 of scratch
  float largest, sum;
  Best best;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kVocabThreads, 1) vocabulary_block(const VocabArgs a) {
  allow_next_launch();
  const int row = blockIdx.y, first = blockIdx.x * kVocabBlock, thread = threadIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  float value[kVocabItems];
  int id[kVocabItems];
  if constexpr (kAligned) {
#pragma unroll
    for (int p = 0; p < kVocabItems / kPiece<T>; ++p) {
      const int token = first + (p * kVocabThreads + thread) * kPiece<T>;
      float piece[kPiece<T>];
      unpack<T>(load_piece<T, true, true>(logits, token, a.vocab, true), piece);
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) value[p * kPiece<T> + e] = piece[e], id[p * kPiece<T> + e] = token + e;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVocabItems; ++i) {
      id[i] = first + i * kVocabThreads + thread;
      value[i] = id[i] < a.vocab ? to_float(logits[id[i]]) : 0.0f;
    }
  }
  auto* block_largest = reinterpret_cast<float*>(shared_memory());  // (warps), as the two below
  float* block_sum = block_largest + kVocabWarps;
  auto* block_id = reinterpret_cast<int*>(block_sum + kVocabWarps);
  const int warp = thread / 32, lane = thread % 32;

  float largest = minus_infinity();
#pragma unroll
  for (int i = 0; i < kVocabItems; ++i)
    if (id[i] < a.vocab) largest = fmaxf(largest, value[i]);
  largest = lane_max<1, 2, 4, 8, 16>(largest);
  if (lane == 0) block_largest[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kVocabWarps; ++w) largest = fmaxf(largest, block_largest[w]);
  float sum = 0.0f;
  int lowest = INT_MAX;  // id of the largest logit; none where all are NaN
#pragma unroll
  for (int i = 0; i < kVocabItems; ++i)
    if (id[i] < a.vocab) {
      sum += weight(value[i], largest, kLog2e);
      lowest = min(lowest, value[i] == largest ? id[i] : INT_MAX);
    }
  sum = lane_sum<1, 2, 4, 8, 16>(sum);
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) lowest = min(lowest, __shfl_xor_sync(kWholeWarp, lowest, bits));
  if (lane == 0) block_sum[warp] = sum, block_id[warp] = lowest;
  __syncthreads();
  if (thread == 0) {
    for (int w = 1; w < kVocabWarps; ++w) sum += block_sum[w], lowest = min(lowest, block_id[w]);
    const Best best = lowest == INT_MAX ? Best{__uint_as_float(0x7fc00000u), first} : Best{largest, lowest};
    reinterpret_cast<BlockTerms*>(a.block_terms)[static_cast<int64_t>(row) * a.blocks + blockIdx.x] = {largest, sum, best};
  }
}

template <class T>
__device__ __forceinline__ float target_logprob(const VocabArgs& a, int row, float largest, float log_sum) {
  const int64_t place = row * a.targets_stride;
  const int64_t target = a.targets_are_64 ? static_cast<const int64_t*>(a.targets)[place]
                                          : static_cast<const int32_t*>(a.targets)[place];
  if (target == -1) return 0.0f;
  if (target < 0 || target >= a.vocab) return __uint_as_float(0x7fc00000u);
  return to_float(static_cast<const T*>(a.logits)[row * a.row_stride + target]) - largest - log_sum;
}

template <class T>
__global__ void __launch_bounds__(32) vocabulary_finish(const VocabArgs a) {
  wait_for_previous_launch();
  const int row = blockIdx.x, lane = threadIdx.x;
  const auto* terms = reinterpret_cast<const BlockTerms*>(a.block_terms) + static_cast<int64_t>(row) * a.blocks;
  float largest = minus_infinity(), sum = 0.0f;
  Best best{0.0f, INT_MAX};
  for (int b = lane; b < a.blocks; b += 32) {
    const BlockTerms term = terms[b];
    const float now = fmaxf(largest, term.largest);
    sum = sum * rescale(largest, now, kLog2e) + term.sum * rescale(term.largest, now, kLog2e);
    largest = now;
    if (beats(term.best, best)) best = term.best;
  }
  const float most = lane_max<1, 2, 4, 8, 16>(largest);
  sum = lane_sum<1, 2, 4, 8, 16>(sum * rescale(largest, most, kLog2e));
  best = best_of_warp(best);
  const float log_sum = logf(sum);  // kept apart from `most`, beside which a small one would be lost
  if (lane != 0) return;
  if (a.token) {
    a.token[row] = best.id;
    a.logprob[row] = best.logit - most - log_sum;
  } else {
    a.logprob[row] = target_logprob<T>(a, row, most, log_sum);
  }
}

}  // namespace sgl::cuda
