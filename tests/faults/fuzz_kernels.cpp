// Fuzzes the C interface of the CPU kernels with random shapes and values; tests/faults/test_fuzz.py builds it with sanitizers.
//
// Every buffer is allocated at its exact size, so that an access one byte too far is reported. Values are drawn from a
// bag with NaN, Inf, denormals, signed zeros and the ends of every integer type. The instruction sets must agree bit
// for bit, for one thread and for three, and bad sizes must be refused before a pointer is read (all are null there).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dqt_cpu.h"

extern "C" {
int dqt_row_squares(std::int64_t, std::int64_t, const float*, const float*, float*);
int dqt_packed_linear(std::int64_t, std::int64_t, const float*, const std::uint8_t*, const float*, std::int64_t,
                      std::int64_t, std::int64_t, std::int64_t, const float*, float*);
int dqt_rms_norm(std::int64_t, std::int64_t, const float*, const float*, double, float*, float*);
int dqt_rms_norm_backward(std::int64_t, std::int64_t, const float*, const float*, const float*, const float*, float*,
                          float*);
int dqt_swiglu(std::int64_t, std::int64_t, const float*, const float*, float*);
int dqt_swiglu_quantized(std::int64_t, std::int64_t, const float*, const float*, std::int8_t*, float*);
int dqt_swiglu_backward(std::int64_t, std::int64_t, const float*, const float*, const float*, float*, float*);
int dqt_rotary(std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*, const float*, const float*,
               std::int64_t, float*);
int dqt_update(DqtUpdate*);
int dqt_select(const char*);
void dqt_set_threads(int);
int dqt_quantize_rows(std::int64_t, std::int64_t, const float*, std::int8_t*, float*);
int dqt_quantize_columns(std::int64_t, std::int64_t, const float*, const float*, std::int8_t*, float*);
int dqt_scale_product(std::int64_t, std::int64_t, const std::int32_t*, const float*, const float*, const float*,
                      float*);
int dqt_mean_squares(std::int64_t, std::int64_t, const float*, float*, float*);
int dqt_pack(std::int64_t, std::int64_t, const std::int8_t*, std::int64_t, std::uint8_t*);
int dqt_unpack(std::int64_t, std::int64_t, const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t,
               std::int8_t*);
int dqt_causal_attention(std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*,
                         const float*, const float*, double, float*, float*, float*);
int dqt_causal_attention_backward(std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*,
                                  const float*, const float*, const float*, float*, float*, float*, double, float*,
                                  float*, float*);
}

namespace {

#ifdef DQT_FUZZ_SHORT
constexpr int kMissing = 1;  // a buffer is one element short: what the sanitizers must report
#else
constexpr int kMissing = 0;
#endif

using i64 = std::int64_t;
std::mt19937_64 generator;

i64 between(i64 low, i64 high) {
  return low + static_cast<i64>(generator() % static_cast<std::uint64_t>(high - low + 1));
}

i64 random_size() {
  static const i64 edges[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1025};
  return between(0, 2) ? edges[between(0, 18)] : between(0, 700);
}

float random_float(bool finite) {
  using limits = std::numeric_limits<float>;
  static const float odd[] = {0.0f, -0.0f, limits::denorm_min(), -limits::denorm_min(), limits::min(), 1e-30f, 1e-38f,
                              limits::max(), -limits::max(), 1.0f, -1.0f, 0.5f, 127.0f, 16777216.0f};
  static const float bad[] = {limits::quiet_NaN(), limits::infinity(), -limits::infinity()};
  const i64 kind = between(0, 99);
  if (kind == 0 && !finite) return bad[between(0, 2)];
  if (kind < 5) return odd[between(0, 13)];
  return std::ldexp(static_cast<float>(between(-1000000, 1000000)) * 1e-6f, static_cast<int>(between(-8, 8)));
}

std::vector<float> floats(i64 count, bool finite = false) {
  std::vector<float> v(static_cast<std::size_t>(count));
  const bool clean = finite || between(0, 1);
  for (auto& x : v) x = random_float(clean);
  return v;
}

template <class T>
std::vector<T> integers(i64 count) {
  std::vector<T> v(static_cast<std::size_t>(count));
  const bool extremes = between(0, 3) == 0;
  using limits = std::numeric_limits<T>;
  for (auto& x : v) {
    x = !extremes ? static_cast<T>(generator()) : between(0, 1) ? limits::min() : limits::max();
  }
  return v;
}

i64 packed_size(i64 count, i64 bits) { return (count * bits + 7) / 8; }

[[noreturn]] void fail(const char* what, const std::string& where, i64 rows, i64 columns) {
  std::fprintf(stderr, "%s: %s at [%lld, %lld]\n", where.c_str(), what, static_cast<long long>(rows),
               static_cast<long long>(columns));
  std::exit(1);
}

// What a case wrote, as bytes; NaNs count as equal whatever their bits.
struct Output {
  std::vector<std::uint8_t> bytes;
  template <class T>
  void add(const std::vector<T>& v) {
    const auto* p = reinterpret_cast<const std::uint8_t*>(v.data());
    bytes.insert(bytes.end(), p, p + v.size() * sizeof(T));
  }
  void add(std::vector<float> v) {
    for (auto& x : v)
      if (std::isnan(x)) x = std::numeric_limits<float>::quiet_NaN();
    add<float>(v);
  }
};

struct Case {
  const char* name;
  Output (*run)(i64 rows, i64 columns);  // draws its inputs from `generator`, which is set back between runs
};

Output run_quantize_rows(i64 rows, i64 columns) {
  const auto x = floats(rows * columns);
  std::vector<std::int8_t> q(x.size());
  std::vector<float> scale(static_cast<std::size_t>(rows > 0 ? rows - kMissing : 0));
  if (dqt_quantize_rows(rows, columns, x.data(), q.data(), scale.data()))
    fail("refused", "quantize_rows", rows, columns);
  Output out;
  out.add(q);
  out.add(scale);
  return out;
}

Output run_quantize_columns(i64 rows, i64 columns) {
  const auto x = floats(rows * columns), factor = floats(rows);
  std::vector<std::int8_t> q(x.size());
  std::vector<float> scale(static_cast<std::size_t>(columns));
  if (dqt_quantize_columns(rows, columns, x.data(), between(0, 1) ? factor.data() : nullptr, q.data(), scale.data()))
    fail("refused", "quantize_columns", rows, columns);
  Output out;
  out.add(q);
  out.add(scale);
  return out;
}

Output run_scale_product(i64 rows, i64 columns) {
  const auto product = integers<std::int32_t>(rows * columns);
  const auto row = floats(rows), column = floats(columns), bias = floats(columns);
  std::vector<float> y(product.size());
  if (dqt_scale_product(rows, columns, product.data(), row.data(), between(0, 1) ? column.data() : nullptr,
                        between(0, 1) ? bias.data() : nullptr, y.data()))
    fail("refused", "scale_product", rows, columns);
  Output out;
  out.add(y);
  return out;
}

Output run_mean_squares(i64 rows, i64 columns) {
  const auto x = floats(rows * columns);
  std::vector<float> row(static_cast<std::size_t>(rows)), column(static_cast<std::size_t>(columns));
  const bool empty = rows == 0 || columns == 0;
  if (dqt_mean_squares(rows, columns, x.data(), row.data(), column.data()) != (empty ? 1 : 0))
    fail("refused, or accepted without elements", "mean_squares", rows, columns);
  Output out;
  if (!empty) {
    out.add(row);
    out.add(column);
  }
  return out;
}

Output run_packing(i64 rows, i64 columns) {
  const i64 bits = between(1, 8), bytes = packed_size(columns, bits), is_signed = between(0, 1);
  const auto values = integers<std::int8_t>(rows * columns);
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(rows * bytes)), again(packed.size());
  std::vector<std::int8_t> unpacked(values.size());
  if (dqt_pack(rows, columns, values.data(), bits, packed.data()) ||
      dqt_unpack(rows, bytes, packed.data(), bits, columns, is_signed, unpacked.data()) ||
      dqt_pack(rows, columns, unpacked.data(), bits, again.data()))
    fail("refused", "packing", rows, columns);
  if (packed != again) fail("does not survive a round trip", "packing", rows, columns);
  Output out;
  out.add(packed);
  out.add(unpacked);
  return out;
}

// Finite values only: which of a NaN and a number is larger depends on the instruction set.
Output run_attention(i64 rows, i64 columns) {
  const i64 positions = 1 + rows % 130, width = 1 + columns % 70, kv_heads = between(1, 2), batch = between(1, 2);
  const i64 heads = kv_heads * between(1, 2), tokens = batch * positions;
  const auto small = [](i64 count) {
    std::vector<float> v(static_cast<std::size_t>(count));
    for (auto& x : v) x = static_cast<float>(between(-4000, 4000)) * 1e-3f;
    return v;
  };
  const auto query = small(tokens * heads * width), dout = small(tokens * heads * width);
  const auto key = small(tokens * kv_heads * width), value = small(tokens * kv_heads * width);
  std::vector<float> out(query.size()), dquery(query.size()), dkey(key.size()), dvalue(key.size());
  std::vector<float> top(static_cast<std::size_t>(tokens * heads)), inverse(top.size());
  if (dqt_causal_attention(tokens * heads, width, positions, heads, kv_heads, query.data(), key.data(), value.data(),
                           0.25, out.data(), top.data(), inverse.data()) ||
      dqt_causal_attention_backward(tokens * heads, width, positions, heads, kv_heads, dout.data(), query.data(),
                                    key.data(), value.data(), out.data(), top.data(), inverse.data(), 0.25,
                                    dquery.data(), dkey.data(), dvalue.data()))
    fail("refused", "attention", rows, columns);
  Output output;
  for (const auto& each : {out, top, inverse, dquery, dkey, dvalue}) output.add(each);
  return output;
}

Output run_row_squares(i64 rows, i64 columns) {
  const auto x = floats(rows * columns), factor = floats(columns);
  std::vector<float> mean(static_cast<std::size_t>(rows));
  if (dqt_row_squares(rows, columns, x.data(), between(0, 1) ? factor.data() : nullptr, mean.data()))
    fail("refused", "row_squares", rows, columns);
  Output out;
  out.add(mean);
  return out;
}

Output run_packed_linear(i64 rows, i64 columns) {
  const i64 tokens = between(0, 5), bits = between(1, 8), is_signed = bits > 1, per_row = between(0, 1);
  const auto x = floats(tokens * columns, true), scale = floats(per_row ? rows : 1, true), bias = floats(rows, true);
  const auto codes = integers<std::uint8_t>(rows * packed_size(columns, bits));
  std::vector<float> y(static_cast<std::size_t>(tokens * rows));
  if (dqt_packed_linear(tokens, columns, x.data(), codes.data(), scale.data(), rows, bits, is_signed, per_row,
                        between(0, 1) ? bias.data() : nullptr, y.data()))
    fail("refused", "packed_linear", rows, columns);
  Output out;
  out.add(y);
  return out;
}

Output run_rms_norm(i64 rows, i64 columns) {
  const auto x = floats(rows * columns), weight = floats(columns), dy = floats(rows * columns);
  std::vector<float> y(x.size()), rstd(static_cast<std::size_t>(rows)), dx(x.size()), dweight(weight.size());
  if (dqt_rms_norm(rows, columns, x.data(), weight.data(), 1e-6, y.data(), rstd.data()) ||
      dqt_rms_norm_backward(rows, columns, dy.data(), x.data(), weight.data(), rstd.data(), dx.data(), dweight.data()))
    fail("refused", "rms_norm", rows, columns);
  Output out;
  for (const auto& each : {y, rstd, dx, dweight}) out.add(each);
  return out;
}

Output run_swiglu(i64 rows, i64 columns) {
  const auto gate = floats(rows * columns), up = floats(rows * columns), dh = floats(rows * columns);
  std::vector<float> h(gate.size()), scale(static_cast<std::size_t>(rows)), dgate(gate.size()), dup(gate.size());
  std::vector<std::int8_t> q(gate.size());
  if (dqt_swiglu(rows, columns, gate.data(), up.data(), h.data()) ||
      dqt_swiglu_quantized(rows, columns, gate.data(), up.data(), q.data(), scale.data()) ||
      dqt_swiglu_backward(rows, columns, dh.data(), gate.data(), up.data(), dgate.data(), dup.data()))
    fail("refused", "swiglu", rows, columns);
  Output out;
  for (const auto& each : {h, scale, dgate, dup}) out.add(each);
  out.add(q);
  return out;
}

Output run_rotary(i64 rows, i64 columns) {
  const i64 width = columns + columns % 2, heads = between(1, 4), positions = between(1, 9);
  const auto x = floats(rows * heads * width), cos = floats(positions * width), sin = floats(positions * width);
  std::vector<float> y(x.size());
  if (dqt_rotary(rows * heads, width, positions, heads, x.data(), cos.data(), sin.data(), between(0, 1), y.data()))
    fail("refused", "rotary", rows, columns);
  Output out;
  out.add(y);
  return out;
}

// Every form of weight, residual and moment; gradients are finite, because Python lets no others through.
Output run_update(i64 rows, i64 columns) {
  const i64 count = rows * columns, blocks = (columns + DQT_BLOCK - 1) / DQT_BLOCK, bits = between(1, 8);
  const bool packed = between(0, 2) > 0, residual = packed && between(0, 1);
  const i64 widths[] = {2, 3, 4, 5, 6, 7, 8, 16}, residual_bits = residual ? widths[between(0, 7)] : 0;
  const i64 unit = residual ? i64{1} << (residual_bits - 1) : 1;
  auto small = [](std::vector<float> v) {
    for (auto& x : v) x = std::fmod(x, 100.0f);
    return v;
  };
  auto positive = [&small](std::vector<float> v) {
    for (auto& x : v = small(v)) x = std::fabs(x) + 1e-3f;
    return v;
  };
  DqtUpdate args{};
  const auto grad = small(floats(count, true));
  auto weight = small(floats(packed ? 0 : count, true));
  auto codes = integers<std::uint8_t>(packed ? rows * packed_size(columns, bits) : 0);
  auto rest = integers<std::uint8_t>(residual ? rows * packed_size(columns, residual_bits) : 0);
  args.scale_per_row = static_cast<std::int32_t>(between(0, 1));
  const auto scale = positive(floats(args.scale_per_row ? rows : 1, true));
  args.first = static_cast<std::int32_t>(between(kNone, kInt8));
  constexpr std::int32_t kSeconds[] = {kNone, kFull, kInt8, kFactored};
  args.second = kSeconds[between(0, 3)];
  const i64 sizes[] = {0, 4, 2, 1, 0};
  std::vector<std::uint8_t> first(static_cast<std::size_t>(count * sizes[args.first]));
  std::vector<std::uint8_t> second(static_cast<std::size_t>(count * sizes[args.second]));
  std::vector<float> first_scale(static_cast<std::size_t>(args.first == kInt8 ? rows * blocks : 0));
  std::vector<float> second_scale(static_cast<std::size_t>(args.second == kInt8 ? rows * blocks : 0));
  const auto row = positive(floats(rows, true)), column = positive(floats(columns, true));
  args.codes = packed ? codes.data() : nullptr;
  args.weight = packed ? nullptr : weight.data();
  args.scale = scale.data();
  args.residual = residual ? rest.data() : nullptr;
  args.grad = grad.data();
  args.exp_avg = first.data();
  args.exp_avg_sq = second.data();
  args.exp_avg_scale = first_scale.data();
  args.exp_avg_sq_scale = second_scale.data();
  args.row_inverse = row.data();
  args.column_inverse = column.data();
  args.rows = rows, args.columns = columns;
  args.code_bytes = packed_size(columns, bits), args.residual_bytes = packed_size(columns, residual_bits);
  args.scale_blocks = blocks;
  args.stream = generator(), args.seed = 7, args.purpose = 1, args.moment_purpose = 2, args.step = 3;
  args.normalize_first = static_cast<std::int32_t>(between(0, 1));
  args.rounded_moments = args.first == kBfloat || args.first == kInt8 || args.second == kInt8;
  args.bits = static_cast<std::int32_t>(bits), args.qmin = bits == 1 ? 0 : -(1 << (bits - 1)), args.levels = 1 << bits;
  args.residual_bits = static_cast<std::int32_t>(residual_bits);
  args.threshold = static_cast<std::int32_t>(0.556 * static_cast<double>(unit));
  args.short_positions = (args.levels - 1) * unit < (1 << 14);
  args.rounding = static_cast<std::int32_t>(between(0, 2)), args.count = static_cast<std::int32_t>(between(0, 1));
  args.bottom = (static_cast<float>(args.qmin) - (bits == 1 ? 0.5f : 0.0f)) * static_cast<float>(unit);
  args.lr_unit = 0.01f * static_cast<float>(unit), args.decay = 0.001f, args.keep = 0.999f;
  args.beta1 = 0.9f, args.weight1 = 0.1f, args.beta2 = 0.99f, args.weight2 = 0.01f;
  args.root_factor = 1.5f, args.eps = 1e-8f;
  args.least = between(0, 1) ? 0.3f : 0.0f;
  if (dqt_update(&args)) fail("refused", "update", rows, columns);
  Output out;
  for (const auto& each : {weight, first_scale, second_scale}) out.add(each);
  for (const auto& each : {codes, rest, first, second}) out.add(each);
  out.add(std::vector<i64>(args.stats, args.stats + 4));
  return out;
}

constexpr Case kCases[] = {{"row_squares", run_row_squares}, {"packed_linear", run_packed_linear},
                           {"rms_norm", run_rms_norm}, {"swiglu", run_swiglu}, {"rotary", run_rotary},
                           {"update", run_update},
                           {"quantize_rows", run_quantize_rows}, {"quantize_columns", run_quantize_columns},
                           {"scale_product", run_scale_product}, {"mean_squares", run_mean_squares},
                           {"packing", run_packing},             {"attention", run_attention}};

void refuse_bad_sizes() {
  constexpr i64 huge = std::numeric_limits<i64>::max();
  const std::pair<i64, i64> sizes[] = {{-1, 4}, {4, -1}, {huge, huge}, {huge, 2}, {i64{1} << 32, i64{1} << 32}};
  for (const auto& [rows, columns] : sizes) {
    const int status[] = {dqt_quantize_rows(rows, columns, nullptr, nullptr, nullptr),
                          dqt_quantize_columns(rows, columns, nullptr, nullptr, nullptr, nullptr),
                          dqt_scale_product(rows, columns, nullptr, nullptr, nullptr, nullptr, nullptr),
                          dqt_mean_squares(rows, columns, nullptr, nullptr, nullptr),
                          dqt_pack(rows, columns, nullptr, 2, nullptr),
                          dqt_unpack(rows, columns, nullptr, 2, columns, 1, nullptr)};
    for (const int s : status)
      if (s != 1) fail("accepted", "bad sizes", rows, columns);
  }
  for (const i64 bits : {i64{-1}, i64{0}, i64{9}, i64{1} << 32}) {
    if (dqt_pack(8, 8, nullptr, bits, nullptr) != 1 || dqt_unpack(8, bits, nullptr, bits, 8, 1, nullptr) != 1)
      fail("accepted", "bits", 8, bits);
  }
  if (dqt_unpack(8, 3, nullptr, 2, 8, 1, nullptr) != 1) fail("accepted", "a wrong row of bytes", 8, 3);
  const i64 attention[][5] = {{0, 4, 2, 2, 1}, {8, 0, 2, 2, 1}, {8, 4, 0, 2, 1},    {8, 4, 2, 0, 1}, {8, 4, 2, 2, 0},
                              {7, 4, 2, 2, 1}, {12, 4, 2, 3, 2}, {8, 4, -2, -2, 1}, {huge, 4, huge, 1, 1}};
  for (const auto& [rows, width, positions, heads, kv_heads] : attention) {
    if (dqt_causal_attention(rows, width, positions, heads, kv_heads, nullptr, nullptr, nullptr, 1, nullptr, nullptr,
                             nullptr) != 1)
      fail("accepted", "attention's sizes", rows, width);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const i64 rounds = argc > 1 ? std::atoll(argv[1]) : 100;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  std::vector<const char*> isas;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (dqt_select(isa) == 0) isas.push_back(isa);
  }
  refuse_bad_sizes();
  for (i64 round = 0; round < rounds; ++round) {
    for (const Case& c : kCases) {
      const std::uint64_t at = seed * 1000003 + static_cast<std::uint64_t>(round);
      Output expected;
      for (const char* isa : isas) {
        for (const int threads : {1, 3}) {
          dqt_select(isa);
          dqt_set_threads(threads);
          generator.seed(at);
          const i64 rows = random_size() % 70, columns = random_size();
          Output out = c.run(rows, columns);
          if (isa == isas[0] && threads == 1) expected = out;
          if (out.bytes != expected.bytes)
            fail("differs from portable", std::string(c.name) + " on " + isa, rows, columns);
        }
      }
    }
  }
  std::printf("%lld rounds on %zu instruction sets\n", static_cast<long long>(rounds), isas.size());
}
