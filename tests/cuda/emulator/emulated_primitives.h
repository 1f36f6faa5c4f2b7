// csrc/cuda/primitives.cuh in plain C++: what each instruction does, written from the PTX manual's fragment layouts.
#pragma once

namespace sgl::cuda {

inline uint4 load_streaming(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("a 16-byte load from an address that is not a multiple of 16");
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline uint4 load_cached(const void* p) { return load_streaming(p); }
inline int32_t load_cached(const int32_t* p) { return *p; }

inline float to_float(f16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}

inline uint16_t round_to(bf16*, float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t round_to(f16*, float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <class T>
uint32_t pack(float low, float high) {
  return round_to(static_cast<T*>(nullptr), low) | (uint32_t{round_to(static_cast<T*>(nullptr), high)} << 16);
}

template <class T>
float half_of(uint64_t word, int which) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * which))});
}

template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto& m = emulator::Machine::get();
  auto& warp = m.warps[m.now->warp];
  const int lane = m.now->lane;
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; ++i) warp.extra[lane][i] = words[i];
  m.wait(1);
  // A: register a0 holds (row r, k 2c..), a1 (r + 8, 2c..), a2 (r, 2c + 8..), a3 (r + 8, 2c + 8..).
  // B: register b0 holds (k 2c.., column r), b1 (k 2c + 8.., column r).
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int upper = k / 8, pair = k % 8 / 2, half = k % 2;
      const float a = half_of<T>(warp.extra[row % 8 * 4 + pair][row / 8 + 2 * upper], half);
      const float b = half_of<T>(warp.extra[column * 4 + pair][4 + upper], half);
      sum += a * b;
    }
    c[i] += sum;
  }
  m.wait(1);
}

inline uint32_t transpose8x8(uint32_t pair) {
  return emulator::exchange(pair, [](auto get, int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    auto element = [&](int r, int c) { return (get(r * 4 + c / 2) >> (16 * (c % 2))) & 0xffffu; };
    return element(column, row) | (element(column + 1, row) << 16);
  });
}

inline float exp2_of(float x) { return std::exp2(x); }
inline void wait_for_previous_launch() {}
inline void allow_next_launch() {}
inline unsigned lanes_with_same(int x) {
  return emulator::exchange(x, [&](auto get, int) {
    unsigned lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes |= (get(lane) == x ? 1u : 0u) << lane;
    return lanes;
  });
}
inline unsigned char* shared_memory() { return emulator::Machine::get().dynamic(); }

}  // namespace sgl::cuda
