#define DQT_ISA dqt_avx512
#include "kernels.inc"

extern "C" const DqtKernels* dqt_kernels_avx512() { return &dqt_avx512::kTable; }
