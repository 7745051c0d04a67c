// The exported integer product: asks for AMX and spreads panels over threads.
#include <cstring>

#include "gemm.h"
#include "parallel.h"

namespace {

bool selected = false;

bool has_amx() {
#if defined(DQT_X86) && defined(DQT_AMX)
  __builtin_cpu_init();
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && dqt_amx_permitted();
#else
  return false;
#endif
}

}  // namespace

extern "C" {

// Chooses the product of an instruction set; only "amx" has one. Returns 0, or 1 if there is none.
int dqt_gemm_select(const char* isa) {
  selected = std::strcmp(isa, "amx") == 0 && has_amx();
  return selected ? 0 : 1;
}

int dqt_has_gemm() { return selected ? 1 : 0; }

void dqt_gemm(const DqtGemm* args) {
#if defined(DQT_X86) && defined(DQT_AMX)
  const std::int64_t blocks = dqt::ceil_div(args->m, dqt::kBlock), panels = dqt::ceil_div(args->n, dqt::kBlock);
  if (args->packed_a)
    dqt::parallel_for(blocks, 4, [&](std::int64_t begin, std::int64_t end, int) { dqt_amx_pack_a(args, begin, end); });
  dqt::parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end, int) {
    dqt_amx_pack_b(args, begin, end);
    dqt_amx_multiply(args, begin, end);
  });
#else
  (void)args;
#endif
}
}
