// What the binding may call: arguments as raw pointers and strides (in elements), one table of kernels per vector
// width, and the choice of table at run time. Every kernel takes a range of tasks; tasks never share an output, so
// any division of the range among threads gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../types.h"

namespace sgl {

// Keys per task. Fixed, and counted from position 0, so that how a sum is split depends on its own request only.
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kVocabBlock = 4096;
constexpr int64_t kMaxHeadDim = 1024;

struct DecodeArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, dim, slots;
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
  // Scratch, one row per query head: partial sums of V and statistics of each split, and with a mass the
  // probabilities relative to the split's largest logit.
  int64_t splits;
  float *partial, *split_max, *split_scale;  // (B, Hq, splits, D), (B, Hq, splits) twice
  float* probs;                              // (B, Hq, splits * kKeyBlock) or null
  float* key_mass;                           // (B, splits * kKeyBlock) or null

  SGL_INLINE int64_t length(int64_t b) const {
    int64_t n = seq_lens[b * seq_lens_stride];
    return n < 0 ? 0 : n > slots ? slots : n;
  }
};

struct PrefillArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, dim, length;
  float scale;
  const void *q, *k;
  int64_t q_batch, q_head, q_row;
  int64_t k_batch, k_head, k_row;
  Index query, visual;
  float *mass, *head_mass;  // head_mass may be null
  int64_t mass_batch, head_mass_batch, head_mass_head;
  const float* lse;  // null: computed here
  int64_t lse_batch, lse_head, lse_row;
  // Scratch. `rows` holds the counted rows in the caller's order, `packed` their queries in fp32, scaled.
  int32_t *rows, *row_count;           // (B, R), (B)
  float* packed;                       // (B, Hq, R, D)
  float *row_shift, *row_factor;       // (B, Hq, R): probability = exp(logit - shift) * factor
  int64_t key_blocks, slot_blocks;     // blocks of kKeyBlock positions; of kKeyBlock visual slots
  float *block_max, *block_sum;        // (B, Hq, R, key_blocks)
  float* received;                     // (B, Hq, N)
};

struct VocabArgs {
  Dtype dtype;
  int64_t rows, vocab, row_stride;
  const void* logits;
  int64_t blocks;                // blocks of kVocabBlock tokens
  float *block_max, *block_sum;  // scratch (rows, blocks)
  int64_t* token;                // greedy_token: output, else null
  const void* targets;           // token_logprobs: int64 or int32, else null
  bool targets_are_64;
  int64_t targets_stride;
  float* logprob;
};

struct GatherArgs {
  const Plane* planes;
  int64_t plane_count;
  const int32_t* kept;  // (B, out_len) contiguous; -1 makes a row of zeros
  int64_t out_len;
};

template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

struct Kernels {
  const char* isa;
  Kernel<DecodeArgs> decode_split;       // tasks (B, Hkv, splits)
  Kernel<DecodeArgs> decode_combine;     // tasks (B, Hq)
  Kernel<DecodeArgs> decode_mass;        // tasks (B)
  Kernel<PrefillArgs> prefill_pack;      // tasks (B, Hq)
  Kernel<PrefillArgs> prefill_denominator;  // tasks (B, Hkv, key_blocks)
  Kernel<PrefillArgs> prefill_rows;      // tasks (B, Hq)
  Kernel<PrefillArgs> prefill_received;  // tasks (B, Hkv, slot_blocks)
  Kernel<PrefillArgs> prefill_mass;      // tasks (B, slot_blocks)
  Kernel<VocabArgs> vocab_block;         // tasks (rows, blocks)
  Kernel<VocabArgs> vocab_finish;        // tasks (rows)
  Kernel<GatherArgs> gather_rows;        // tasks (B, out_len)
};

// One request of select_tokens; kept (out_len) is filled, the return value is the number of valid entries.
int32_t select_tokens(const float* mass, const Index& visual, int64_t b, int64_t seq_len, int64_t num_keep,
                      int32_t* kept, int64_t out_len);

const Kernels& active_kernels();
void set_isa(const std::string& name);  // throws std::invalid_argument when this CPU or build lacks it
std::optional<std::string> refused_isa();  // the value of SGL_KERNELS_ISA when this CPU or build lacks it
std::vector<std::string> available_isas();
std::vector<std::string> cpu_features();

}  // namespace sgl
