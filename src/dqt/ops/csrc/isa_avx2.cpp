#define DQT_ISA dqt_avx2
#include "kernels.inc"

extern "C" const DqtKernels* dqt_kernels_avx2() { return &dqt_avx2::kTable; }
