#define DQT_ISA dqt_portable
#include "kernels.inc"

extern "C" const DqtKernels* dqt_kernels_portable() { return &dqt_portable::kTable; }
