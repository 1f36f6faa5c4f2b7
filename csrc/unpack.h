// Tensors of the ops that sgl_kernels/registry.py declares, into the arguments of a device's kernels. The Python
// functions have checked them and explain errors; the checks here only keep a direct call of torch.ops.sgl_vlm from
// reading outside a tensor. Args are the structs of cpu/kernels.h or cuda/kernels.h: same names, other scratch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "types.h"

namespace sgl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define SGL_REQUIRE(condition, op) STD_TORCH_CHECK(condition, op ": arguments do not fit: expected " #condition)

inline Dtype float_dtype(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16");
  }
}

inline bool is(const Tensor& t, ScalarType dtype, int64_t dims) { return t.scalar_type() == dtype && t.dim() == dims; }

inline bool rows_contiguous(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 || t.numel() == 0;
}

inline Index index_of(const Tensor& t, int64_t batch, const char* op) {
  STD_TORCH_CHECK(is(t, ScalarType::Int, 2) && t.size(0) == batch, op, ": expected an int32 index (batch, count)");
  return {static_cast<const int32_t*>(t.data_ptr()), t.stride(0), t.stride(1), t.size(1)};
}

template <class Args>
void unpack_mass(Args& a, const OptionalTensor& mass, const OptionalTensor& head_mass) {
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

template <class Args>
Args unpack_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& seq_lens,
                   const OptionalTensor& visual_index, const OptionalTensor& mass, const OptionalTensor& head_mass,
                   double softmax_scale, const Tensor& out) {
  Args a{};
  a.dtype = float_dtype(q, "decode_attention");
  SGL_REQUIRE(q.dim() == 3 && k.dim() == 4 && v.dim() == 4 && out.dim() == 3, "decode_attention");
  a.batch = q.size(0), a.heads = q.size(1), a.dim = q.size(2);
  a.kv_heads = k.size(1), a.slots = k.size(2);
  SGL_REQUIRE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "decode_attention");
  SGL_REQUIRE(k.size(0) == a.batch && k.size(3) == a.dim, "decode_attention");
  SGL_REQUIRE(v.size(0) == a.batch && v.size(1) == a.kv_heads && v.size(2) == a.slots, "decode_attention");
  SGL_REQUIRE(v.size(3) == a.dim && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "decode_attention");
  SGL_REQUIRE(rows_contiguous(q) && rows_contiguous(k) && rows_contiguous(v), "decode_attention");
  SGL_REQUIRE(is(seq_lens, ScalarType::Int, 1) && seq_lens.size(0) == a.batch, "decode_attention");
  SGL_REQUIRE(out.scalar_type() == q.scalar_type() && out.is_contiguous(), "decode_attention");
  SGL_REQUIRE(out.numel() == q.size(0) * q.size(1) * q.size(2), "decode_attention");
  a.scale = static_cast<float>(softmax_scale);
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.q_batch = q.stride(0), a.q_head = q.stride(1);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_slot = k.stride(2);
  a.v_batch = v.stride(0), a.v_head = v.stride(1), a.v_slot = v.stride(2);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  a.seq_lens_stride = seq_lens.stride(0);
  if (visual_index) a.visual = index_of(*visual_index, a.batch, "decode_attention");
  unpack_mass(a, mass, head_mass);
  return a;
}

template <class Args>
Args unpack_prefill(const Tensor& q, const Tensor& k, const Tensor& query_index, const Tensor& visual_index,
                    const Tensor& mass, const OptionalTensor& head_mass, const OptionalTensor& softmax_lse,
                    double softmax_scale) {
  Args a{};
  a.dtype = float_dtype(q, "prefill_mass");
  SGL_REQUIRE(q.dim() == 4 && k.dim() == 4 && k.scalar_type() == q.scalar_type(), "prefill_mass");
  a.batch = q.size(0), a.heads = q.size(1), a.length = q.size(2), a.dim = q.size(3);
  a.kv_heads = k.size(1);
  SGL_REQUIRE(k.size(0) == a.batch && k.size(2) == a.length && k.size(3) == a.dim, "prefill_mass");
  SGL_REQUIRE(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "prefill_mass");
  SGL_REQUIRE(rows_contiguous(q) && rows_contiguous(k), "prefill_mass");
  a.scale = static_cast<float>(softmax_scale);
  a.q = q.data_ptr(), a.k = k.data_ptr();
  a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_row = q.stride(2);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_row = k.stride(2);
  a.query = index_of(query_index, a.batch, "prefill_mass");
  a.visual = index_of(visual_index, a.batch, "prefill_mass");
  unpack_mass(a, mass, head_mass);
  if (softmax_lse) {
    SGL_REQUIRE(is(*softmax_lse, ScalarType::Float, 3) && softmax_lse->size(0) == a.batch, "prefill_mass");
    SGL_REQUIRE(softmax_lse->size(1) == a.heads && softmax_lse->size(2) == a.length, "prefill_mass");
    a.lse = static_cast<const float*>(softmax_lse->data_ptr());
    a.lse_batch = softmax_lse->stride(0), a.lse_head = softmax_lse->stride(1), a.lse_row = softmax_lse->stride(2);
  }
  return a;
}

inline SelectArgs unpack_selection(const Tensor& mass, const Tensor& visual_index, const Tensor& seq_lens,
                                   int64_t num_keep, const OptionalTensor& num_keep_each, const Tensor& kept_index,
                                   const Tensor& kept_lens, int64_t max_length) {
  SelectArgs a{};
  SGL_REQUIRE(is(mass, ScalarType::Float, 2) && rows_contiguous(mass), "select_tokens");
  a.batch = mass.size(0);
  a.visual = index_of(visual_index, a.batch, "select_tokens");
  SGL_REQUIRE(mass.size(1) == a.visual.count, "select_tokens");
  SGL_REQUIRE(is(seq_lens, ScalarType::Int, 1) && seq_lens.size(0) == a.batch, "select_tokens");
  SGL_REQUIRE(is(kept_index, ScalarType::Int, 2) && kept_index.size(0) == a.batch, "select_tokens");
  SGL_REQUIRE(is(kept_lens, ScalarType::Int, 1) && kept_lens.size(0) == a.batch, "select_tokens");
  SGL_REQUIRE(kept_index.is_contiguous() && kept_lens.is_contiguous(), "select_tokens");
  if (num_keep_each) {
    SGL_REQUIRE(is(*num_keep_each, ScalarType::Int, 1) && num_keep_each->size(0) == a.batch, "select_tokens");
    a.num_keep_each = static_cast<const int32_t*>(num_keep_each->data_ptr());
    a.num_keep_stride = num_keep_each->stride(0);
  }
  a.out_len = kept_index.size(1), a.num_keep = num_keep, a.max_length = max_length;
  a.mass = static_cast<const float*>(mass.data_ptr()), a.mass_batch = mass.stride(0);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr()), a.seq_lens_stride = seq_lens.stride(0);
  a.kept_index = static_cast<int32_t*>(kept_index.data_ptr());
  a.kept_lens = static_cast<int32_t*>(kept_lens.data_ptr());
  return a;
}

inline Plane plane_of(const Tensor& source, const Tensor& target, int64_t batch, int64_t length, int64_t out_len) {
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

// `hidden` and the extras; the lengths of both lists agree.
inline std::vector<Plane> unpack_planes(const Tensor& hidden, const std::vector<Tensor>& extras,
                                        const Tensor& hidden_out, const std::vector<Tensor>& extras_out,
                                        int64_t out_len) {
  SGL_REQUIRE(hidden.dim() == 3 && extras.size() == extras_out.size(), "prune_gather");
  const int64_t batch = hidden.size(0), length = hidden.size(1);
  std::vector<Plane> planes{plane_of(hidden, hidden_out, batch, length, out_len)};
  for (size_t i = 0; i < extras.size(); ++i)
    planes.push_back(plane_of(extras[i], extras_out[i], batch, length, out_len));
  return planes;
}

template <class Args>
Args unpack_vocabulary(const Tensor& logits, const Tensor& logprob, const char* op) {
  Args a{};
  a.dtype = float_dtype(logits, op);
  STD_TORCH_CHECK(logits.dim() == 2 && rows_contiguous(logits) && logits.size(1) > 0, op, ": logits do not fit");
  a.rows = logits.size(0), a.vocab = logits.size(1), a.row_stride = logits.stride(0);
  a.logits = logits.data_ptr();
  STD_TORCH_CHECK(is(logprob, ScalarType::Float, 1) && logprob.size(0) == logits.size(0) && logprob.is_contiguous(), op,
                  ": logprob does not fit");
  a.logprob = static_cast<float*>(logprob.data_ptr());
  return a;
}

template <class Args>
void unpack_token(Args& a, const Tensor& token) {
  SGL_REQUIRE(is(token, ScalarType::Long, 1) && token.size(0) == a.rows, "greedy_token");
  SGL_REQUIRE(token.is_contiguous(), "greedy_token");
  a.token = static_cast<int64_t*>(token.data_ptr());
}

template <class Args>
void unpack_targets(Args& a, const Tensor& targets) {
  a.targets_are_64 = targets.scalar_type() == ScalarType::Long;
  SGL_REQUIRE(a.targets_are_64 || targets.scalar_type() == ScalarType::Int, "token_logprobs");
  SGL_REQUIRE(targets.dim() == 1 && targets.size(0) == a.rows, "token_logprobs");
  a.targets = targets.data_ptr();
  a.targets_stride = targets.stride(0);
}

}  // namespace sgl
