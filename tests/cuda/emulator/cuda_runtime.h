// CUDA on a CPU, for tests: enough of the language that csrc/cuda compiles with a C++ compiler and runs, one block at
// a time, each thread a fiber. A fiber runs until it meets a barrier or a warp operation, so the order of threads
// between barriers is known and can be turned round (SGL_EMULATOR_ORDER=reverse): a missing barrier gives two
// different answers. Warp operations check that every lane of the warp takes part. Shared memory is poisoned before
// each block.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define SGL_EMULATED 1
#define __CUDA_ARCH_LIST__ 900

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10, kSharedLimit = 227 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on: unlike swapcontext, _setjmp makes no system call
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  int lane = 0, warp = 0;
  bool done = false;
  int waiting = 0;  // 0: no, 1: for its warp, 2: for its block
};

struct Warp {
  uint64_t value[kWarp];
  uint64_t extra[kWarp][8];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared = std::vector<unsigned char>(kSharedLimit + 16);
  ucontext_t origin;
  jmp_buf scheduler;
  Fiber* now = nullptr;
  const std::function<void()>* body = nullptr;
  bool reverse = false;

  static Machine& get() {
    static Machine machine;
    return machine;
  }
  unsigned char* dynamic() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) & ~uintptr_t{15});
  }
  void wait(int scope) {
    now->waiting = scope;
    if (_setjmp(now->place) == 0) _longjmp(scheduler, 1);
  }
  void resume(Fiber& f) {
    now = &f;
    threadIdx = f.thread;
    if (_setjmp(scheduler) != 0) return;
    if (f.started) _longjmp(f.place, 1);
    f.started = true;
    swapcontext(&origin, &f.context);
  }
  static void enter() {
    Machine& m = get();
    (*m.body)();
    m.now->done = true;
    _longjmp(m.scheduler, 1);
  }
  void start_block(int threads) {
    std::memset(dynamic(), 0xff, kSharedLimit);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers[t];
      f.thread = {static_cast<unsigned>(t), 0, 0};
      f.lane = t % kWarp, f.warp = t / kWarp;
      f.done = f.started = false, f.waiting = 0;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, enter, 0);
    }
  }
  // A barrier opens when every thread it spans has come; an exited thread never comes to a warp's.
  bool release(int first, int last, int scope) {
    int waiting = 0, done = 0;
    for (int t = first; t < last; ++t) waiting += fibers[t].waiting == scope, done += fibers[t].done;
    if (waiting == 0 || waiting + done < last - first) return false;
    if (scope == 1 && done) fail("a warp operation after some of its lanes have exited");
    for (int t = first; t < last; ++t) fibers[t].waiting = 0;
    return true;
  }
  void run_block(int threads) {
    start_block(threads);
    for (;;) {
      bool ran = false, all_done = true;
      for (int i = 0; i < threads; ++i) {
        Fiber& f = fibers[reverse ? threads - 1 - i : i];
        if (!f.done && !f.waiting) {
          resume(f);
          ran = true;
        }
        all_done &= f.done;
      }
      if (all_done) return;
      bool opened = false;
      for (int w = 0; w * kWarp < threads; ++w) opened |= release(w * kWarp, std::min(threads, (w + 1) * kWarp), 1);
      opened |= release(0, threads, 2);
      if (!ran && !opened) fail("threads wait at different barriers");
    }
  }
  void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body_) {
    const int threads = block.x;
    if (threads == 0 || threads > 1024 || block.y != 1 || block.z != 1) fail("a block of 1 to 1024 threads in x");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("bad grid");
    if (shared_bytes > kSharedLimit) fail("too much shared memory");
    const char* order = std::getenv("SGL_EMULATOR_ORDER");
    reverse = order && std::strcmp(order, "reverse") == 0;
    if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
    warps.resize((threads + kWarp - 1) / kWarp);
    gridDim = grid, blockDim = block, body = &body_;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = reverse ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
            static_cast<unsigned>(b / grid.x / grid.y)};
      run_block(threads);
    }
  }
};

// Every lane gives a value and reads any lane's.
template <class T, class F>
auto exchange(T value, F read) {
  static_assert(sizeof(T) <= 8);
  Machine& m = Machine::get();
  Warp& warp = m.warps[m.now->warp];
  std::memcpy(&warp.value[m.now->lane], &value, sizeof(T));
  m.wait(1);
  auto get = [&](int lane) {
    T other;
    std::memcpy(&other, &warp.value[lane & (kWarp - 1)], sizeof(T));
    return other;
  };
  auto result = read(get, m.now->lane);
  m.wait(1);
  return result;
}

}  // namespace emulator

inline void __syncthreads() { emulator::Machine::get().wait(2); }
inline void __syncwarp(unsigned = ~0u) { emulator::Machine::get().wait(1); }

inline void check_mask(unsigned mask) {
  if (mask != ~0u) emulator::fail("warp operations of part of a warp are not used here");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  check_mask(mask);
  return emulator::exchange(value, [&](auto get, int lane) { return get(lane ^ bits); });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  check_mask(mask);
  return emulator::exchange(value, [&](auto get, int) { return get(source); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  check_mask(mask);
  return emulator::exchange(value, [&](auto get, int lane) { return lane < delta ? get(lane) : get(lane - delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  check_mask(mask);
  return emulator::exchange(value, [&](auto get, int lane) { return lane + delta > 31 ? get(lane) : get(lane + delta); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  check_mask(mask);
  return emulator::exchange(predicate, [](auto get, int) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= (get(lane) != 0 ? 1u : 0u) << lane;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

template <class T>
T atomicAdd(T* address, T value) {
  T old = *address;
  *address += value;
  return old;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  unsigned old = *address;
  *address |= value;
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned x) {
  float value;
  std::memcpy(&value, &x, 4);
  return value;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t{b} << 32) | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>((both >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return result;
}
using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
template <class K>
cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int bytes) {
  if (bytes > static_cast<int>(emulator::kSharedLimit)) emulator::fail("too much shared memory");
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... args) {
  const std::function<void()> body = [&] { kernel(args...); };
  emulator::Machine::get().launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, body);
  return cudaSuccess;
}
