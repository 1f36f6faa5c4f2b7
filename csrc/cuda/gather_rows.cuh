// The gather of prune_gather: one block an output row copies that row of every plane, hidden states and extras alike, in
// the widest words that its addresses allow. Each kept byte is read once and written once; rows past the kept ones are
// written as zeros.
#pragma once

#include "primitives.cuh"

namespace sgl::cuda {

constexpr int kGatherThreads = 256, kGatherUnroll = 4;

template <class Word>
__device__ __forceinline__ void copy_row(const char* source, char* target, int64_t bytes, bool present) {
  const auto* from = reinterpret_cast<const Word*>(source);
  auto* to = reinterpret_cast<Word*>(target);
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t first = threadIdx.x; first < words; first += kGatherUnroll * kGatherThreads) {
    Word word[kGatherUnroll];
#pragma unroll
    for (int i = 0; i < kGatherUnroll; ++i) {
      word[i] = Word{};
      if (const int64_t w = first + i * kGatherThreads; present && w < words) word[i] = from[w];
    }
#pragma unroll
    for (int i = 0; i < kGatherUnroll; ++i)
      if (const int64_t w = first + i * kGatherThreads; w < words) to[w] = word[i];
  }
}

__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const GatherArgs a) {
  wait_for_previous_launch();
  const int request = blockIdx.y;
  const int64_t row = static_cast<int64_t>(request) * a.out_len + blockIdx.x;
  const int position = a.kept[row];
  for (int p = 0; p < a.planes; ++p) {
    const Plane& plane = a.plane[p];
    const char* source = plane.source + request * plane.source_batch + position * plane.source_row;
    char* target = plane.target + row * plane.row_bytes;
    const auto unaligned = reinterpret_cast<uintptr_t>(plane.source) | reinterpret_cast<uintptr_t>(plane.target) |
                           static_cast<uintptr_t>(plane.source_batch | plane.source_row | plane.row_bytes);
    const bool present = position >= 0;
    if (unaligned % 16 == 0)
      copy_row<uint4>(source, target, plane.row_bytes, present);
    else if (unaligned % 4 == 0)
      copy_row<uint32_t>(source, target, plane.row_bytes, present);
    else
      copy_row<unsigned char>(source, target, plane.row_bytes, present);
  }
}

}  // namespace sgl::cuda
