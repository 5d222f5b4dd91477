// The kernels of one instruction set: those of sequences and updates, and those of products with a few rows, which are
// compiled apart.
#pragma once

#include "common.h"

struct StepKernels {
  int64_t (*read_rows[2])(const Linear&, void* memory);
  void (*linear[2])(const Linear&, const void* x, int64_t first, int64_t end);
  // Units [first, end) of one phase, some of them by the thread of a seat; the phases of a step follow each other.
  int64_t (*mamba_step[2])(const MambaStep&, int64_t phase, int64_t first, int64_t end, int64_t seat, void* memory);
  int64_t (*mamba2_step[2])(const Mamba2Step&, int64_t phase, int64_t first, int64_t end, int64_t seat, void* memory);
  int64_t (*lti_step[2])(const LtiStep&, int64_t phase, int64_t first, int64_t end, int64_t seat, void* memory);
  int64_t (*attention_step[2])(const AttentionStep&, int64_t phase, int64_t first, int64_t end, void* memory);
  int64_t (*mlp_step[2])(const MlpStep&, int64_t phase, int64_t first, int64_t end, void* memory);
  int64_t (*head_step[2])(const HeadStep&, int64_t phase, int64_t first, int64_t end, void* memory);
};

struct Kernels {
  const char* name;
  int64_t width;  // bytes of a vector
  const StepKernels* steps;
  // Each for float and for double states. Without scratch memory they only return how many bytes of it they need.
  int64_t (*selective_scan[2])(const SelectiveScan&, const Task&);
  int64_t (*selective_scan_backward[2])(const SelectiveScan&, const Task&, const Parts&);
  int64_t (*ssd[2])(const Ssd&, const Heads&);
  int64_t (*ssd_backward[2])(const Ssd&, const Heads&, const Parts&);
  int64_t (*diagonal_ssm[2])(const DiagonalSSM&, const Task&);
  int64_t (*diagonal_ssm_backward[2])(const DiagonalSSM&, const Task&, const Parts&);
  int64_t (*linear_scan[2][2])(const LinearScan&, const Task&);  // each for real and for complex
  int64_t (*linear_scan_backward[2][2])(const LinearScan&, const Task&);
  int64_t (*causal_conv1d[2])(const CausalConv1d&, const Task&);
  int64_t (*causal_conv1d_backward[2])(const CausalConv1d&, const Task&, const Parts&);
  int64_t (*selective_update[2])(const SelectiveUpdate&, int64_t row, int64_t first, int64_t end, void* memory);
  int64_t (*conv_update[2])(const ConvUpdate&, int64_t row, int64_t first, int64_t end, void* memory);
  int64_t (*norm[2])(const Norm&, int64_t first, int64_t end, void* memory);
  int64_t (*norm_backward[2])(const Norm&, int64_t first, int64_t end, void* dweight, void* dbias, void* memory);
  int64_t (*kalman_filter[2])(const KalmanFilter&, int64_t first, int64_t end, void* memory);
  int64_t (*kalman_filter_backward[2])(const KalmanFilter&, int64_t first, int64_t end, void* memory);
  int64_t (*kalman_smoother)(const KalmanFilter&, int64_t first, int64_t end, void* memory);
  int64_t (*markov_filter[2])(const MarkovChain&, int64_t first, int64_t end, void* memory);
  int64_t (*markov_smoother[2])(const MarkovChain&, int64_t first, int64_t end, void* memory);
  int64_t (*markov_path[2])(const MarkovChain&, int64_t first, int64_t end, void* memory);
  int64_t (*arma[2])(const Arma&, int64_t first, int64_t end, void* memory);
  void (*add_groups[2])(const Groups&, int64_t row);
};

extern const Kernels kernels_baseline;
extern const StepKernels steps_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
extern const StepKernels steps_avx2, steps_avx512;
#endif
