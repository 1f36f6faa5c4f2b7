// CPU kernels for the ops that sgl_kernels/registry.py declares: unpack tensors, allocate scratch, divide tasks among
// torch's threads.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/stable/library.h>

#include <memory>

#include "cpu/kernels.h"
#include "unpack.h"

namespace {

using sgl::ceil_div;
using sgl::OptionalTensor;
using sgl::Tensor;

// Work, in multiply-adds or copied words, below which a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 15;

template <class Args>
void run(sgl::Kernel<Args> kernel, const Args& args, int64_t tasks, int64_t work_per_task) {
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_task));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::make_unique_for_overwrite<T[]>(count);
}

void decode_attention(Tensor q, Tensor k, Tensor v, Tensor seq_lens, OptionalTensor visual_index, OptionalTensor mass,
                      OptionalTensor head_mass, double softmax_scale, Tensor out) {
  auto a = sgl::unpack_decode<sgl::DecodeArgs>(q, k, v, seq_lens, visual_index, mass, head_mass, softmax_scale, out);
  SGL_REQUIRE(a.dim <= sgl::kMaxHeadDim, "decode_attention");
  a.splits = ceil_div(a.slots, sgl::kKeyBlock);
  const int64_t rows = a.batch * a.heads;
  const bool keeps_probs = a.mass || a.head_mass;
  auto partial = scratch<float>(rows * a.splits * a.dim);
  auto statistics = scratch<float>(2 * rows * a.splits);
  auto probs = scratch<float>(keeps_probs ? rows * a.splits * sgl::kKeyBlock : 0);
  auto key_mass = scratch<float>(a.mass ? a.batch * a.splits * sgl::kKeyBlock : 0);
  a.partial = partial.get();
  a.split_max = statistics.get();
  a.split_scale = a.split_max + rows * a.splits;
  a.probs = keeps_probs ? probs.get() : nullptr;
  a.key_mass = key_mass.get();

  const sgl::Kernels& kernels = sgl::active_kernels();
  const int64_t group = a.heads / a.kv_heads;
  run(kernels.decode_split, a, a.batch * a.kv_heads * a.splits, 2 * group * sgl::kKeyBlock * a.dim / 8);
  run(kernels.decode_combine, a, rows, a.splits * a.dim);
  if (a.mass) run(kernels.decode_mass, a, a.batch, a.heads * a.slots / 8);
}

// The counted rows of every request, in the caller's order, without the padding.
void collect_rows(sgl::PrefillArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    int32_t count = 0;
    for (int64_t r = 0; r < a.query.count; ++r) {
      const int32_t row = a.query.at(b, r);
      if (row >= 0 && row < a.length) a.rows[b * a.query.count + count++] = row;
    }
    a.row_count[b] = count;
  }
}

void prefill_mass(Tensor q, Tensor k, Tensor query_index, Tensor visual_index, Tensor mass, OptionalTensor head_mass,
                  OptionalTensor softmax_lse, double softmax_scale) {
  auto a = sgl::unpack_prefill<sgl::PrefillArgs>(q, k, query_index, visual_index, mass, head_mass, softmax_lse,
                                                 softmax_scale);
  SGL_REQUIRE(a.dim <= sgl::kMaxHeadDim, "prefill_mass");
  const int64_t heads = a.batch * a.heads, rows = heads * a.query.count;
  a.key_blocks = a.lse ? 0 : ceil_div(a.length, sgl::kKeyBlock);
  a.slot_blocks = ceil_div(a.visual.count, sgl::kKeyBlock);
  auto row_list = scratch<int32_t>(a.batch * (a.query.count + 1));
  auto packed = scratch<float>(rows * a.dim);
  auto row_terms = scratch<float>(2 * rows);
  auto block_terms = scratch<float>(2 * rows * a.key_blocks);
  auto received = scratch<float>(heads * a.visual.count);
  a.rows = row_list.get(), a.row_count = a.rows + a.batch * a.query.count;
  a.packed = packed.get();
  a.row_shift = row_terms.get(), a.row_factor = a.row_shift + rows;
  a.block_max = block_terms.get(), a.block_sum = a.block_max + rows * a.key_blocks;
  a.received = received.get();
  collect_rows(a);

  const sgl::Kernels& kernels = sgl::active_kernels();
  const int64_t block_work = a.heads / a.kv_heads * a.query.count * sgl::kKeyBlock * a.dim / 8;
  run(kernels.prefill_pack, a, heads, a.query.count * a.dim);
  if (!a.lse) run(kernels.prefill_denominator, a, a.batch * a.kv_heads * a.key_blocks, block_work);
  run(kernels.prefill_rows, a, heads, a.query.count * (a.key_blocks + 1));
  run(kernels.prefill_received, a, a.batch * a.kv_heads * a.slot_blocks, block_work);
  run(kernels.prefill_mass, a, a.batch * a.slot_blocks, a.heads * sgl::kKeyBlock);
}

void select(const sgl::SelectArgs& a) {
  torch::stable::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      a.kept_lens[b] = sgl::select_tokens(a.mass + b * a.mass_batch, a.visual, b, a.length(b), a.keep(b),
                                          a.kept_index + b * a.out_len, a.out_len);
  });
}

void select_tokens(Tensor mass, Tensor visual_index, Tensor seq_lens, int64_t num_keep, OptionalTensor num_keep_each,
                   Tensor kept_index, Tensor kept_lens) {
  select(sgl::unpack_selection(mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index, kept_lens, INT32_MAX));
}

void prune_gather(Tensor hidden, Tensor mass, Tensor visual_index, Tensor seq_lens, int64_t num_keep,
                  OptionalTensor num_keep_each, std::vector<Tensor> extras, Tensor hidden_out, Tensor kept_index,
                  Tensor kept_lens, std::vector<Tensor> extras_out) {
  SGL_REQUIRE(hidden.dim() == 3 && hidden.size(0) == mass.size(0), "prune_gather");
  const auto selection = sgl::unpack_selection(mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index,
                                               kept_lens, hidden.size(1));
  select(selection);
  const auto planes = sgl::unpack_planes(hidden, extras, hidden_out, extras_out, selection.out_len);
  const sgl::GatherArgs a{planes.data(), static_cast<int64_t>(planes.size()), selection.kept_index, selection.out_len};
  run(sgl::active_kernels().gather_rows, a, selection.batch * selection.out_len, planes[0].row_bytes / 4);
}

void run_vocabulary(sgl::VocabArgs& a) {
  a.blocks = ceil_div(a.vocab, sgl::kVocabBlock);
  auto terms = scratch<float>(2 * a.rows * a.blocks);
  a.block_max = terms.get(), a.block_sum = a.block_max + a.rows * a.blocks;
  const sgl::Kernels& kernels = sgl::active_kernels();
  run(kernels.vocab_block, a, a.rows * a.blocks, sgl::kVocabBlock);
  run(kernels.vocab_finish, a, a.rows, sgl::kVocabBlock);
}

void greedy_token(Tensor logits, Tensor token, Tensor logprob) {
  auto a = sgl::unpack_vocabulary<sgl::VocabArgs>(logits, logprob, "greedy_token");
  sgl::unpack_token(a, token);
  run_vocabulary(a);
}

void token_logprobs(Tensor logits, Tensor targets, Tensor logprob) {
  auto a = sgl::unpack_vocabulary<sgl::VocabArgs>(logits, logprob, "token_logprobs");
  sgl::unpack_targets(a, targets);
  run_vocabulary(a);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = SGL_COMPILER;
  info["flags"] = SGL_FLAGS;
  info["torch_built_against"] = SGL_TORCH_VERSION;
  info["isas"] = sgl::available_isas();
  info["isa"] = sgl::active_kernels().isa;
  info["isa_refused"] = sgl::refused_isa();
  info["cpu_features"] = sgl::cpu_features();
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sgl_vlm, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("prefill_mass", TORCH_BOX(&prefill_mass));
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("prune_gather", TORCH_BOX(&prune_gather));
  m.impl("greedy_token", TORCH_BOX(&greedy_token));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sgl_kernels; importing the module registers them.";
  m.def("build_info", &build_info, "Compiler, flags, torch version, vector widths and CPU features, as a dict.");
  m.def("set_isa", &sgl::set_isa, "Choose the vector width, for tests: one of build_info()['isas'].");
}
