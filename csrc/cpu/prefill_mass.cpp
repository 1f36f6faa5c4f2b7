// Attention mass of the counted rows of a causal prefill, key-stationary.
//
// A task owns one KV head and kKeyBlock keys. It transposes them once into a fp32 panel (dim, kKeyBlock) that stays in
// L2, then streams the counted rows of every query head of the group past it, kRows at a time: accumulators in
// registers, logits of those rows in L1. With a given log-sum-exp only the visual keys are ever read, once. Without it
// a first round over all keys leaves each row's maximum and sum per block; the second round computes the logits of the
// visual keys again, which is cheaper than keeping rows x keys of them.

#include "simd.h"

namespace sgl::SGL_ISA {
namespace {

constexpr int kRows = W < 8 ? 4 : W / 2;
constexpr int kStep = 2 * W;  // keys per micro kernel
constexpr int32_t kNoKey = INT32_MAX;  // a position that no row can see

// panel[d][key], columns without a key are zero.
template <class T>
void pack_panel(const T* k, int64_t k_row, const int32_t* position, int64_t dim, float* panel) {
  for (int64_t key = 0; key < kKeyBlock; key += W) {
    const bool full = [&] {
      for (int i = 0; i < W; ++i)
        if (position[key + i] == kNoKey) return false;
      return true;
    }();
    for (int64_t d = 0; d < dim; d += W) {
      const int64_t n = dim - d < W ? dim - d : W;
      alignas(64) float square[W][W];
      for (int i = 0; i < W; ++i) {
        const bool present = full || position[key + i] != kNoKey;
        store(square[i], present ? load_upto(k + position[key + i] * k_row + d, n) : V{});
      }
      for (int64_t j = 0; j < n; ++j) {
        V column;
        for (int i = 0; i < W; ++i) column[i] = square[i][j];
        store(panel + (d + j) * kKeyBlock + key, column);
      }
    }
  }
}

// logits (kRows, kKeyBlock) of `rows` queries; missing rows repeat the last one.
void panel_logits(const float* q, int64_t rows, int64_t dim, const float* panel, float* logits) {
  const float* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = q + (r < rows ? r : rows - 1) * dim;
  for (int64_t key = 0; key < kKeyBlock; key += kStep) {
    V acc[kRows][2] = {};
    const float* column = panel + key;
    for (int64_t d = 0; d < dim; ++d, column += kKeyBlock) {
      const V k0 = load(column), k1 = load(column + W);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const V weight = splat(row[r][d]);
        acc[r][0] += weight * k0;
        acc[r][1] += weight * k1;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < 2; ++j) store(logits + r * kKeyBlock + key + j * W, acc[r][j]);
  }
}

SGL_INLINE VI seen(const int32_t* position, int32_t row) { return load_as<VI>(position) <= (row - VI{}); }

// Largest logit and sum of exponentials of the keys that the row at `row` sees.
void block_statistics(float* logits, const int32_t* position, int32_t row, float* max_out, float* sum_out) {
  V best = splat(-kInf);
  for (int64_t i = 0; i < kKeyBlock; i += W) {
    V x = seen(position + i, row) ? load(logits + i) : splat(-kInf);
    store(logits + i, x);
    best = max_number(best, x);
  }
  const float max = largest(best);
  const V shift = splat(max == -kInf ? 0.f : max);
  V total = {};
  for (int64_t i = 0; i < kKeyBlock; i += W) total += exp(load(logits + i) - shift);
  *max_out = max;
  *sum_out = sum(total);
}

// The buffers of one thread; a panel is too large for a stack.
struct Workspace {
  float* panel;
  explicit Workspace(int64_t dim) : panel((float*)__builtin_malloc(dim * kKeyBlock * sizeof(float))) {}
  ~Workspace() { __builtin_free(panel); }
  alignas(64) float logits[kRows * kKeyBlock];
  alignas(64) int32_t position[kKeyBlock];
};

template <class T>
void denominator_task(const PrefillArgs& a, Workspace& w, int64_t b, int64_t kv, int64_t block) {
  const int64_t begin = block * kKeyBlock, group = a.heads / a.kv_heads, count = a.row_count[b];
  for (int64_t i = 0; i < kKeyBlock; ++i) w.position[i] = begin + i < a.length ? int32_t(begin + i) : kNoKey;
  pack_panel((const T*)a.k + b * a.k_batch + kv * a.k_head, a.k_row, w.position, a.dim, w.panel);
  const int32_t* rows = a.rows + b * a.query.count;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const int64_t first = (b * a.heads + h) * a.query.count;
    for (int64_t r = 0; r < count; r += kRows) {
      const int64_t n = count - r < kRows ? count - r : kRows;
      bool any = false;
      for (int64_t i = 0; i < n; ++i) any |= rows[r + i] >= begin;
      if (any) panel_logits(a.packed + (first + r) * a.dim, n, a.dim, w.panel, w.logits);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t stat = (first + r + i) * a.key_blocks + block;
        a.block_max[stat] = -kInf;
        a.block_sum[stat] = 0.f;
        if (rows[r + i] >= begin)
          block_statistics(w.logits + i * kKeyBlock, w.position, rows[r + i], a.block_max + stat, a.block_sum + stat);
      }
    }
  }
}

template <class T>
void received_task(const PrefillArgs& a, Workspace& w, int64_t b, int64_t kv, int64_t block) {
  const int64_t begin = block * kKeyBlock, group = a.heads / a.kv_heads, count = a.row_count[b];
  const int64_t slots = a.visual.count - begin < kKeyBlock ? a.visual.count - begin : kKeyBlock;
  int32_t first_key = kNoKey;
  for (int64_t i = 0; i < kKeyBlock; ++i) {
    const int32_t at = i < slots ? a.visual.at(b, begin + i) : -1;
    w.position[i] = at >= 0 && at < a.length ? at : kNoKey;
    first_key = w.position[i] < first_key ? w.position[i] : first_key;
  }
  if (first_key != kNoKey)
    pack_panel((const T*)a.k + b * a.k_batch + kv * a.k_head, a.k_row, w.position, a.dim, w.panel);
  const int32_t* rows = a.rows + b * a.query.count;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    alignas(64) float total[kKeyBlock] = {};
    const int64_t first = (b * a.heads + h) * a.query.count;
    for (int64_t r = 0; r < count && first_key != kNoKey; r += kRows) {
      const int64_t n = count - r < kRows ? count - r : kRows;
      bool any = false;
      for (int64_t i = 0; i < n; ++i) any |= rows[r + i] >= first_key;
      if (!any) continue;
      panel_logits(a.packed + (first + r) * a.dim, n, a.dim, w.panel, w.logits);
      for (int64_t i = 0; i < n; ++i) {
        const float shift = a.row_shift[first + r + i], factor = a.row_factor[first + r + i];
        for (int64_t key = 0; key < kKeyBlock; key += W) {
          V p = exp(load(w.logits + i * kKeyBlock + key) - shift) * factor;
          p = seen(w.position + key, rows[r + i]) ? p : V{};
          store(total + key, load(total + key) + p);
        }
      }
    }
    float* out = a.received + (b * a.heads + h) * a.visual.count + begin;
    for (int64_t i = 0; i < slots; ++i) out[i] = total[i];
  }
}

template <class T>
void pack_queries(const PrefillArgs& a, int64_t b, int64_t h) {
  const int32_t* rows = a.rows + b * a.query.count;
  for (int64_t r = 0; r < a.row_count[b]; ++r) {
    const T* q = (const T*)a.q + b * a.q_batch + h * a.q_head + rows[r] * a.q_row;
    float* out = a.packed + ((b * a.heads + h) * a.query.count + r) * a.dim;
    for (int64_t d = 0; d < a.dim; d += W) store_upto(out + d, load_upto(q + d, a.dim - d) * a.scale, a.dim - d);
  }
}

}  // namespace

void prefill_pack(const PrefillArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    with_dtype(a.dtype, [&](auto t) { pack_queries<decltype(t)>(a, task / a.heads, task % a.heads); });
}

void prefill_denominator(const PrefillArgs& a, int64_t begin, int64_t end) {
  Workspace w(a.dim);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % a.key_blocks, kv = task / a.key_blocks % a.kv_heads;
    const int64_t b = task / a.key_blocks / a.kv_heads;
    with_dtype(a.dtype, [&](auto t) { denominator_task<decltype(t)>(a, w, b, kv, block); });
  }
}

void prefill_rows(const PrefillArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.heads, h = task % a.heads;
    for (int64_t r = 0; r < a.row_count[b]; ++r) {
      const int64_t row = task * a.query.count + r;
      const int32_t position = a.rows[b * a.query.count + r];
      if (a.lse) {
        a.row_shift[row] = a.lse[b * a.lse_batch + h * a.lse_head + position * a.lse_row];
        a.row_factor[row] = 1.f;
        continue;
      }
      const float *max = a.block_max + row * a.key_blocks, *sums = a.block_sum + row * a.key_blocks;
      const int64_t used = position / kKeyBlock + 1;
      float best = -kInf, total = 0.f;
      for (int64_t i = 0; i < used; ++i) best = max[i] > best ? max[i] : best;
      for (int64_t i = 0; i < used; ++i) total += sums[i] * exp(max[i] - best);
      a.row_shift[row] = best;
      a.row_factor[row] = 1.f / total;
    }
  }
}

void prefill_received(const PrefillArgs& a, int64_t begin, int64_t end) {
  Workspace w(a.dim);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % a.slot_blocks, kv = task / a.slot_blocks % a.kv_heads;
    const int64_t b = task / a.slot_blocks / a.kv_heads;
    with_dtype(a.dtype, [&](auto t) { received_task<decltype(t)>(a, w, b, kv, block); });
  }
}

void prefill_mass(const PrefillArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.slot_blocks, first = task % a.slot_blocks * kKeyBlock;
    const int64_t last = first + kKeyBlock < a.visual.count ? first + kKeyBlock : a.visual.count;
    float* mass = a.mass + b * a.mass_batch;
    float total[kKeyBlock] = {};
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* received = a.received + (b * a.heads + h) * a.visual.count;
      for (int64_t n = first; n < last; ++n) total[n - first] += received[n];
      if (!a.head_mass) continue;
      float* head_mass = a.head_mass + b * a.head_mass_batch + h * a.head_mass_head;
      for (int64_t n = first; n < last; ++n) head_mass[n] += received[n];
    }
    for (int64_t n = first; n < last; ++n) mass[n] += total[n - first];
  }
}

}  // namespace sgl::SGL_ISA
