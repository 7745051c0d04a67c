// The exported functions: they choose an instruction set once and spread rows over threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "dqt_cpu.h"
#include "parallel.h"

extern "C" const DqtKernels* dqt_kernels_portable();
extern "C" int dqt_gemm_select(const char* isa);
#ifdef DQT_X86
extern "C" const DqtKernels* dqt_kernels_avx2();
extern "C" const DqtKernels* dqt_kernels_avx512();
#endif

namespace dqt {
Threads threads;
}

namespace {

constexpr std::int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves
constexpr std::int64_t kProductGrain = std::int64_t{1} << 18;  // the same for a packed product: 16 weights a ns
constexpr std::int64_t kMaxInner = 131071;  // above, int32 could wrap
const DqtKernels* kernels = nullptr;
const char* active = "none";

const DqtKernels* find(const char* name) {
  if (std::strcmp(name, "portable") == 0) {
    dqt_gemm_select(name);
    active = "portable";
    return dqt_kernels_portable();
  }
#ifdef DQT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "amx") == 0 && avx512 && dqt_gemm_select("amx") == 0) {
    active = "amx";
    return dqt_kernels_avx512();
  }
  dqt_gemm_select(name);  // without a product of its own, Python multiplies
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

// What a kernel returns. Python checks shapes before it passes pointers; these are the last line of defence.
enum Status { kOk = 0, kBadSize = 1, kNotSelected = 2, kNoMemory = 3 };

constexpr std::int64_t kMaxElements = std::int64_t{1} << 58;  // bytes, and bits of a row, stay below 2^63
constexpr std::int64_t kMaxStream = std::int64_t{1} << 34;    // elements that have random numbers

bool fits(std::int64_t rows, std::int64_t columns) {
  return rows >= 0 && columns >= 0 && (columns == 0 || rows <= kMaxElements / columns);
}

// Whether an update has every tensor that it would read; a parameter without elements has none.
bool has_tensors(const DqtUpdate& a) {
  if (a.rows == 0 || a.columns == 0) return true;
  return a.grad && (a.codes ? a.scale != nullptr : a.weight != nullptr) && (a.first == kNone || a.exp_avg) &&
         (a.first != kInt8 || a.exp_avg_scale) && (a.second == kNone || a.second == kFactored || a.exp_avg_sq) &&
         (a.second != kInt8 || a.exp_avg_sq_scale) && (a.second != kFactored || (a.row_inverse && a.column_inverse)) &&
         (a.residual_bits == 0 || a.residual);
}

bool packs(std::int64_t bits) { return bits >= 1 && bits <= 8; }

std::int64_t packed_size(std::int64_t count, std::int64_t bits) { return (count * bits + 7) / 8; }

template <class Body>
int over_rows(std::int64_t rows, std::int64_t columns, const Body& body) {
  if (!kernels) return kNotSelected;
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int) { body(begin, end); });
  return kOk;
}

// Spreads the batch * kv_heads heads of keys over threads, each with scratch memory of its own.
int over_heads(const DqtAttention& a, void (*kernel)(const DqtAttention*, std::int64_t, std::int64_t, float*)) {
  const std::int64_t units = a.batch * a.kv_heads;
  const std::int64_t parts = std::min<std::int64_t>({units, dqt::threads.count, dqt::kMaxParts});
  const std::int64_t each = kernels->attention_scratch(&a);
  const std::unique_ptr<float[]> scratch(new (std::nothrow) float[each * parts]);
  if (!scratch) return kNoMemory;
  dqt::parallel_for(units, 1, [&](std::int64_t begin, std::int64_t end, int part) {
    kernel(&a, begin, end, scratch.get() + part * each);
  });
  return kOk;
}

bool attends(std::int64_t rows, std::int64_t width, std::int64_t positions, std::int64_t heads, std::int64_t kv_heads) {
  return fits(rows, width) && rows > 0 && width > 0 && positions > 0 && heads > 0 && kv_heads > 0 &&
         heads % kv_heads == 0 && fits(positions, heads) && rows % (positions * heads) == 0 &&
         fits(positions + 64, 8 * (width + 64));
}

template <class Body>
int over_columns(std::int64_t rows, std::int64_t columns, const Body& body) {
  if (!kernels) return kNotSelected;
  const std::int64_t grain = rows > 0 ? std::max<std::int64_t>(64, kGrain / rows) : 64;
  dqt::parallel_for(columns, grain, [&](std::int64_t begin, std::int64_t end, int) { body(begin, end); });
  return kOk;
}

}  // namespace

extern "C" {

// Version of this interface; Python refuses a library of another one.
int dqt_interface_version() { return 9; }

// Chooses "amx" (avx512 with another integer product), "avx512", "avx2" or "portable". Returns 0, or 1 if this CPU or build lacks it.
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

int dqt_quantize_rows(std::int64_t rows, std::int64_t columns, const float* x, std::int8_t* q, float* scale) {
  if (!fits(rows, columns)) return kBadSize;
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->quantize_rows(x, columns, begin, end, q, scale);
  });
}

// `row_factor` [rows] or null multiplies x first.
int dqt_quantize_columns(std::int64_t rows, std::int64_t columns, const float* x, const float* row_factor,
                         std::int8_t* q, float* scale) {
  if (!fits(rows, columns)) return kBadSize;
  const std::unique_ptr<std::uint32_t[]> top(new (std::nothrow) std::uint32_t[columns]);
  const std::unique_ptr<float[]> inverse(new (std::nothrow) float[columns]);
  if (!top || !inverse) return kNoMemory;
  const int status = over_columns(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->column_absmax(x, row_factor, rows, columns, begin, end, top.get());
  });
  if (status) return status;
  for (std::int64_t c = 0; c < columns; ++c) {
    float absmax;
    std::memcpy(&absmax, &top[c], 4);
    const bool finite = std::isfinite(absmax);
    scale[c] = finite ? absmax / 127.0f : NAN;
    inverse[c] = finite && absmax > 1e-30f ? 127.0f / absmax : 0.0f;
  }
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->quantize_columns(x, row_factor, columns, begin, end, inverse.get(), q);
  });
}

// y = product * row_scale * column_scale + bias; `column_scale` and `bias` may be null.
int dqt_scale_product(std::int64_t rows, std::int64_t columns, const std::int32_t* product, const float* row_scale,
                      const float* column_scale, const float* bias, float* y) {
  if (!fits(rows, columns)) return kBadSize;
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->scale_product(product, columns, begin, end, row_scale, column_scale, bias, y);
  });
}

int dqt_mean_squares(std::int64_t rows, std::int64_t columns, const float* x, float* row_mean, float* column_mean) {
  if (!fits(rows, columns) || rows == 0 || columns == 0) return kBadSize;  // no elements have no mean
  if (!kernels) return kNotSelected;
  const std::int64_t blocks = (rows + DQT_BLOCK_ROWS - 1) / DQT_BLOCK_ROWS;
  const std::unique_ptr<float[]> partial(new (std::nothrow) float[blocks * columns]);
  if (!partial) return kNoMemory;
  float* sums = partial.get();
  dqt::parallel_for(blocks, row_grain(columns * DQT_BLOCK_ROWS), [&](std::int64_t begin, std::int64_t end, int) {
    kernels->block_squares(x, rows, columns, begin, end, row_mean, sums);
  });
  for (std::int64_t block = 1; block < blocks; ++block)
    for (std::int64_t c = 0; c < columns; ++c) sums[c] += sums[block * columns + c];
  for (std::int64_t c = 0; c < columns; ++c) column_mean[c] = sums[c] / static_cast<float>(rows);
  return kOk;
}

// Of x * column_factor, which may be null for 1.
int dqt_row_squares(std::int64_t rows, std::int64_t columns, const float* x, const float* column_factor, float* mean) {
  if (!fits(rows, columns)) return kBadSize;
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->row_squares(x, column_factor, columns, begin, end, mean);
  });
}

int dqt_pack(std::int64_t rows, std::int64_t count, const std::int8_t* values, std::int64_t bits,
             std::uint8_t* packed) {
  if (!fits(rows, count) || !packs(bits)) return kBadSize;
  return over_rows(rows, count, [&](std::int64_t begin, std::int64_t end) {
    kernels->pack(values, count, packed_size(count, bits), static_cast<int>(bits), begin, end, packed);
  });
}

int dqt_unpack(std::int64_t rows, std::int64_t bytes, const std::uint8_t* packed, std::int64_t bits,
               std::int64_t count, std::int64_t is_signed, std::int8_t* values) {
  if (!fits(rows, count) || !packs(bits) || bytes != packed_size(count, bits)) return kBadSize;
  return over_rows(rows, count, [&](std::int64_t begin, std::int64_t end) {
    kernels->unpack(packed, count, bytes, static_cast<int>(bits), is_signed != 0, begin, end, values);
  });
}

// y = quantized x times packed codes, scaled, plus `bias` (may be null); `scale` has one number, or one an output.
int dqt_packed_linear(std::int64_t tokens, std::int64_t columns, const float* x, const std::uint8_t* codes,
                      const float* scale, std::int64_t outputs, std::int64_t bits, std::int64_t is_signed,
                      std::int64_t per_row, const float* bias, float* y) {
  if (!fits(tokens, columns) || !fits(tokens, outputs) || !fits(outputs, columns) || !packs(bits)) return kBadSize;
  if (columns > kMaxInner || (!is_signed && bits != 1)) return kBadSize;
  if (!kernels) return kNotSelected;
  const std::int64_t spare = columns + 8, bytes = packed_size(columns, bits);  // planes are padded to whole bytes
  const std::unique_ptr<std::int8_t[]> q(new (std::nothrow) std::int8_t[columns + 1]);
  const std::unique_ptr<std::int16_t[]> planes(new (std::nothrow) std::int16_t[spare]);
  const std::unique_ptr<std::int32_t[]> product(new (std::nothrow) std::int32_t[outputs + 1]);
  const std::unique_ptr<float[]> column_scale(new (std::nothrow) float[outputs + 1]);
  if (!q || !planes || !product || !column_scale) return kNoMemory;
  const float step = is_signed ? 1.0f : 0.5f;  // binary codes are doubled, {-1, 1} for {-1/2, 1/2}
  if (per_row)
    for (std::int64_t o = 0; o < outputs; ++o) column_scale[o] = scale[o] * step;
  const std::int64_t grain = std::max<std::int64_t>(1, kProductGrain / std::max<std::int64_t>(1, columns));
  for (std::int64_t t = 0; t < tokens; ++t) {
    float row_scale;
    kernels->quantize_rows(x + t * columns, columns, 0, 1, q.get(), &row_scale);
    kernels->spread(q.get(), columns, static_cast<int>(bits), planes.get());
    dqt::parallel_for(outputs, grain, [&](std::int64_t begin, std::int64_t end, int) {
      kernels->packed_product(codes, columns, bytes, static_cast<int>(bits), is_signed != 0, planes.get(), begin, end,
                              product.get());
    });
    if (!per_row) row_scale *= scale[0] * step;
    kernels->scale_product(product.get(), outputs, 0, 1, &row_scale, per_row ? column_scale.get() : nullptr, bias,
                           y + t * outputs);
  }
  return kOk;
}

int dqt_rms_norm(std::int64_t rows, std::int64_t columns, const float* x, const float* weight, double eps, float* y,
                 float* rstd) {
  if (!fits(rows, columns)) return kBadSize;
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->rms_norm(x, weight, static_cast<float>(eps), columns, begin, end, y, rstd);
  });
}

int dqt_rms_norm_backward(std::int64_t rows, std::int64_t columns, const float* dy, const float* x,
                          const float* weight, const float* rstd, float* dx, float* dweight) {
  if (!fits(rows, columns)) return kBadSize;
  const int status = over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->rms_norm_grad_input(dy, x, weight, rstd, columns, begin, end, dx);
  });
  if (status) return status;
  return over_columns(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->rms_norm_grad_weight(dy, x, rstd, rows, columns, begin, end, dweight);
  });
}

int dqt_swiglu(std::int64_t rows, std::int64_t columns, const float* gate, const float* up, float* h) {
  if (!fits(rows, columns)) return kBadSize;
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->swiglu(gate, up, columns, begin, end, h, nullptr, nullptr);
  });
}

int dqt_swiglu_quantized(std::int64_t rows, std::int64_t columns, const float* gate, const float* up, std::int8_t* q,
                         float* scale) {
  if (!fits(rows, columns)) return kBadSize;
  if (!kernels) return kNotSelected;
  const std::unique_ptr<float[]> row_each(new (std::nothrow) float[columns * dqt::threads.count]);
  if (!row_each) return kNoMemory;
  dqt::parallel_for(rows, row_grain(columns), [&](std::int64_t begin, std::int64_t end, int part) {
    kernels->swiglu(gate, up, columns, begin, end, row_each.get() + part * columns, q, scale);
  });
  return kOk;
}

int dqt_swiglu_backward(std::int64_t rows, std::int64_t columns, const float* dh, const float* gate, const float* up,
                        float* dgate, float* dup) {
  if (!fits(rows, columns)) return kBadSize;
  return over_rows(rows, columns, [&](std::int64_t begin, std::int64_t end) {
    kernels->swiglu_backward(dh, gate, up, begin * columns, end * columns, dgate, dup);
  });
}

// x [rows, width]: `heads` rows for each token; cos and sin [positions, width].
int dqt_rotary(std::int64_t rows, std::int64_t width, std::int64_t positions, std::int64_t heads, const float* x,
               const float* cos, const float* sin, std::int64_t transposed, float* y) {
  if (!fits(rows, width) || width % 2 || heads < 1 || rows % heads || positions < 1) return kBadSize;
  return over_rows(rows / heads, heads * width, [&](std::int64_t begin, std::int64_t end) {
    kernels->rotary(x, cos, sin, heads, width, positions, transposed != 0, begin, end, y);
  });
}

// query [rows, width], in the order batch, positions, heads.
int dqt_causal_attention(std::int64_t rows, std::int64_t width, std::int64_t positions, std::int64_t heads,
                         std::int64_t kv_heads, const float* query, const float* key, const float* value,
                         double scale, float* out, float* top, float* inverse) {
  if (!attends(rows, width, positions, heads, kv_heads)) return kBadSize;
  if (!kernels) return kNotSelected;
  DqtAttention a{query, key, value, out, top, inverse, rows / (positions * heads), positions, heads, kv_heads, width,
                 static_cast<float>(scale), nullptr, nullptr, nullptr, nullptr};
  return over_heads(a, kernels->attention);
}

int dqt_causal_attention_backward(std::int64_t rows, std::int64_t width, std::int64_t positions, std::int64_t heads,
                                  std::int64_t kv_heads, const float* dout, const float* query, const float* key,
                                  const float* value, float* out, float* top, float* inverse, double scale,
                                  float* dquery, float* dkey, float* dvalue) {
  if (!attends(rows, width, positions, heads, kv_heads)) return kBadSize;
  if (!kernels) return kNotSelected;
  DqtAttention a{query, key, value, out, top, inverse, rows / (positions * heads), positions, heads, kv_heads, width,
                 static_cast<float>(scale), dout, dquery, dkey, dvalue};
  return over_heads(a, kernels->attention_backward);
}

int dqt_update(DqtUpdate* args) {
  const DqtUpdate& a = *args;
  // An element's index / 4 is one 32-bit word of the counter of its random numbers.
  if (!fits(a.rows, a.columns) || a.rows * a.columns > kMaxStream) return kBadSize;
  if (a.first < kNone || a.first > kInt8 || a.second < kNone || a.second > kFactored || a.second == kBfloat)
    return kBadSize;
  if (!has_tensors(a)) return kBadSize;
  if (a.codes) {
    if (!packs(a.bits) || a.code_bytes != packed_size(a.columns, a.bits)) return kBadSize;
    if (a.levels < 2 || a.levels > 1 << a.bits) return kBadSize;
  }
  if (a.residual) {
    if (a.residual_bits != 16 && (a.residual_bits < 2 || !packs(a.residual_bits))) return kBadSize;
    if (a.residual_bytes != packed_size(a.columns, a.residual_bits)) return kBadSize;
  }
  if ((a.first == kInt8 || a.second == kInt8) && a.scale_blocks != (a.columns + DQT_BLOCK - 1) / DQT_BLOCK)
    return kBadSize;
  if (!kernels) return kNotSelected;
  std::int64_t partial[dqt::kMaxParts][4] = {};
  dqt::parallel_for(a.rows, row_grain(a.columns), [&](std::int64_t begin, std::int64_t end, int part) {
    kernels->update(args, begin, end, partial[part]);
  });
  for (auto& stats : partial)
    for (int i = 0; i < 4; ++i) args->stats[i] += stats[i];
  return kOk;
}
}
