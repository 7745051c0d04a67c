// The integer product by AMX tiles: 32 x 32 results in four tiles, 64 k at a time.
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "gemm_tiles.inc"

namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

void prepare_a(const DqtGemm* g, i64 begin, i64 end) {
  if (g->packed_a) pack_a(g, begin, end);
}

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

constexpr dqt::GemmKernels kTable = {pack_b, prepare_a, multiply};

}  // namespace

extern "C" const dqt::GemmKernels* dqt_gemm_amx() { return permitted() ? &kTable : nullptr; }
