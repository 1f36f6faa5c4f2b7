// The few instructions that the kernels are made of, each with the layout of its operands. `lane / 4` is the row and
// `lane % 4` the column of a lane in the fragments of mma. Loads of one operand may take dimensions in any order as long
// as the other operand's do: so each lane reads 16 consecutive bytes, straight from device memory, and no shared memory
// or shuffle stands between load and tensor core.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace sgl::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr int kPiece = 16 / sizeof(T);  // elements in a 16-byte load
constexpr float kLog2e = 1.44269504088896340736f;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Both are read-only for the whole kernel. Keys and values are read once: they need not displace others in L1.
__device__ __forceinline__ uint4 load_streaming(const void* p);
__device__ __forceinline__ uint4 load_cached(const void* p);
__device__ __forceinline__ int32_t load_cached(const int32_t* p);
// c (16 x 8) += a (16 x 16, rows r and r + 8) b (16 x 8). Lane holds of c: rows r, r, r + 8, r + 8; columns 2c, 2c + 1.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
// Lane gives row r, columns 2c and 2c + 1 of an 8 x 8 matrix of 16-bit words and gets those of its transpose.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t pair);
// Two floats, rounded; `low` lies at the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(f16 x);
__device__ __forceinline__ float to_float(float x) { return x; }
// 2^x of any x, exact at 0 and infinities.
__device__ __forceinline__ float exp2_of(float x);
// Waits until the launch before this one on the stream has finished; see `launch` below.
__device__ __forceinline__ void wait_for_previous_launch();
__device__ __forceinline__ void allow_next_launch();
__device__ __forceinline__ unsigned char* shared_memory();
// The same pointer, of which the compiler knows nothing.
template <class T>
__device__ __forceinline__ const T* opaque(const T* p) {
#ifndef SGL_EMULATED
  asm volatile("" : "+l"(p));
#endif
  return p;
}
// The lanes of the warp that give the same number.
__device__ __forceinline__ unsigned lanes_with_same(int x);

#ifdef SGL_EMULATED
}  // namespace sgl::cuda
#include "emulated_primitives.h"
namespace sgl::cuda {
#else
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint4 load_cached(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ int32_t load_cached(const int32_t* p) { return __ldg(p); }

template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                          uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ float to_float(f16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ unsigned lanes_with_same(int x) { return __match_any_sync(kWholeWarp, x); }
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char buffer[];
  return buffer;
}
#endif

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
  }
}

// 16 bytes of row `row` from element `begin` on; zeros from `dim` on and where the row is not `present`.
template <class T, bool kAligned, bool kStreaming>
__device__ __forceinline__ uint4 load_piece(const T* row, int begin, int dim, bool present) {
  uint4 piece = make_uint4(0, 0, 0, 0);
  if constexpr (kAligned) {
    if (present && begin < dim) piece = kStreaming ? load_streaming(row + begin) : load_cached(static_cast<const void*>(row + begin));
  } else if (present) {
    T* elements = reinterpret_cast<T*>(&piece);
#pragma unroll
    for (int e = 0; e < kPiece<T>; ++e)
      if (begin + e < dim) elements[e] = row[begin + e];
  }
  return piece;
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& piece, float (&out)[kPiece<T>]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      out[w] = __uint_as_float(words[w]);
    } else {
      out[2 * w] = to_float(T{static_cast<uint16_t>(words[w] & 0xffff)});
      out[2 * w + 1] = to_float(T{static_cast<uint16_t>(words[w] >> 16)});
    }
  }
}

// Sums and maxima over the lanes whose numbers differ in `bits`, the same in each of them.
template <int... bits>
__device__ __forceinline__ float lane_max(float x) {
  ((x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, bits))), ...);
  return x;
}
template <int... bits>
__device__ __forceinline__ float lane_sum(float x) {
  ((x += __shfl_xor_sync(kWholeWarp, x, bits)), ...);
  return x;
}

// Softmax in pieces. `largest` is the largest logit seen and `sum` the sum of 2^(logit - largest); empty is (-inf, 0).
// Logits of -inf give nothing, yet a row of nothing else ends as 0/0 = NaN, as in softmax; NaN and +inf make the sum NaN.
// `unit` is the logarithm of e where logits are natural, 1 where they have been multiplied by it.
__device__ __forceinline__ float weight(float logit, float largest, float unit = 1.0f) {
  return exp2_of((logit - (largest == minus_infinity() ? 0.0f : largest)) * unit);
}
// The factor that moves a sum from one largest logit to another.
__device__ __forceinline__ float rescale(float from, float to, float unit = 1.0f) {
  return from == to ? 1.0f : exp2_of((from - to) * unit);
}

// On sm_90 and later a kernel marked `after_previous` may start while the one before it still runs; it must call
// wait_for_previous_launch() before it reads what that one wrote. Elsewhere the mark says nothing.
struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes = 0;
  bool after_previous = false;
};

// Whether the code that will run has the waits: PTX of an older architecture, compiled by the driver, has none.
inline bool launches_early() {
  constexpr int kCompiledFor[] = {__CUDA_ARCH_LIST__};
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  bool compiled = false;
  for (const int arch : kCompiledFor) compiled |= arch / 100 == major;
  return compiled && major >= 9;
}

template <class... Parameters, class... Arguments>
int launch(const Launch& shape, void* stream, void (*kernel)(Parameters...), const Arguments&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return cudaSuccess;
  if (shape.shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3{static_cast<unsigned>(shape.threads), 1, 1};
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.after_previous && launches_early() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace sgl::cuda
