// select_tokens: which positions survive.
//
// Selection is one thread per request: a radix select over order-preserving keys (16 KB at N = 4096, in L1) finds the
// key at the cut, ties at the cut are settled by position, and one byte per position merges text with kept visual
// tokens in ascending order. Each mass is read once.

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels.h"

namespace sgl {
namespace {

// Rising with the value; NaN below -inf, -0.0 equal to 0.0.
uint32_t order_key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0;
  if (magnitude == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Slot {
  uint32_t key;
  int32_t position;
};

// The `rank`-th largest key (1-based), eleven bits at a time; `above` counts the keys larger than it.
uint32_t key_at_rank(const std::vector<Slot>& slots, int64_t rank, int64_t& above) {
  std::array<uint32_t, 2048> bins;
  uint32_t prefix = 0, known = 0;
  above = 0;
  for (const int shift : {21, 10, 0}) {
    const uint32_t mask = shift == 0 ? 1023u : 2047u;
    bins.fill(0);
    for (const Slot& s : slots) bins[s.key >> shift & mask] += (s.key & known) == prefix;
    uint32_t bin = mask;
    while (above + bins[bin] < rank) above += bins[bin--];
    prefix |= bin << shift;
    known |= mask << shift;
  }
  return prefix;
}

}  // namespace

int32_t select_tokens(const float* mass, const Index& visual, int64_t b, int64_t seq_len, int64_t num_keep,
                      int32_t* kept, int64_t out_len) {
  std::vector<Slot> slots;
  slots.reserve(visual.count);
  for (int64_t n = 0; n < visual.count; ++n) {
    const int32_t at = visual.at(b, n);
    if (at >= 0 && at < seq_len) slots.push_back({order_key(mass[n]), at});
  }
  const int64_t keep = std::clamp<int64_t>(num_keep, 0, slots.size());

  // At most N positions are dropped, so nothing from out_len + N on can reach the output.
  const int64_t bound = std::clamp<int64_t>(seq_len, 0, out_len + visual.count);
  std::vector<uint8_t> dropped(bound, 0);
  for (const Slot& s : slots)
    if (s.position < bound) dropped[s.position] = 1;
  if (keep > 0) {
    int64_t above;
    const uint32_t cut = key_at_rank(slots, keep, above);
    std::vector<int32_t> ties;
    for (const Slot& s : slots)
      if (s.key == cut) ties.push_back(s.position);
    auto last = ties.begin() + (keep - above - 1);
    std::nth_element(ties.begin(), last, ties.end());
    for (const Slot& s : slots)
      if (s.position < bound && (s.key > cut || (s.key == cut && s.position <= *last))) dropped[s.position] = 0;
  }

  int64_t count = 0, position = 0;
  for (; position < bound && count < out_len; ++position) {
    kept[count] = int32_t(position);
    count += dropped[position] == 0;
  }
  std::fill(kept + count, kept + out_len, -1);
  return int32_t(count);
}

}  // namespace sgl
