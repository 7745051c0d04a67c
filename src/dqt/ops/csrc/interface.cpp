// The exported functions: they choose an instruction set once and spread rows over threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dqt_cpu.h"
#include "parallel.h"

extern "C" const DqtKernels* dqt_kernels_portable();
#ifdef DQT_X86
extern "C" const DqtKernels* dqt_kernels_avx2();
extern "C" const DqtKernels* dqt_kernels_avx512();
#endif

namespace dqt {
Threads threads;
}

namespace {

constexpr std::int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves
const DqtKernels* kernels = nullptr;
const char* active = "none";

const DqtKernels* find(const char* name) {
  if (std::strcmp(name, "portable") == 0) {
    active = "portable";
    return dqt_kernels_portable();
  }
#ifdef DQT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx512") == 0 && avx512) {
    active = "avx512";
    return dqt_kernels_avx512();
  }
  if (std::strcmp(name, "avx2") == 0 && avx2) {
    active = "avx2";
    return dqt_kernels_avx2();
  }
#endif
  return nullptr;
}

std::int64_t row_grain(std::int64_t columns) { return columns > 0 ? (kGrain + columns - 1) / columns : 1; }

}  // namespace

extern "C" {

// Version of this interface; Python refuses a library of another one.
int dqt_interface_version() { return 1; }

// Chooses "avx512", "avx2" or "portable". Returns 0, or 1 if this CPU or build lacks it.
int dqt_select(const char* name) {
  const DqtKernels* found = find(name);
  if (!found) return 1;
  kernels = found;
  return 0;
}

// The chosen instruction set.
const char* dqt_active() { return active; }

// Hands over the OpenMP runtime that torch uses (all null: plain threads).
void dqt_use_openmp(dqt::Fork fork, dqt::Query number, dqt::Query team) {
  dqt::threads.fork = fork;
  dqt::threads.number = number;
  dqt::threads.team = team;
}

void dqt_set_threads(int count) { dqt::threads.count = count > 0 ? count : 1; }

void dqt_quantize_rows(const float* x, std::int64_t rows, std::int64_t columns, std::int8_t* q, float* scale) {
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->quantize_rows(x, columns, begin, end, q, scale);
  });
}

// `row_factor` [rows] or null multiplies x first; `scratch` holds 2 * columns floats.
void dqt_quantize_columns(const float* x, const float* row_factor, std::int64_t rows, std::int64_t columns,
                          float* scratch, std::int8_t* q, float* scale) {
  auto* top = reinterpret_cast<std::uint32_t*>(scratch);
  float* inverse = scratch + columns;
  const std::int64_t column_grain = rows > 0 ? std::max<std::int64_t>(64, kGrain / rows) : 64;
  dqt::parallel_for(columns, column_grain, [&](std::int64_t begin, std::int64_t end, int) {
    kernels->column_absmax(x, row_factor, rows, columns, begin, end, top);
  });
  for (std::int64_t c = 0; c < columns; ++c) {
    float absmax;
    std::memcpy(&absmax, &top[c], 4);
    const bool finite = std::isfinite(absmax);
    scale[c] = finite ? absmax / 127.0f : NAN;
    inverse[c] = finite && absmax > 1e-30f ? 127.0f / absmax : 0.0f;
  }
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->quantize_columns(x, row_factor, columns, begin, end, inverse, q);
  });
}

// y = product * row_scale * column_scale; `column_scale` may be null.
void dqt_scale_product(const std::int32_t* product, std::int64_t rows, std::int64_t columns, const float* row_scale,
                       const float* column_scale, float* y) {
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->scale_product(product, columns, begin, end, row_scale, column_scale, y);
  });
}

void dqt_unpack(const std::uint8_t* packed, std::int64_t rows, std::int64_t columns, std::int64_t packed_bytes,
                int bits, int is_signed, std::int8_t* values) {
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->unpack(packed, columns, packed_bytes, bits, is_signed, begin, end, values);
  });
}

void dqt_pack(const std::int8_t* values, std::int64_t rows, std::int64_t columns, std::int64_t packed_bytes, int bits,
              std::uint8_t* packed) {
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->pack(values, columns, packed_bytes, bits, begin, end, packed);
  });
}

void dqt_mean_squares(const float* x, std::int64_t rows, std::int64_t columns, float* row_mean, float* column_mean) {
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->row_mean_squares(x, columns, begin, end, row_mean);
  });
  const std::int64_t column_grain = rows > 0 ? std::max<std::int64_t>(64, kGrain / rows) : 64;
  dqt::parallel_for(columns, column_grain, [&](std::int64_t begin, std::int64_t end, int) {
    kernels->column_mean_squares(x, rows, columns, begin, end, column_mean);
  });
}

void dqt_update(DqtUpdate* args) {
  std::int64_t partial[dqt::kMaxParts][4] = {};
  dqt::parallel_for(args->rows, row_grain(args->columns), [&](std::int64_t begin, std::int64_t end, int part) {
    kernels->update(args, begin, end, partial[part]);
  });
  for (auto& stats : partial)
    for (int i = 0; i < 4; ++i) args->stats[i] += stats[i];
}
}
