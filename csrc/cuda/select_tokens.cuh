// Exact selection, one block a request. The ranks of up to kSlots visual slots stay in registers; the mass and the index
// are read from device memory once and from L1 after that. The threshold is found 8 bits at a time from a histogram in
// shared memory; ties at it are cut by position the same way. The output then follows from two bitmaps over windows
// of positions and a prefix sum, so it comes out ascending without a sort. No scratch in device memory, no order that
// depends on scheduling: atomics count integers and set bits.
#pragma once

#include "primitives.cuh"

namespace sgl::cuda {

constexpr int kBins = 256;
constexpr int kWindow = 1 << 16, kWords = kWindow / 32;  // positions a pass of the output

// Masses as unsigned numbers in the order of the rule: larger is better, NaN below all numbers, 0 is no token at all.
__device__ __forceinline__ uint32_t rank_of(float mass) {
  const uint32_t bits = __float_as_uint(mass == 0.0f ? 0.0f : mass);  // -0.0 equals 0.0
  const uint32_t ordered = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return mass != mass ? 1 : ordered;
}

struct SelectShared {
  uint32_t visual[kWords], kept[kWords];
  int before[kWords];  // survivors in the words before
  int histogram[kBins];
  int warp_total[32];
  int digit, rest, count;
};

__device__ __forceinline__ int lane_prefix(int x) {  // inclusive
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(kWholeWarp, x, delta);
    if (static_cast<int>(threadIdx.x % 32) >= delta) x += other;
  }
  return x;
}

// Counts one digit a lane; lanes with the same digit count as one, since many masses share theirs.
__device__ __forceinline__ void count_digit(int* histogram, int digit) {
  const unsigned same = lanes_with_same(digit);
  if (digit >= 0 && static_cast<int>(threadIdx.x % 32) == __ffs(same) - 1) atomicAdd(&histogram[digit], __popc(same));
}

// The digit at which the `wanted`-th entry falls, counting bins from the top (kDescending) or the bottom, into
// shared.digit; how many of that digit are wanted into shared.rest, how many there are into shared.count. One warp.
template <bool kDescending>
__device__ __forceinline__ void find_digit(SelectShared& shared, int wanted) {
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x;
  int bins[kEach], own = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bin = lane * kEach + i;
    bins[i] = shared.histogram[kDescending ? kBins - 1 - bin : bin];
    own += bins[i];
  }
  int before = lane_prefix(own) - own;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before < wanted && wanted <= before + bins[i]) {
      const int bin = lane * kEach + i;
      shared.digit = kDescending ? kBins - 1 - bin : bin;
      shared.rest = wanted - before, shared.count = bins[i];
    }
    before += bins[i];
  }
}

// The slots of a thread: every blockDim.x-th, from threadIdx.x on. Their ranks are registers; their positions are read
// again where they are needed, each time through a pointer that the compiler takes for new, or it would keep the
// addresses of all of them alive.
template <int kItems, int kThreads>
struct Slots {
  uint32_t rank[kItems];
  const int32_t* index;  // of the first slot
  int64_t step;
  int count;             // slots of the request

  // f(i, position) for each slot; `position` is to be called where the slot exists.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    const int32_t* at = opaque(index);
#pragma unroll
    for (int i = 0; i < kItems; ++i, at += step) f(i, [&] { return load_cached(at); });
  }
  __device__ __forceinline__ bool exists(int i) const { return i * kThreads + static_cast<int>(threadIdx.x) < count; }
};

// The `wanted`-th of 32-bit keys (wanted >= 1), found digit by digit: each(f) calls f(is candidate, key) for every slot of
// the thread. Returns the key; `rest` of the `count` equal ones are wanted.
struct Threshold {
  uint32_t key;
  int rest, count;
};
template <bool kDescending, class Each>
__device__ Threshold find_threshold(SelectShared& shared, int wanted, Each each) {
  Threshold found{0, wanted, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kBins) shared.histogram[threadIdx.x] = 0;
    __syncthreads();
    each([&](bool candidate, uint32_t key) {
      const bool same_prefix = shift == 24 || (key >> (shift + 8)) == (found.key >> (shift + 8));
      count_digit(shared.histogram, candidate && same_prefix ? static_cast<int>(key >> shift & 0xff) : -1);
    });
    __syncthreads();
    if (threadIdx.x < 32) find_digit<kDescending>(shared, found.rest);
    __syncthreads();
    found.key |= static_cast<uint32_t>(shared.digit) << shift;
    found.rest = shared.rest, found.count = shared.count;
    __syncthreads();
  }
  return found;
}

__device__ __forceinline__ int block_sum(SelectShared& shared, int x) {
  x = lane_prefix(x);
  if (threadIdx.x % 32 == 31) shared.warp_total[threadIdx.x / 32] = x;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) total += shared.warp_total[w];
  __syncthreads();
  return total;
}

// before[w]: set bits of word_of in the words before w, for w < words. Returns how many there are in all.
template <class F>
__device__ __forceinline__ int count_before(SelectShared& shared, int words, F word_of) {
  int total = 0;
  for (int first = 0; first < words; first += blockDim.x) {
    const int w = first + threadIdx.x, own = w < words ? __popc(word_of(w)) : 0;
    const int inclusive = lane_prefix(own);
    if (threadIdx.x % 32 == 31) shared.warp_total[threadIdx.x / 32] = inclusive;
    __syncthreads();
    int before = total;
    for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) {
      if (i < static_cast<int>(threadIdx.x / 32)) before += shared.warp_total[i];
      total += shared.warp_total[i];
    }
    if (w < words) shared.before[w] = before + inclusive - own;
    __syncthreads();
  }
  return total;
}

template <int kItems, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(const SelectArgs a) {
  allow_next_launch();
  auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const int request = blockIdx.x, length = static_cast<int>(a.length(request));
  const float* mass = a.mass + request * a.mass_batch;
  Slots<kItems, kThreads> slots{{}, a.visual.data + request * a.visual.batch_stride + threadIdx.x * a.visual.stride,
                                kThreads * a.visual.stride, static_cast<int>(a.visual.count)};
  int own = 0;
  // Positions first, then masses whatever the position: no load waits for another.
  slots.each([&](int i, auto position_of) { slots.rank[i] = slots.exists(i) ? position_of() : -1; });
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float value = slots.exists(i) ? mass[i * kThreads + threadIdx.x] : 0.0f;
    const int position = static_cast<int>(slots.rank[i]);
    slots.rank[i] = position >= 0 && position < length ? rank_of(value) : 0;
    own += slots.rank[i] != 0;
  }
  const int visual = block_sum(shared, own);
  const int64_t wanted = a.keep(request);
  const int keep = wanted < 0 ? 0 : wanted > visual ? visual : static_cast<int>(wanted);

  uint32_t lowest = 0xffffffffu;  // ranks above it are kept,
  int last_tie = -1;              // and those that equal it up to this position
  if (keep > 0) {
    const Threshold cut = find_threshold<true>(shared, keep, [&](auto f) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) f(slots.rank[i] != 0, slots.rank[i]);
    });
    lowest = cut.key, last_tie = 0x7fffffff;
    if (cut.rest < cut.count) {
      const Threshold tie = find_threshold<false>(shared, cut.rest, [&](auto f) {
        slots.each([&](int i, auto position_of) {
          const bool tied = slots.rank[i] == lowest;
          f(tied, tied ? static_cast<uint32_t>(position_of()) : 0);
        });
      });
      last_tie = static_cast<int>(tie.key);
    }
  }

  int64_t written = 0;
  int32_t* out = a.kept_index + request * a.out_len;
  for (int64_t begin = 0; begin < length; begin += kWindow) {
    const int positions = static_cast<int>(length - begin < kWindow ? length - begin : kWindow), words = ceil_div(positions, 32);
    for (int w = threadIdx.x; w < words; w += kThreads) shared.visual[w] = 0, shared.kept[w] = 0;
    __syncthreads();
    slots.each([&](int i, auto position_of) {
      const uint32_t rank = slots.rank[i];
      if (rank == 0) return;
      const int position = position_of();
      const int64_t place = position - begin;
      if (place < 0 || place >= positions) return;
      const unsigned bit = 1u << (place % 32);
      atomicOr(&shared.visual[place / 32], bit);
      if (rank > lowest || (rank == lowest && position <= last_tie)) atomicOr(&shared.kept[place / 32], bit);
    });
    __syncthreads();
    auto survivors = [&](int w) {
      const int rest = positions - 32 * w;
      const uint32_t inside = rest >= 32 ? 0xffffffffu : (1u << rest) - 1;
      return (~shared.visual[w] | shared.kept[w]) & inside;
    };
    const int found = count_before(shared, words, survivors);
    for (int p = threadIdx.x; p < positions; p += kThreads) {
      const uint32_t word = survivors(p / 32), bit = 1u << (p % 32);
      const int64_t place = written + shared.before[p / 32] + __popc(word & (bit - 1));
      if ((word & bit) && place < a.out_len) out[place] = static_cast<int32_t>(begin + p);
    }
    written += found;
    __syncthreads();
  }
  if (written > a.out_len) written = a.out_len;
  for (int64_t i = written + threadIdx.x; i < a.out_len; i += kThreads) out[i] = -1;
  if (threadIdx.x == 0) a.kept_lens[request] = static_cast<int32_t>(written);
}

}  // namespace sgl::cuda
