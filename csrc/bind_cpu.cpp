// CPU kernels for the ops that sgl_kernels/registry.py declares: unpack tensors, allocate scratch, divide tasks among
// torch's threads. The Python functions have checked the arguments and explain errors; the checks here only keep a
// direct call of torch.ops.sgl_vlm from reading outside a tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace {

using sgl::ceil_div;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define SGL_REQUIRE(condition, op) STD_TORCH_CHECK(condition, op ": arguments do not fit: expected " #condition)

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

sgl::Dtype float_dtype(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return sgl::Dtype::f32;
    case ScalarType::BFloat16:
      return sgl::Dtype::bf16;
    case ScalarType::Half:
      return sgl::Dtype::f16;
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16");
  }
}

bool is(const Tensor& t, ScalarType dtype, int64_t dims) { return t.scalar_type() == dtype && t.dim() == dims; }

bool rows_contiguous(const Tensor& t) { return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 || t.numel() == 0; }

sgl::Index index_of(const Tensor& t, int64_t batch, const char* op) {
  STD_TORCH_CHECK(is(t, ScalarType::Int, 2) && t.size(0) == batch, op, ": expected an int32 index (batch, count)");
  return {static_cast<const int32_t*>(t.data_ptr()), t.stride(0), t.stride(1), t.size(1)};
}

template <class Args>
void set_mass(Args& a, const OptionalTensor& mass, const OptionalTensor& head_mass) {
  if (mass) {
    SGL_REQUIRE(is(*mass, ScalarType::Float, 2) && mass->size(0) == a.batch, "mass");
    SGL_REQUIRE(mass->size(1) == a.visual.count && rows_contiguous(*mass), "mass");
    a.mass = static_cast<float*>(mass->data_ptr());
    a.mass_batch = mass->stride(0);
  }
  if (head_mass) {
    SGL_REQUIRE(is(*head_mass, ScalarType::Float, 3) && head_mass->size(0) == a.batch, "head_mass");
    SGL_REQUIRE(head_mass->size(1) == a.heads && head_mass->size(2) == a.visual.count, "head_mass");
    SGL_REQUIRE(rows_contiguous(*head_mass), "head_mass");
    a.head_mass = static_cast<float*>(head_mass->data_ptr());
    a.head_mass_batch = head_mass->stride(0);
    a.head_mass_head = head_mass->stride(1);
  }
}

void decode_attention(Tensor q, Tensor k, Tensor v, Tensor seq_lens, OptionalTensor visual_index, OptionalTensor mass,
                      OptionalTensor head_mass, double softmax_scale, Tensor out) {
  constexpr auto op = "decode_attention";
  sgl::DecodeArgs a{};
  a.dtype = float_dtype(q, op);
  SGL_REQUIRE(q.dim() == 3 && k.dim() == 4 && v.dim() == 4 && out.dim() == 3, "decode_attention");
  a.batch = q.size(0), a.heads = q.size(1), a.dim = q.size(2);
  a.kv_heads = k.size(1), a.slots = k.size(2);
  SGL_REQUIRE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "decode_attention");
  SGL_REQUIRE(k.size(0) == a.batch && k.size(3) == a.dim && a.dim <= sgl::kMaxHeadDim, "decode_attention");
  SGL_REQUIRE(v.size(0) == a.batch && v.size(1) == a.kv_heads && v.size(2) == a.slots, "decode_attention");
  SGL_REQUIRE(v.size(3) == a.dim && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "decode_attention");
  SGL_REQUIRE(rows_contiguous(q) && rows_contiguous(k) && rows_contiguous(v), "decode_attention");
  SGL_REQUIRE(is(seq_lens, ScalarType::Int, 1) && seq_lens.size(0) == a.batch, "decode_attention");
  SGL_REQUIRE(out.scalar_type() == q.scalar_type() && out.is_contiguous(), "decode_attention");
  SGL_REQUIRE(out.numel() == a.batch * a.heads * a.dim, "decode_attention");
  a.scale = static_cast<float>(softmax_scale);
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.q_batch = q.stride(0), a.q_head = q.stride(1);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_slot = k.stride(2);
  a.v_batch = v.stride(0), a.v_head = v.stride(1), a.v_slot = v.stride(2);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  a.seq_lens_stride = seq_lens.stride(0);
  if (visual_index) a.visual = index_of(*visual_index, a.batch, op);
  set_mass(a, mass, head_mass);

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
  constexpr auto op = "prefill_mass";
  sgl::PrefillArgs a{};
  a.dtype = float_dtype(q, op);
  SGL_REQUIRE(q.dim() == 4 && k.dim() == 4 && k.scalar_type() == q.scalar_type(), "prefill_mass");
  a.batch = q.size(0), a.heads = q.size(1), a.length = q.size(2), a.dim = q.size(3);
  a.kv_heads = k.size(1);
  SGL_REQUIRE(k.size(0) == a.batch && k.size(2) == a.length && k.size(3) == a.dim, "prefill_mass");
  SGL_REQUIRE(a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.dim <= sgl::kMaxHeadDim, "prefill_mass");
  SGL_REQUIRE(rows_contiguous(q) && rows_contiguous(k), "prefill_mass");
  a.scale = static_cast<float>(softmax_scale);
  a.q = q.data_ptr(), a.k = k.data_ptr();
  a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_row = q.stride(2);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_row = k.stride(2);
  a.query = index_of(query_index, a.batch, op);
  a.visual = index_of(visual_index, a.batch, op);
  set_mass(a, mass, head_mass);
  if (softmax_lse) {
    SGL_REQUIRE(is(*softmax_lse, ScalarType::Float, 3) && softmax_lse->size(0) == a.batch, "prefill_mass");
    SGL_REQUIRE(softmax_lse->size(1) == a.heads && softmax_lse->size(2) == a.length, "prefill_mass");
    a.lse = static_cast<const float*>(softmax_lse->data_ptr());
    a.lse_batch = softmax_lse->stride(0), a.lse_head = softmax_lse->stride(1), a.lse_row = softmax_lse->stride(2);
  }

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

void select(const Tensor& mass, const Tensor& visual_index, const Tensor& seq_lens, int64_t num_keep,
            const OptionalTensor& num_keep_each, const Tensor& kept_index, const Tensor& kept_lens, int64_t max_len) {
  constexpr auto op = "select_tokens";
  SGL_REQUIRE(is(mass, ScalarType::Float, 2) && rows_contiguous(mass), "select_tokens");
  const int64_t batch = mass.size(0);
  const sgl::Index visual = index_of(visual_index, batch, op);
  SGL_REQUIRE(mass.size(1) == visual.count, "select_tokens");
  SGL_REQUIRE(is(seq_lens, ScalarType::Int, 1) && seq_lens.size(0) == batch, "select_tokens");
  SGL_REQUIRE(is(kept_index, ScalarType::Int, 2) && kept_index.size(0) == batch, "select_tokens");
  SGL_REQUIRE(is(kept_lens, ScalarType::Int, 1) && kept_lens.size(0) == batch, "select_tokens");
  SGL_REQUIRE(kept_index.is_contiguous() && kept_lens.is_contiguous(), "select_tokens");
  const int32_t* each = nullptr;
  int64_t each_stride = 0;
  if (num_keep_each) {
    SGL_REQUIRE(is(*num_keep_each, ScalarType::Int, 1) && num_keep_each->size(0) == batch, "select_tokens");
    each = static_cast<const int32_t*>(num_keep_each->data_ptr());
    each_stride = num_keep_each->stride(0);
  }
  const auto* masses = static_cast<const float*>(mass.data_ptr());
  const auto* lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t mass_stride = mass.stride(0), lens_stride = seq_lens.stride(0), out_len = kept_index.size(1);
  auto* kept = static_cast<int32_t*>(kept_index.data_ptr());
  auto* counts = static_cast<int32_t*>(kept_lens.data_ptr());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t length = std::min<int64_t>(lens[b * lens_stride], max_len);
      const int64_t keep = each ? each[b * each_stride] : num_keep;
      counts[b] = sgl::select_tokens(masses + b * mass_stride, visual, b, length, keep, kept + b * out_len, out_len);
    }
  });
}

void select_tokens(Tensor mass, Tensor visual_index, Tensor seq_lens, int64_t num_keep, OptionalTensor num_keep_each,
                   Tensor kept_index, Tensor kept_lens) {
  select(mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index, kept_lens, INT32_MAX);
}

sgl::Plane plane_of(const Tensor& source, const Tensor& target, int64_t batch, int64_t length, int64_t out_len) {
  SGL_REQUIRE(source.dim() >= 2 && source.size(0) == batch && source.size(1) == length, "prune_gather");
  SGL_REQUIRE(target.dim() >= 2 && target.size(0) == batch && target.size(1) == out_len, "prune_gather");
  SGL_REQUIRE(source.scalar_type() == target.scalar_type() && target.is_contiguous(), "prune_gather");
  SGL_REQUIRE(source.dim() == target.dim(), "prune_gather");
  const int64_t element = source.element_size();
  const bool unread = source.numel() == 0;  // then any strides will do, and .contiguous() changes none
  int64_t row = 1;
  for (int64_t d = source.dim() - 1; d >= 2; --d) {
    SGL_REQUIRE(source.size(d) == target.size(d), "prune_gather");
    SGL_REQUIRE(unread || source.size(d) == 1 || source.stride(d) == row, "prune_gather");
    row *= source.size(d);
  }
  return {static_cast<const char*>(source.data_ptr()), source.stride(0) * element, source.stride(1) * element,
          static_cast<char*>(target.data_ptr()), row * element};
}

void prune_gather(Tensor hidden, Tensor mass, Tensor visual_index, Tensor seq_lens, int64_t num_keep,
                  OptionalTensor num_keep_each, std::vector<Tensor> extras, Tensor hidden_out, Tensor kept_index,
                  Tensor kept_lens, std::vector<Tensor> extras_out) {
  SGL_REQUIRE(hidden.dim() == 3 && hidden.size(0) == mass.size(0), "prune_gather");
  SGL_REQUIRE(extras.size() == extras_out.size(), "prune_gather");
  const int64_t batch = hidden.size(0), length = hidden.size(1);
  select(mass, visual_index, seq_lens, num_keep, num_keep_each, kept_index, kept_lens, length);
  const int64_t out_len = kept_index.size(1);
  std::vector<sgl::Plane> planes{plane_of(hidden, hidden_out, batch, length, out_len)};
  for (size_t i = 0; i < extras.size(); ++i)
    planes.push_back(plane_of(extras[i], extras_out[i], batch, length, out_len));
  const auto* kept = static_cast<const int32_t*>(kept_index.data_ptr());
  const sgl::GatherArgs a{planes.data(), static_cast<int64_t>(planes.size()), kept, out_len};
  run(sgl::active_kernels().gather_rows, a, batch * out_len, planes[0].row_bytes / 4);
}

void run_vocabulary(sgl::VocabArgs& a, const Tensor& logits, const Tensor& logprob, const char* op) {
  a.dtype = float_dtype(logits, op);
  STD_TORCH_CHECK(logits.dim() == 2 && rows_contiguous(logits) && logits.size(1) > 0, op, ": logits do not fit");
  a.rows = logits.size(0), a.vocab = logits.size(1), a.row_stride = logits.stride(0);
  a.logits = logits.data_ptr();
  STD_TORCH_CHECK(is(logprob, ScalarType::Float, 1) && logprob.size(0) == a.rows && logprob.is_contiguous(), op,
                  ": logprob does not fit");
  a.logprob = static_cast<float*>(logprob.data_ptr());
  a.blocks = ceil_div(a.vocab, sgl::kVocabBlock);
  auto terms = scratch<float>(2 * a.rows * a.blocks);
  a.block_max = terms.get(), a.block_sum = a.block_max + a.rows * a.blocks;
  const sgl::Kernels& kernels = sgl::active_kernels();
  run(kernels.vocab_block, a, a.rows * a.blocks, sgl::kVocabBlock);
  run(kernels.vocab_finish, a, a.rows, sgl::kVocabBlock);
}

void greedy_token(Tensor logits, Tensor token, Tensor logprob) {
  sgl::VocabArgs a{};
  SGL_REQUIRE(is(token, ScalarType::Long, 1) && token.size(0) == logits.size(0), "greedy_token");
  SGL_REQUIRE(token.is_contiguous(), "greedy_token");
  a.token = static_cast<int64_t*>(token.data_ptr());
  run_vocabulary(a, logits, logprob, "greedy_token");
}

void token_logprobs(Tensor logits, Tensor targets, Tensor logprob) {
  sgl::VocabArgs a{};
  a.targets_are_64 = targets.scalar_type() == ScalarType::Long;
  SGL_REQUIRE(a.targets_are_64 || targets.scalar_type() == ScalarType::Int, "token_logprobs");
  SGL_REQUIRE(targets.dim() == 1 && targets.size(0) == logits.size(0), "token_logprobs");
  a.targets = targets.data_ptr();
  a.targets_stride = targets.stride(0);
  run_vocabulary(a, logits, logprob, "token_logprobs");
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
