// The integer product by AMX tiles: 32 x 32 results in four tiles, 64 k at a time.
//
// The same blocking in AVX512-VNNI took 1.3 to 1.7 times as long as torch._int_mm limited to VNNI, so processors without
// AMX multiply with that.
#include <cstring>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm.h"

namespace {

using i8 = std::int8_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using dqt::kBlock;
using dqt::kChunk;
using dqt::kTile;

inline i64 at_most(i64 value, i64 limit) { return value < limit ? value : limit; }
inline __mmask64 first(i64 count) { return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1; }

// Transposes 16 x 16 words of 4 bytes: row r of the result holds word r of each of the 16 rows.
inline void transpose_words(const __m512i r[16], i8* out) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(r[i], r[i + 1]), high01 = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), high23 = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    b[i] = _mm512_unpacklo_epi64(low01, low23);
    b[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    b[i + 2] = _mm512_unpacklo_epi64(high01, high23);
    b[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD);
    const __m512i even1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
    _mm512_storeu_si512(out + 64 * j, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(out + 64 * (4 + j), _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(out + 64 * (8 + j), _mm512_shuffle_i32x4(even0, even1, 0xDD));
    _mm512_storeu_si512(out + 64 * (12 + j), _mm512_shuffle_i32x4(odd0, odd1, 0xDD));
  }
}

// 64 k x 32 columns, stored k by k, into two tiles [16 groups of 4 k][16 columns][4 k].
inline void interleave(const i8* source, i64 stride, i64 ks, i64 columns, i8* left, i8* right) {
  const __mmask32 mask = (__mmask32)first(at_most(columns, 32));
  for (int group = 0; group < 16; ++group) {
    __m256i row[4];
    for (int j = 0; j < 4; ++j)
      row[j] = 4 * group + j < ks ? _mm256_maskz_loadu_epi8(mask, source + (4 * group + j) * stride)
                                  : _mm256_setzero_si256();
    const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
    const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
    const __m256i part[4] = {_mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
                             _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
    for (int j = 0; j < 4; ++j) {
      _mm_storeu_si128((__m128i*)(left + 64 * group + 16 * j), _mm256_castsi256_si128(part[j]));
      _mm_storeu_si128((__m128i*)(right + 64 * group + 16 * j), _mm256_extracti128_si256(part[j], 1));
    }
  }
}

// Up to 16 stored rows of up to 64 bytes, zero beyond.
inline void load_rows(const i8* source, i64 stride, i64 rows, i64 bytes, __m512i out[16]) {
  const __mmask64 mask = first(bytes);
  for (int i = 0; i < 16; ++i)
    out[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, source + i * stride) : _mm512_setzero_si512();
}

void pack_b(const DqtGemm* g, i64 begin, i64 end) {
  const i64 chunks = dqt::ceil_div(g->k, kChunk);
  for (i64 panel = begin; panel < end; ++panel)
    for (i64 chunk = 0; chunk < chunks; ++chunk) {
      i8* out = g->packed_b + (panel * chunks + chunk) * 2 * kTile;
      const i64 n0 = panel * kBlock, k0 = chunk * kChunk;
      if (g->b_transposed) {
        for (int half = 0; half < 2; ++half) {
          __m512i rows[16];
          const i64 n = n0 + 16 * half;
          load_rows(g->b + n * g->b_stride + k0, g->b_stride, g->n - n, g->k - k0, rows);
          transpose_words(rows, out + half * kTile);
        }
      } else {
        interleave(g->b + k0 * g->b_stride + n0, g->b_stride, g->k - k0, g->n - n0, out, out + kTile);
      }
    }
}

void pack_a(const DqtGemm* g, i64 begin, i64 end) {
  const i64 chunks = dqt::ceil_div(g->k, kChunk);
  for (i64 block = begin; block < end; ++block)
    for (i64 chunk = 0; chunk < chunks; ++chunk) {
      i8* out = g->packed_a + (block * chunks + chunk) * 2 * kTile;
      const i64 m0 = block * kBlock, k0 = chunk * kChunk;
      __m512i rows[16];
      if (g->a_transposed) {
        alignas(64) i8 tiles[2][kTile];
        interleave(g->a + k0 * g->a_stride + m0, g->a_stride, g->k - k0, g->m - m0, tiles[0], tiles[1]);
        for (int half = 0; half < 2; ++half) {
          load_rows(tiles[half], 64, 16, 64, rows);
          transpose_words(rows, out + half * kTile);
        }
      } else {
        for (int half = 0; half < 2; ++half) {
          const i64 m = m0 + 16 * half;
          load_rows(g->a + m * g->a_stride + k0, g->a_stride, g->m - m, g->k - k0, rows);
          for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + half * kTile + 64 * i, rows[i]);
        }
      }
    }
}

// Where the tiles of `a` lie, packed or not.
struct TilesOfA {
  const i8* base;
  i64 block, chunk, half, row;  // bytes between blocks, chunks, the two tiles of a block, rows of a tile

  explicit TilesOfA(const DqtGemm* g) {
    const i64 chunks = dqt::ceil_div(g->k, kChunk);
    if (g->packed_a)
      *this = TilesOfA{g->packed_a, chunks * 2 * kTile, 2 * kTile, kTile, 64};
    else
      *this = TilesOfA{g->a, kBlock * g->a_stride, kChunk, 16 * g->a_stride, g->a_stride};
  }
  TilesOfA(const i8* base, i64 block, i64 chunk, i64 half, i64 row)
      : base(base), block(block), chunk(chunk), half(half), row(row) {}
};

// Scales a block of the product and writes what lies inside of c.
inline void write_block(const DqtGemm* g, i64 block, i64 panel, const i32* product) {
  const i64 m0 = block * kBlock, n0 = panel * kBlock, rows = at_most(kBlock, g->m - m0);
  for (int half = 0; half < 2; ++half) {
    const i64 n = n0 + 16 * half;
    const __mmask16 mask = (__mmask16)first(at_most(16, g->n - n));
    if (!mask) break;
    const __m512 column = g->column_scale ? _mm512_maskz_loadu_ps(mask, g->column_scale + n) : _mm512_setzero_ps();
    const __m512 bias = g->bias ? _mm512_maskz_loadu_ps(mask, g->bias + n) : _mm512_setzero_ps();
    for (i64 i = 0; i < rows; ++i) {
      __m512 y = _mm512_cvtepi32_ps(_mm512_loadu_si512(product + i * kBlock + 16 * half));
      y = _mm512_mul_ps(y, _mm512_set1_ps(g->row_scale[m0 + i]));
      if (g->column_scale) y = _mm512_mul_ps(y, column);
      if (g->bias) y = _mm512_add_ps(y, bias);
      _mm512_mask_storeu_ps(g->c + (m0 + i) * g->n + n, mask, y);
    }
  }
}

// Blocks of `a` that stay in the second-level cache while the panels of `b` pass by.
inline i64 blocks_in_cache(const DqtGemm* g) {
  const i64 blocks = (i64{1} << 20) / (kBlock * dqt::ceil_div(g->k, kChunk) * kChunk);
  return blocks < 1 ? 1 : blocks;
}

// Calls body(block, panel) for all blocks and the given panels, in an order that is kind to the caches.
template <class Body>
inline void each_block(const DqtGemm* g, i64 begin, i64 end, const Body& body) {
  const i64 blocks = dqt::ceil_div(g->m, kBlock), group = blocks_in_cache(g);
  for (i64 start = 0; start < blocks; start += group)
    for (i64 panel = begin; panel < end; ++panel)
      for (i64 block = start; block < at_most(start + group, blocks); ++block) body(block, panel);
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

void multiply(const DqtGemm* g, i64 begin, i64 end) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
  const TilesOfA tiles(g);
  const i64 chunks = dqt::ceil_div(g->k, kChunk);
  each_block(g, begin, end, [&](i64 block, i64 panel) {
    const i8* a = tiles.base + block * tiles.block;
    const i8* b = g->packed_b + panel * chunks * 2 * kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 chunk = 0; chunk < chunks; ++chunk, a += tiles.chunk, b += 2 * kTile) {
      _tile_loadd(4, a, tiles.row);
      _tile_loadd(6, b, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbssd(1, 4, 7);
      _tile_loadd(5, a + tiles.half, tiles.row);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    alignas(64) i32 product[kBlock * kBlock];
    _tile_stored(0, product, kBlock * 4);
    _tile_stored(1, product + 16, kBlock * 4);
    _tile_stored(2, product + 16 * kBlock, kBlock * 4);
    _tile_stored(3, product + 16 * kBlock + 16, kBlock * 4);
    write_block(g, block, panel, product);
  });
  _tile_release();
}

// Linux lets a process use the tiles' registers only after it has asked.
bool permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

extern "C" {
int dqt_amx_permitted() { return permitted() ? 1 : 0; }
void dqt_amx_pack_a(const DqtGemm* args, std::int64_t begin, std::int64_t end) { pack_a(args, begin, end); }
void dqt_amx_pack_b(const DqtGemm* args, std::int64_t begin, std::int64_t end) { pack_b(args, begin, end); }
void dqt_amx_multiply(const DqtGemm* args, std::int64_t begin, std::int64_t end) { multiply(args, begin, end); }
}
