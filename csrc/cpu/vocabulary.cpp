// greedy_token and token_logprobs: log-softmax at one token of each row.
//
// A task owns one row and kVocabBlock tokens: 16 KB of fp32, so the second look (exponentials, after the maximum) finds
// them in L1 and every logit comes from memory once. The finish step combines the blocks of a row in their order and
// looks for the best token in the winning block only.

#include <cmath>

#include "simd.h"

namespace sgl::SGL_ISA {
namespace {

template <class T>
void block_task(const VocabArgs& a, int64_t row, int64_t block) {
  const T* x = (const T*)a.logits + row * a.row_stride + block * kVocabBlock;
  const int64_t left = a.vocab - block * kVocabBlock;
  const int64_t n = left < kVocabBlock ? left : kVocabBlock;
  const int64_t whole = n / (4 * W) * (4 * W);
  V best[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  for (int64_t i = 0; i < whole; i += 4 * W)
    for (int j = 0; j < 4; ++j) best[j] = max_number(best[j], load(x + i + j * W));
  V top = max_number(max_number(best[0], best[1]), max_number(best[2], best[3]));
  float max = largest(top);
  for (int64_t i = whole; i < n; ++i) {
    const float value = load_first(x + i, 1)[0];
    max = value > max ? value : max;
  }
  const V shift = splat(max == -kInf ? 0.f : max);
  V total[4] = {};
  for (int64_t i = 0; i < whole; i += 4 * W)
    for (int j = 0; j < 4; ++j) total[j] += exp(load(x + i + j * W) - shift);
  float rest = 0.f;
  for (int64_t i = whole; i < n; ++i) rest += exp(load_first(x + i, 1)[0] - shift[0]);
  a.block_max[row * a.blocks + block] = max;
  a.block_sum[row * a.blocks + block] = sum((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

template <class T>
int64_t first_equal(const T* x, int64_t n, float value) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    VI equal = load(x + i) == splat(value);
    for (int j = 0; j < W; ++j)
      if (equal[j]) return i + j;
  }
  for (; i < n; ++i)
    if (load_first(x + i, 1)[0] == value) return i;
  return -1;
}

template <class T>
int64_t best_token(const VocabArgs& a, int64_t row, float best) {
  for (int64_t block = 0; block < a.blocks; ++block) {
    if (!(a.block_max[row * a.blocks + block] == best)) continue;
    const int64_t begin = block * kVocabBlock;
    const int64_t n = a.vocab - begin < kVocabBlock ? a.vocab - begin : kVocabBlock;
    const int64_t found = first_equal((const T*)a.logits + row * a.row_stride + begin, n, best);
    if (found >= 0) return begin + found;
  }
  return 0;  // every logit is NaN
}

template <class T>
void finish_task(const VocabArgs& a, int64_t row) {
  const float* max = a.block_max + row * a.blocks;
  float best = -kInf;
  for (int64_t i = 0; i < a.blocks; ++i) best = max[i] > best ? max[i] : best;
  double total = 0;
  for (int64_t i = 0; i < a.blocks; ++i)
    total += (double)a.block_sum[row * a.blocks + i] * (double)exp(max[i] - best);
  const double log_total = ::log(total);
  if (a.token) {
    a.token[row] = best_token<T>(a, row, best);
    a.logprob[row] = (float)-log_total;
    return;
  }
  const int64_t at = row * a.targets_stride;
  const int64_t target = a.targets_are_64 ? ((const int64_t*)a.targets)[at] : ((const int32_t*)a.targets)[at];
  if (target == -1) {
    a.logprob[row] = 0.f;
  } else if (target < 0 || target >= a.vocab) {
    a.logprob[row] = __builtin_nanf("");
  } else {
    const float x = load_first((const T*)a.logits + row * a.row_stride + target, 1)[0];
    a.logprob[row] = (float)((double)x - (double)best - log_total);
  }
}

}  // namespace

void vocab_block(const VocabArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    with_dtype(a.dtype, [&](auto t) { block_task<decltype(t)>(a, task / a.blocks, task % a.blocks); });
}

void vocab_finish(const VocabArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    with_dtype(a.dtype, [&](auto t) { finish_task<decltype(t)>(a, row); });
}

}  // namespace sgl::SGL_ISA
