// The gather of the rows that prune_gather keeps: each kept row is read once and written once.
//
// Kept rows lie apart, where the hardware prefetcher does not follow, so the next row is asked for while this one is
// copied, into L2: two rows of a large model do not fit L1.

#include "simd.h"

namespace sgl::SGL_ISA {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kVectors = kLine / sizeof(V);

void copy_row(char* target, const char* source, const char* next, int64_t bytes) {
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) {
    __builtin_prefetch(next + i, 0, 2);
    V line[kVectors];
    __builtin_memcpy(line, source + i, kLine);
    __builtin_memcpy(target + i, line, kLine);
  }
  for (; i < bytes; ++i) target[i] = source[i];
}

}  // namespace

void gather_rows(const GatherArgs& a, int64_t begin, int64_t end) {
  for (int64_t p = 0; p < a.plane_count; ++p) {
    const Plane& plane = a.planes[p];
    auto row = [&](int64_t task) {
      const int64_t at = a.kept[task] < 0 ? 0 : a.kept[task];
      return plane.source + task / a.out_len * plane.source_batch + at * plane.source_row;
    };
    for (int64_t task = begin; task < end; ++task) {
      char* target = plane.target + task * plane.row_bytes;
      if (a.kept[task] < 0)
        __builtin_memset(target, 0, plane.row_bytes);
      else
        copy_row(target, row(task), row(task + 1 < end ? task + 1 : task), plane.row_bytes);
    }
  }
}

}  // namespace sgl::SGL_ISA
