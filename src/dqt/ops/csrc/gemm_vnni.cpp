// The integer product by AVX512-VNNI, whose multiplication takes one operand unsigned: b is stored plus 128, and 128
// times the sum of a's row is subtracted again. Sums wrap modulo 2^32, so the difference is exact.
#include "gemm_tiles.inc"

namespace {

void pack_unsigned_b(const DqtGemm* g, i64 begin, i64 end) {
  pack_b(g, begin, end);
  const i64 panel = dqt::ceil_div(g->k, kChunk) * 2 * kTile;
  const __m512i offset = _mm512_set1_epi8(-128);
  for (i64 i = begin * panel; i < end * panel; i += 64)
    _mm512_storeu_si512(g->packed_b + i, _mm512_xor_si512(_mm512_loadu_si512(g->packed_b + i), offset));
}

void prepare_a(const DqtGemm* g, i64 begin, i64 end) {
  if (g->packed_a) pack_a(g, begin, end);
  const TilesOfA tiles(g);
  const i64 chunks = dqt::ceil_div(g->k, kChunk);
  const __m512i weight = _mm512_set1_epi8(-128);  // 128 as an unsigned byte
  for (i64 row = begin * kBlock; row < end * kBlock; ++row) {
    const i8* a = tiles.base + row / kBlock * tiles.block + row % kBlock / 16 * tiles.half + row % 16 * tiles.row;
    __m512i sum = _mm512_setzero_si512();
    for (i64 chunk = 0; chunk < chunks; ++chunk)
      sum = _mm512_dpbusd_epi32(sum, weight, _mm512_loadu_si512(a + chunk * tiles.chunk));
    g->row_sums[row] = _mm512_reduce_add_epi32(sum);
  }
}

// 8 rows x 32 columns. Accumulators are named, because gcc 12 spills an array of them.
inline void multiply_rows(const i8* a, const TilesOfA& tiles, const i8* b, i64 chunks, const i32* sums, i32* product) {
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define DECLARE(r) __m512i left##r = _mm512_setzero_si512(), right##r = left##r;
#define MULTIPLY(r)                                                                          \
  {                                                                                          \
    const __m512i words = _mm512_set1_epi32(*(const word*)(a + r * tiles.row + 4 * group));  \
    left##r = _mm512_dpbusd_epi32(left##r, left_b, words);                                   \
    right##r = _mm512_dpbusd_epi32(right##r, right_b, words);                                \
  }
#define STORE(r)                                                                                       \
  _mm512_storeu_si512(product + r * kBlock, _mm512_sub_epi32(left##r, _mm512_set1_epi32(sums[r])));    \
  _mm512_storeu_si512(product + r * kBlock + 16, _mm512_sub_epi32(right##r, _mm512_set1_epi32(sums[r])));
  typedef i32 __attribute__((may_alias, aligned(1))) word;
  EACH_ROW(DECLARE)
  for (i64 chunk = 0; chunk < chunks; ++chunk, a += tiles.chunk, b += 2 * kTile)
    for (int group = 0; group < 16; ++group) {
      const __m512i left_b = _mm512_loadu_si512(b + 64 * group), right_b = _mm512_loadu_si512(b + kTile + 64 * group);
      EACH_ROW(MULTIPLY)
    }
  EACH_ROW(STORE)
#undef EACH_ROW
#undef DECLARE
#undef MULTIPLY
#undef STORE
}

void multiply(const DqtGemm* g, i64 begin, i64 end) {
  const TilesOfA tiles(g);
  const i64 chunks = dqt::ceil_div(g->k, kChunk);
  each_block(g, begin, end, [&](i64 block, i64 panel) {
    const i8* b = g->packed_b + panel * chunks * 2 * kTile;
    alignas(64) i32 product[kBlock * kBlock];
    for (i64 row = 0; row < kBlock; row += 8) {
      const i8* a = tiles.base + block * tiles.block + row / 16 * tiles.half + row % 16 * tiles.row;
      multiply_rows(a, tiles, b, chunks, g->row_sums + block * kBlock + row, product + row * kBlock);
    }
    write_block(g, block, panel, product);
  });
}

constexpr dqt::GemmKernels kTable = {pack_unsigned_b, prepare_a, multiply};

}  // namespace

extern "C" const dqt::GemmKernels* dqt_gemm_vnni() { return &kTable; }
