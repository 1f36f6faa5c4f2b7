// CUDA kernels for the ops that sgl_kernels/registry.py declares: unpack tensors, allocate scratch from torch's allocator
// (so that a captured graph owns it), launch on torch's current stream. Compiled with SGL_EMULATED it registers the
// same kernels, run by tests/cuda/emulator, for the CPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <climits>
#include <string>

#include "cuda/kernels.h"
#include "unpack.h"

namespace {

using sgl::ceil_div;
using sgl::OptionalTensor;
using sgl::ScalarType;
using sgl::Tensor;

#ifdef SGL_EMULATED
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
struct OnDevice {  // makes the device of a tensor current
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
};
#endif

void check(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", sgl::cuda::error_name(error), " at launch");
}

// Kernels count with ints; grids have at most 65535 blocks in y and z.
void check_int(const char* op, std::initializer_list<int64_t> counts, std::initializer_list<int64_t> blocks) {
  for (const int64_t n : counts) STD_TORCH_CHECK(n <= INT_MAX, op, ": a size is ", n, ", the CUDA kernels take at most ", INT_MAX);
  for (const int64_t n : blocks) STD_TORCH_CHECK(n <= 65535, op, ": a batch or head count is ", n, ", the CUDA kernels take at most 65535");
}

void check_dim(const char* op, int64_t dim) {
  STD_TORCH_CHECK(dim <= sgl::cuda::kMaxHeadDim, op, ": head dim is ", dim, ", the CUDA kernels take at most ",
                  sgl::cuda::kMaxHeadDim, "; set SGL_KERNELS_BACKEND=reference");
}

void check_selection(const char* op, const sgl::SelectArgs& a) {
  check_int(op, {a.out_len}, {a.batch});
  STD_TORCH_CHECK(a.visual.count <= sgl::cuda::kMaxVisual, op, ": ", a.visual.count, " visual slots, the CUDA kernels take at most ",
                  sgl::cuda::kMaxVisual, "; set SGL_KERNELS_BACKEND=reference");
}

Tensor scratch(const Tensor& like, int64_t floats) {
  return torch::stable::new_empty(like, {std::max<int64_t>(1, floats)}, ScalarType::Float);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

void decode_attention(Tensor q, Tensor k, Tensor v, Tensor seq_lens, OptionalTensor visual_index, OptionalTensor mass,
                      OptionalTensor head_mass, double softmax_scale, Tensor out) {
  constexpr auto op = "decode_attention";
  auto a = sgl::unpack_decode<sgl::cuda::DecodeArgs>(q, k, v, seq_lens, visual_index, mass, head_mass, softmax_scale, out);
  check_dim(op, q.size(2));
  check_int(op, {k.size(2)}, {q.size(0), q.size(1)});
  const OnDevice device(q);
  a.max_splits = sgl::cuda::most_splits(a.slots);
  const int64_t heads = q.size(0) * q.size(1), splits = heads * a.max_splits;
  const Tensor partial = scratch(q, splits * a.dim), statistics = scratch(q, 2 * splits);
  const Tensor logits = scratch(q, a.mass || a.head_mass ? heads * a.slots : 0);
  a.partial = floats(partial), a.statistics = floats(statistics);
  a.logits = a.mass || a.head_mass ? floats(logits) : nullptr;
  check(sgl::cuda::decode_attention(a, device.stream), op);
}

void prefill_mass(Tensor q, Tensor k, Tensor query_index, Tensor visual_index, Tensor mass, OptionalTensor head_mass,
                  OptionalTensor softmax_lse, double softmax_scale) {
  constexpr auto op = "prefill_mass";
  auto a = sgl::unpack_prefill<sgl::cuda::PrefillArgs>(q, k, query_index, visual_index, mass, head_mass, softmax_lse,
                                                       softmax_scale);
  check_dim(op, q.size(3));
  check_int(op, {q.size(2), query_index.size(1), visual_index.size(1)}, {q.size(0), q.size(1)});
  const OnDevice device(q);
  a.max_splits = a.lse ? 0 : ceil_div(a.length, sgl::cuda::kLseSplit);
  const int64_t rows = q.size(0) * q.size(1) * query_index.size(1);
  const Tensor statistics = scratch(q, 2 * rows * a.max_splits), row_lse = scratch(q, rows);
  a.statistics = floats(statistics), a.row_lse = floats(row_lse);
  check(sgl::cuda::prefill_mass(a, device.stream), op);
}

void select_tokens(Tensor mass, Tensor visual_index, Tensor seq_lens, int64_t num_keep, OptionalTensor num_keep_each,
                   Tensor kept_index, Tensor kept_lens) {
  constexpr auto op = "select_tokens";
  const auto a = sgl::unpack_selection(mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index, kept_lens, INT32_MAX);
  check_selection(op, a);
  const OnDevice device(mass);
  check(sgl::cuda::select_tokens(a, device.stream), op);
}

void prune_gather(Tensor hidden, Tensor mass, Tensor visual_index, Tensor seq_lens, int64_t num_keep,
                  OptionalTensor num_keep_each, std::vector<Tensor> extras, Tensor hidden_out, Tensor kept_index,
                  Tensor kept_lens, std::vector<Tensor> extras_out) {
  constexpr auto op = "prune_gather";
  SGL_REQUIRE(hidden.dim() == 3 && hidden.size(0) == mass.size(0), "prune_gather");
  const auto selection = sgl::unpack_selection(mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index,
                                               kept_lens, hidden.size(1));
  check_selection(op, selection);
  const auto planes = sgl::unpack_planes(hidden, extras, hidden_out, extras_out, selection.out_len);
  const OnDevice device(hidden);
  check(sgl::cuda::select_tokens(selection, device.stream), op);
  for (size_t first = 0; first < planes.size(); first += sgl::cuda::kMaxPlanes) {
    sgl::cuda::GatherArgs a{};
    a.batch = selection.batch, a.out_len = selection.out_len, a.kept = selection.kept_index;
    a.planes = std::min<size_t>(planes.size() - first, sgl::cuda::kMaxPlanes);
    std::copy_n(planes.begin() + first, a.planes, a.plane);
    check(sgl::cuda::gather_rows(a, device.stream), op);
  }
}

void run_vocabulary(sgl::cuda::VocabArgs& a, const Tensor& logits, const char* op) {
  check_int(op, {logits.size(1)}, {logits.size(0)});
  const OnDevice device(logits);
  a.blocks = ceil_div(a.vocab, sgl::cuda::kVocabBlock);
  const Tensor terms = scratch(logits, int64_t{4} * a.rows * a.blocks);
  a.block_terms = floats(terms);
  check(sgl::cuda::vocabulary(a, device.stream), op);
}

void greedy_token(Tensor logits, Tensor token, Tensor logprob) {
  auto a = sgl::unpack_vocabulary<sgl::cuda::VocabArgs>(logits, logprob, "greedy_token");
  sgl::unpack_token(a, token);
  run_vocabulary(a, logits, "greedy_token");
}

void token_logprobs(Tensor logits, Tensor targets, Tensor logprob) {
  auto a = sgl::unpack_vocabulary<sgl::cuda::VocabArgs>(logits, logprob, "token_logprobs");
  sgl::unpack_targets(a, targets);
  run_vocabulary(a, logits, "token_logprobs");
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = SGL_COMPILER;
  info["cuda"] = SGL_CUDA_VERSION;
  info["architectures"] = SGL_CUDA_ARCHITECTURES;
  info["torch_built_against"] = SGL_TORCH_VERSION;
  return info;
}

}  // namespace

#ifdef SGL_EMULATED
#define SGL_DISPATCH_KEY CPU
#else
#define SGL_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(sgl_vlm, SGL_DISPATCH_KEY, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("prefill_mass", TORCH_BOX(&prefill_mass));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("prune_gather", TORCH_BOX(&prune_gather));
  m.impl("greedy_token", TORCH_BOX(&greedy_token));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
}

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of sgl_kernels; importing the module registers them.";
  m.def("build_info", &build_info, "Compiler, CUDA version, architectures and torch version, as a dict.");
}
