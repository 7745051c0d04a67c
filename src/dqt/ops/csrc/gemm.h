// Integer matrix product with a float epilogue, by AMX tiles: the interface between gemm.cpp and gemm_amx.cpp.
//
// c[m, n] = ((sum over k of a[m, k] * b[k, n]) * row_scale[m]) * column_scale[n] + bias[n]
//
// Both operands are int8 and may be stored transposed. They are rearranged into tiles of 16 x 64 bytes, zero beyond the
// edges, so that the inner loops know no odd sizes:
//
//   b   panels of 32 columns: for each 64 k, two tiles [16 groups of 4 k][16 columns][4 k]
//   a   blocks of 32 rows:    for each 64 k, two tiles [16 rows][64 k]
//
// An `a` that is stored row by row in whole blocks is used where it lies. The int32 product never reaches memory, which
// saves a pass to clear, one to write and one to read it: more than the multiplications take.
#pragma once
#include <cstdint>

extern "C" {
// Mirrored in dqt/ops/gemm.py.
struct DqtGemm {
  const std::int8_t* a;       // [m, k], or [k, m] if a_transposed
  const std::int8_t* b;       // [k, n], or [n, k] if b_transposed
  float* c;                   // [m, n]
  const float* row_scale;     // [m]
  const float* column_scale;  // [n] or null
  const float* bias;          // [n] or null
  std::int8_t* packed_a;      // blocks * chunks * 2048 bytes, or null: `a` is used where it lies
  std::int8_t* packed_b;      // panels * chunks * 2048 bytes
  std::int64_t m, n, k;
  std::int64_t a_stride, b_stride;  // bytes between stored rows
  std::int32_t a_transposed, b_transposed;
};
}

namespace dqt {

constexpr std::int64_t kBlock = 32;   // rows of a block of a, columns of a panel of b
constexpr std::int64_t kChunk = 64;   // k of a tile
constexpr std::int64_t kTile = 1024;  // bytes of a tile

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace dqt

extern "C" {
int dqt_amx_permitted();  // 0 if the operating system refuses the tiles
void dqt_amx_pack_a(const DqtGemm* args, std::int64_t begin, std::int64_t end);   // blocks
void dqt_amx_pack_b(const DqtGemm* args, std::int64_t begin, std::int64_t end);   // panels
void dqt_amx_multiply(const DqtGemm* args, std::int64_t begin, std::int64_t end); // panels
}
