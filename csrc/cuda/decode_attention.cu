// Chooses kernels for decode attention by dtype, head dim, group and alignment: never by values.
#include "decode_attention.cuh"
#include "decode_combine.cuh"
#include "decode_fma.cuh"

namespace sgl::cuda {
namespace {

template <class T>
bool aligned(const DecodeArgs& a) {
  constexpr int n = kPiece<T>;
  const auto addresses = reinterpret_cast<uintptr_t>(a.q) | reinterpret_cast<uintptr_t>(a.k) | reinterpret_cast<uintptr_t>(a.v);
  const int64_t strides = a.q_batch | a.q_head | a.k_batch | a.k_head | a.k_slot | a.v_batch | a.v_head | a.v_slot;
  return addresses % 16 == 0 && strides % n == 0 && a.dim % n == 0;
}

Launch split_launch(const DecodeArgs& a, int heads_a_block, int shared_bytes) {
  const int tiles = ceil_div(a.heads / a.kv_heads, heads_a_block);
  return {dim3{static_cast<unsigned>(a.max_splits), static_cast<unsigned>(a.kv_heads * tiles), static_cast<unsigned>(a.batch)},
          32 * kDecodeWarps, static_cast<size_t>(shared_bytes)};
}

template <class T, int kDim>
int launch_split(const DecodeArgs& a, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (aligned<T>(a)) {
      if constexpr (kDim <= 128) {  // 16 heads of 256 dimensions do not fit the registers
        if (a.heads / a.kv_heads > 8)
          return launch(split_launch(a, 16, kDecodeShared<2, kDim>), stream, decode_split<T, kDim, 2>, a);
      }
      return launch(split_launch(a, 8, kDecodeShared<1, kDim>), stream, decode_split<T, kDim, 1>, a);
    }
  } else if (aligned<T>(a)) {
    return launch(split_launch(a, 8, kDecodeFmaShared<kDim>), stream, decode_split_fma<T, kDim, true>, a);
  }
  return launch(split_launch(a, 8, kDecodeFmaShared<kDim>), stream, decode_split_fma<T, kDim, false>, a);
}

template <class T>
int run(const DecodeArgs& a, void* stream) {
  const auto split = a.dim <= 64 ? launch_split<T, 64> : a.dim <= 128 ? launch_split<T, 128> : launch_split<T, 256>;
  if (const int error = split(a, stream); error != cudaSuccess) return error;
  const int mass_blocks = a.logits ? static_cast<int>(ceil_div<int64_t>(a.visual.count, kMassSlots)) : 0;
  const dim3 grid{static_cast<unsigned>(a.heads + mass_blocks), static_cast<unsigned>(a.batch), 1};
  const Launch combine{grid, kCombineThreads, static_cast<size_t>(combine_shared(a)), a.max_splits > 0};
  return launch(combine, stream, decode_combine<T>, a);
}

}  // namespace

int decode_attention(const DecodeArgs& a, void* stream) {
  switch (a.dtype) {
    case Dtype::f32:
      return run<float>(a, stream);
    case Dtype::bf16:
      return run<bf16>(a, stream);
    default:
      return run<f16>(a, stream);
  }
}

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // namespace sgl::cuda
