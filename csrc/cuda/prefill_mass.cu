// Chooses kernels for prefill mass by dtype, head dim and alignment: never by values.
#include "prefill_fma.cuh"
#include "prefill_mass.cuh"

namespace sgl::cuda {
namespace {

using Kernel = void (*)(const PrefillArgs);

struct Kernels {
  Kernel statistics, received;
  int rows;         // of the prompt that a pass of `statistics` merges in shared memory
  int keys, warps;  // a block of `received`
};
constexpr int kFewSlots = 2048;  // up to here blocks of 16 keys are needed to fill a GPU

template <class T>
bool aligned(const PrefillArgs& a) {
  const auto addresses = reinterpret_cast<uintptr_t>(a.q) | reinterpret_cast<uintptr_t>(a.k);
  const int64_t strides = a.q_batch | a.q_head | a.q_row | a.k_batch | a.k_head | a.k_row;
  return addresses % 16 == 0 && strides % kPiece<T> == 0 && a.dim % kPiece<T> == 0;
}

template <class T, int kDim>
Kernels choose(const PrefillArgs& a) {
  if constexpr (sizeof(T) == 2) {
    if (aligned<T>(a)) {
      constexpr Kernel statistics = prefill_row_statistics<T, kDim>;
      constexpr int kRows = 8 * kRowTiles<T, kDim>;
      if constexpr (kDim > 128)
        return {statistics, prefill_received<T, kDim, 1, 8>, kRows, 16, 8};
      else if (a.visual.count <= kFewSlots) return {statistics, prefill_received<T, kDim, 1, 16>, kRows, 16, 16};
      else
        return {statistics, prefill_received<T, kDim, 2, 8>, kRows, 32, 8};
    }
  } else if (aligned<T>(a)) {
    return {prefill_row_statistics_fma<T, kDim, true>, prefill_received_fma<T, kDim, true>, 0, kFmaKeys, kReceivedFmaWarps};
  }
  return {prefill_row_statistics_fma<T, kDim, false>, prefill_received_fma<T, kDim, false>, 0, kFmaKeys, kReceivedFmaWarps};
}

template <class T>
Kernels choose(const PrefillArgs& a) {
  return a.dim <= 64 ? choose<T, 64>(a) : a.dim <= 128 ? choose<T, 128>(a) : choose<T, 256>(a);
}

int compute_lse(const PrefillArgs& a, const Kernels& kernels, void* stream) {
  const auto heads = static_cast<unsigned>(a.heads), batch = static_cast<unsigned>(a.batch);
  const auto shared = 2 * kLseWarps * kernels.rows * sizeof(float);
  const Launch statistics{dim3{static_cast<unsigned>(a.max_splits), heads, batch}, 32 * kLseWarps, shared};
  if (const int error = launch(statistics, stream, kernels.statistics, a); error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(a.query.count, 128));
  return launch({dim3{blocks, heads, batch}, 128, 0, true}, stream, prefill_row_lse, a);
}

}  // namespace

int prefill_mass(const PrefillArgs& a, void* stream) {
  const Kernels kernels = a.dtype == Dtype::f32 ? choose<float>(a) : a.dtype == Dtype::bf16 ? choose<bf16>(a) : choose<f16>(a);
  if (a.query.count == 0 || a.length == 0 || a.heads == 0) return cudaSuccess;
  if (!a.lse)
    if (const int error = compute_lse(a, kernels, stream); error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(a.visual.count, kernels.keys));
  const size_t shared = (static_cast<size_t>(a.heads) * kernels.keys + kHeadParts * kernels.keys) * sizeof(float);
  const Launch received{dim3{blocks, static_cast<unsigned>(a.batch), 1}, 32 * kernels.warps, shared, a.lse == nullptr};
  return launch(received, stream, kernels.received, a);
}

}  // namespace sgl::cuda
