// What the kernels of every device call arguments by: raw pointers and strides (in elements). No torch header.
#pragma once

#include <cstdint>
#include <type_traits>

// Code that several translation units share must be inlined: the linker keeps one copy of what is not, and the copy it
// keeps may have been compiled for instructions that this CPU lacks.
#ifdef __CUDACC__
#define SGL_INLINE __host__ __device__ __forceinline__
#else
#define SGL_INLINE inline __attribute__((always_inline))
#endif

namespace sgl {

enum class Dtype { f32, bf16, f16 };

template <class T>
SGL_INLINE constexpr T ceil_div(T a, std::type_identity_t<T> b) {
  return (a + b - 1) / b;
}

struct Index {  // (B, N) int32
  const int32_t* data = nullptr;
  int64_t batch_stride = 0, stride = 0;
  int64_t count = 0;
  SGL_INLINE int32_t at(int64_t b, int64_t n) const { return data[b * batch_stride + n * stride]; }
};

struct SelectArgs {
  int64_t batch, out_len, num_keep;
  int64_t max_length;  // longer requests are cut to it
  const float* mass;
  int64_t mass_batch;
  Index visual;
  const int32_t* seq_lens;
  int64_t seq_lens_stride;
  const int32_t* num_keep_each;  // or null
  int64_t num_keep_stride;
  int32_t *kept_index, *kept_lens;  // (B, out_len), (B), both contiguous

  SGL_INLINE int64_t length(int64_t b) const {
    const int64_t n = seq_lens[b * seq_lens_stride];
    return n < 0 ? 0 : n > max_length ? max_length : n;
  }
  SGL_INLINE int64_t keep(int64_t b) const { return num_keep_each ? num_keep_each[b * num_keep_stride] : num_keep; }
};

struct Plane {  // per-position data to gather; strides and row size in bytes
  const char* source;
  int64_t source_batch, source_row;
  char* target;  // (B, out_len, row) contiguous
  int64_t row_bytes;
};

}  // namespace sgl
