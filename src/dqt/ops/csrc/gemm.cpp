// The exported integer product: chooses an instruction set and spreads panels over threads.
#include <cstring>

#include "gemm.h"
#include "parallel.h"

namespace {

const dqt::GemmKernels* kernels = nullptr;

const dqt::GemmKernels* find(const char* isa) {
#if defined(DQT_X86) && defined(DQT_GEMM)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return nullptr;
  if (std::strcmp(isa, "amx") == 0 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8"))
    return dqt_gemm_amx();
  if (std::strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512vnni")) return dqt_gemm_vnni();
#else
  (void)isa;
#endif
  return nullptr;
}

}  // namespace

extern "C" {

// Chooses the product of an instruction set ("amx", "avx512"). Returns 0, or 1 if there is none.
int dqt_gemm_select(const char* isa) {
  kernels = find(isa);
  return kernels ? 0 : 1;
}

int dqt_has_gemm() { return kernels ? 1 : 0; }

void dqt_gemm(const DqtGemm* args) {
  const std::int64_t blocks = dqt::ceil_div(args->m, dqt::kBlock), panels = dqt::ceil_div(args->n, dqt::kBlock);
  dqt::parallel_for(blocks, 4, [&](std::int64_t begin, std::int64_t end, int) { kernels->prepare_a(args, begin, end); });
  dqt::parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end, int) {
    kernels->pack_b(args, begin, end);
    kernels->multiply(args, begin, end);
  });
}
}
