// Launches of select_tokens and of the gather that follows it in prune_gather; the kernel of the selection is chosen by
// the number of visual slots.
#include "gather_rows.cuh"
#include "select_tokens.cuh"

namespace sgl::cuda {

namespace {

template <int kItems, int kThreads>
int launch_select(const SelectArgs& a, void* stream) {
  const Launch shape{dim3{static_cast<unsigned>(a.batch), 1, 1}, kThreads, sizeof(SelectShared)};
  return launch(shape, stream, select_kernel<kItems, kThreads>, a);
}

}  // namespace

int select_tokens(const SelectArgs& a, void* stream) {
  static_assert(kMaxVisual == 64 * 512);
  const int64_t slots = a.visual.count;
  if (slots <= 2 * 1024) return launch_select<2, 1024>(a, stream);
  if (slots <= 4 * 1024) return launch_select<4, 1024>(a, stream);
  if (slots <= 32 * 512) return launch_select<32, 512>(a, stream);  // more registers a thread
  return launch_select<64, 512>(a, stream);
}

int gather_rows(const GatherArgs& a, void* stream) {
  const dim3 grid{static_cast<unsigned>(a.out_len), static_cast<unsigned>(a.batch), 1};
  return launch({grid, kGatherThreads, 0, true}, stream, gather_kernel, a);
}

}  // namespace sgl::cuda
