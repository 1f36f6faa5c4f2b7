// What the binding may call: arguments as raw pointers and strides (in elements), one launcher per op. No torch header
// and no CUDA header, so that the binding and the kernels can be compiled apart. A launcher checks nothing: the binding
// has. It returns a cudaError_t as an int.
#pragma once

#include <cstdint>

#include "../types.h"

namespace sgl::cuda {

constexpr int kMaxHeadDim = 256;

// A request of `length` keys is cut into at most kMaxSplits pieces of split_keys(length). Nothing but its own length
// enters, so a request gives the same bits alone and in any batch.
constexpr int kSplit = 128, kMaxSplits = 64;
constexpr int kLseSplit = 256;      // prefill: keys a piece of the softmax denominator
constexpr int kVocabBlock = 4096;   // tokens a block

template <class T>
SGL_INLINE constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}
SGL_INLINE constexpr int split_keys(int length) {
  const int pieces = sgl::ceil_div(length, kSplit * kMaxSplits);
  return kSplit * (pieces > 1 ? pieces : 1);
}
SGL_INLINE constexpr int num_splits(int length) { return ceil_div(length, split_keys(length)); }
// The most that any length up to `slots` has: more than `slots` itself may have, where its splits are longer.
SGL_INLINE constexpr int most_splits(int slots) {
  const int splits = ceil_div(slots, kSplit);
  return splits < kMaxSplits ? splits : kMaxSplits;
}

struct DecodeArgs {
  Dtype dtype;
  int batch, heads, kv_heads, dim, slots;
  float scale;
  const void *q, *k, *v;
  int64_t q_batch, q_head;
  int64_t k_batch, k_head, k_slot;
  int64_t v_batch, v_head, v_slot;
  const int32_t* seq_lens;
  int64_t seq_lens_stride;
  Index visual;
  float *mass, *head_mass;  // either may be null
  int64_t mass_batch, head_mass_batch, head_mass_head;
  void* out;  // (B, Hq, D) contiguous
  // Scratch: of each split the unnormalised output, its largest logit and the sum of exp2 above it; of each key its
  // logit in units of log 2 (null without a mass).
  int max_splits;      // most_splits of the cache
  float* partial;      // (B, Hq, max_splits, D)
  float* statistics;   // (B, Hq, max_splits, 2)
  float* logits;       // (B, Hq, S)

  SGL_INLINE int length(int b) const {
    const int n = seq_lens[b * seq_lens_stride];
    return n < 0 ? 0 : n > slots ? slots : n;
  }
};

struct PrefillArgs {
  Dtype dtype;
  int batch, heads, kv_heads, dim, length;
  float scale;
  const void *q, *k;
  int64_t q_batch, q_head, q_row;
  int64_t k_batch, k_head, k_row;
  Index query, visual;
  float *mass, *head_mass;  // either may be null
  int64_t mass_batch, head_mass_batch, head_mass_head;
  const float* lse;  // natural logarithm, or null: computed here
  int64_t lse_batch, lse_head, lse_row;
  // Scratch without an lse: of each counted row and split of kLseSplit keys, largest logit and sum of exp2 above it.
  int max_splits;
  float* statistics;  // (B, Hq, R, max_splits, 2)
  float* row_lse;     // (B, Hq, R), in units of log 2
};

constexpr int kMaxPlanes = 16;  // a launch; more extras take another one
constexpr int kMaxVisual = 32768;

struct GatherArgs {
  int batch, out_len, planes;
  const int32_t* kept;  // (B, out_len) contiguous; -1 makes a row of zeros
  Plane plane[kMaxPlanes];
};

struct VocabArgs {
  Dtype dtype;
  int rows, vocab, blocks;  // blocks of kVocabBlock tokens
  int64_t row_stride;
  const void* logits;
  float* block_terms;  // scratch (rows, blocks, 4): largest logit, sum of exp above it, best logit, its id
  int64_t* token;      // greedy_token: output, else null
  const void* targets;  // token_logprobs: int64 or int32, else null
  bool targets_are_64;
  int64_t targets_stride;
  float* logprob;
};

int decode_attention(const DecodeArgs&, void* stream);
int prefill_mass(const PrefillArgs&, void* stream);
int select_tokens(const SelectArgs&, void* stream);
int gather_rows(const GatherArgs&, void* stream);  // after select_tokens on the same stream
int vocabulary(const VocabArgs&, void* stream);
const char* error_name(int error);

}  // namespace sgl::cuda
