// Chooses kernels for greedy_token and token_logprobs by dtype and alignment.
#include "vocabulary.cuh"

namespace sgl::cuda {
namespace {

template <class T>
int run(const VocabArgs& a, void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0 && a.row_stride % kPiece<T> == 0 && a.vocab % kPiece<T> == 0;
  const dim3 grid{static_cast<unsigned>(a.blocks), static_cast<unsigned>(a.rows), 1};
  const Launch blocks{grid, kVocabThreads, kVocabWarps * (2 * sizeof(float) + sizeof(int))};
  const int error = launch(blocks, stream, aligned ? vocabulary_block<T, true> : vocabulary_block<T, false>, a);
  if (error != cudaSuccess) return error;
  return launch({dim3{static_cast<unsigned>(a.rows), 1, 1}, 32, 0, true}, stream, vocabulary_finish<T>, a);
}

}  // namespace

int vocabulary(const VocabArgs& a, void* stream) {
  switch (a.dtype) {
    case Dtype::f32:
      return run<float>(a, stream);
    case Dtype::bf16:
      return run<bf16>(a, stream);
    default:
      return run<f16>(a, stream);
  }
}

}  // namespace sgl::cuda
