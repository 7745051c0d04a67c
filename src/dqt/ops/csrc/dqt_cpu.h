// The plain C interface of the CPU kernels, and the table that each instruction set fills.
//
// No torch headers, no exceptions across the boundary: Python checks shapes and types and passes pointers, and every
// kernel returns 0, or says with a status that it did nothing. All matrices are row-major and contiguous. Every result
// is bitwise the same for any number of threads and any instruction set, and the same as dqt/ops/reference.py: floats
// are never contracted (-ffp-contract=off; attention names its fused multiply-adds), division and square root are IEEE,
// and sums have a fixed order.
#pragma once
#include <cstdint>

#define DQT_BLOCK_ROWS 64  // rows in a partial sum of a column
#define DQT_BLOCK 128      // columns that share a scale of an int8 moment

extern "C" {

// How a moment is kept.
enum DqtMoment : std::int32_t { kNone, kFloat, kBfloat, kInt8, kFactored };
constexpr DqtMoment kFull = kFloat;

// How a move is rounded; see numerics/rounding.py.
enum DqtRounding : std::int32_t { kStochastic, kNearest, kLowDiscrepancy };

// One optimizer step of one parameter; see dqt/optim/rule.py, moments.py and writeback.py for the equations. Mirrored
// in ops/cpu.py.
struct DqtUpdate {
  std::uint8_t* codes;        // [rows, code_bytes], or null: a float weight
  float* weight;              // [rows, columns], if float
  const float* scale;         // [] or [rows]
  const float* paper_scale;   // [], or null: the new scale on which values, not moves, are rounded; see optim/paper.py
  std::uint8_t* residual;     // [rows, residual_bytes], or null: strict
  const float* grad;          // [rows, columns]
  void* exp_avg;              // [rows, columns] as `first` says
  void* exp_avg_sq;           // [rows, columns] as `second` says
  float* exp_avg_scale;       // [rows, scale_blocks], if int8
  float* exp_avg_sq_scale;    // [rows, scale_blocks], if int8
  const float* row_inverse;   // [rows], if factored
  const float* column_inverse;  // [columns], if factored
  std::int64_t rows, columns, code_bytes, residual_bytes, scale_blocks;
  std::int64_t stats[4];      // out: flipped, saturated, zeros, sum of squared residuals in units
  std::uint64_t stream;
  std::uint32_t seed, purpose, moment_purpose, step;
  std::int32_t first, second; // DqtMoment
  std::int32_t normalize_first;  // the gradient is divided by the root before it enters the first moment
  std::int32_t rounded_moments;  // moments need random words
  std::int32_t scale_per_row, bits, qmin, levels, residual_bits;
  std::int32_t threshold;     // |position - cell| up to which a code stays, in units
  std::int32_t short_positions;  // the highest position is below 16384
  std::int32_t rounding;      // DqtRounding
  std::int32_t count;         // 1: fill stats
  float bottom;               // (qmin - offset) * unit
  float lr_unit;              // lr * unit; lr of a float weight
  float decay;                // lr * weight_decay
  float keep;                 // 1 - decay
  float beta1, weight1, beta2, weight2, root_factor, eps;
  float least;                // directions of packed weights below this are zero
};

// Causal attention; the second half is for the backward pass only.
struct DqtAttention {
  const float *query, *key, *value;  // [batch, positions, heads, width]; the last two with kv_heads
  float *out;                        // as query
  float *top, *inverse;              // [batch, heads, positions]: the largest score, 1 / (sum of weights)
  std::int64_t batch, positions, heads, kv_heads, width;
  float scale;
  const float *dout;
  float *dquery, *dkey, *dvalue;
};

struct DqtKernels {
  void (*quantize_rows)(const float* x, std::int64_t columns, std::int64_t begin, std::int64_t end,
                        std::int8_t* q, float* scale);
  void (*column_absmax)(const float* x, const float* row_factor, std::int64_t rows, std::int64_t columns,
                        std::int64_t begin, std::int64_t end, std::uint32_t* absmax_bits);
  void (*quantize_columns)(const float* x, const float* row_factor, std::int64_t columns, std::int64_t begin,
                           std::int64_t end, const float* inverse, std::int8_t* q);
  void (*scale_product)(const std::int32_t* product, std::int64_t columns, std::int64_t begin, std::int64_t end,
                        const float* row_scale, const float* column_scale, const float* bias, float* y);
  void (*unpack)(const std::uint8_t* packed, std::int64_t columns, std::int64_t packed_bytes, int bits, int is_signed,
                 std::int64_t begin, std::int64_t end, std::int8_t* values);
  void (*pack)(const std::int8_t* values, std::int64_t columns, std::int64_t packed_bytes, int bits,
               std::int64_t begin, std::int64_t end, std::uint8_t* packed);
  void (*block_squares)(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t begin, std::int64_t end,
                        float* row_mean, float* partial);
  void (*row_squares)(const float* x, const float* column_factor, std::int64_t columns, std::int64_t begin,
                      std::int64_t end, float* mean);
  void (*spread)(const std::int8_t* q, std::int64_t columns, int bits, std::int16_t* planes);
  void (*packed_product)(const std::uint8_t* codes, std::int64_t columns, std::int64_t packed_bytes, int bits,
                         int is_signed, const std::int16_t* planes, std::int64_t begin, std::int64_t end,
                         std::int32_t* product);
  void (*update)(const DqtUpdate* args, std::int64_t begin, std::int64_t end, std::int64_t stats[4]);
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t columns, std::int64_t begin,
                   std::int64_t end, float* y, float* rstd);
  void (*rms_norm_grad_input)(const float* dy, const float* x, const float* weight, const float* rstd,
                              std::int64_t columns, std::int64_t begin, std::int64_t end, float* dx);
  void (*rms_norm_grad_weight)(const float* dy, const float* x, const float* rstd, std::int64_t rows,
                               std::int64_t columns, std::int64_t begin, std::int64_t end, float* dweight);
  void (*swiglu)(const float* gate, const float* up, std::int64_t columns, std::int64_t begin, std::int64_t end,
                 float* h, std::int8_t* q, float* scale);
  void (*swiglu_backward)(const float* dh, const float* gate, const float* up, std::int64_t begin, std::int64_t end,
                          float* dgate, float* dup);
  void (*rotary)(const float* x, const float* cos, const float* sin, std::int64_t heads, std::int64_t width,
                 std::int64_t positions, int transposed, std::int64_t begin, std::int64_t end, float* y);
  std::int64_t (*attention_scratch)(const DqtAttention* args);  // floats a thread needs
  void (*attention)(const DqtAttention* args, std::int64_t begin, std::int64_t end, float* scratch);
  void (*attention_backward)(const DqtAttention* args, std::int64_t begin, std::int64_t end, float* scratch);
};
}
