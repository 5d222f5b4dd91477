// The interface of the library: plain C, so that one build serves every Python and every PyTorch.
//
// Every function takes one structure, whose fields all have 64 bits; the fields that it does not read may be zero.
// Tensors are pointers, with strides in elements where they are views. Indices are computed in 64 bits. Where a size
// such as the number of rows, steps or channels is 0, a function does nothing and leaves its outputs as they are.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DUALFORM_VERSION 23  // of this interface

// What a function returns. It refuses sizes, groups, dtypes, borders and null pointers that do not fit together;
// whether the memory behind a pointer is as large as the sizes say, it cannot know. FULL: a cache has no slot for one
// more token, and nothing was done.
enum { DONE = 0, NO_MEMORY = 1, REFUSED = 2, FULL = 3 };

typedef struct {
  uint16_t bits;
} bfloat16;

typedef struct {
  uint16_t bits;
} float16;  // IEEE 754

enum { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3, INT8 = 4 };  // the last one of matrices alone

// A tensor (rows, T, ...) whose axes after time lie like one axis. That one is contiguous, or, where a function says
// so, time is.
typedef struct {
  void* data;
  int64_t row, time, inner;  // strides; inner is 1, or time is
  int64_t dtype;
} View;

// Where sequences begin and end. Without borders each row is one sequence. With borders there is one row, on which
// `count` sequences lie end to end: number i takes the steps [borders[i], borders[i + 1]). A state has one row for each
// sequence.
typedef struct {
  int64_t rows, length;
  int64_t count;
  const int64_t* borders;  // (count + 1), or null
} Sequences;

#define SELECTIVE_SCAN_TILE 32  // steps between the states that the backward of selective_scan starts from

// h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t h_t + D u_t) silu(z_t), where dt = softplus(delta + bias).
// States, A, D, bias and their gradients are float, or double. Time may be contiguous in every view. B, or C, may be
// constant: one row of numbers for each channel, contiguous and, like its gradient, of the dtype of the states.
typedef struct {
  int64_t threads;
  int64_t dtype;  // of the state
  Sequences sequences;
  int64_t width, states, groups_b, groups_c;
  int64_t constant_b, constant_c;  // whether they are; with one group
  int64_t softplus;                // whether there is one
  View u, delta;                   // (rows, T, D)
  View b, c;                       // (rows, T, G, N), or constant (D, N)
  View z;                          // (rows, T, D), or null
  const void* a;                   // (D, N)
  const void* d;                   // (D), or null
  const void* bias;                // (D), or null
  const void* h0;                  // (sequences, D, N)
  View y;                          // (rows, T, D)
  void* final;                     // (sequences, D, N); rows of empty sequences are not written
  void* saved;  // (rows, ceil(T / SELECTIVE_SCAN_TILE), N, D), the states entering each tile; or null
  // Backward only.
  View dy;                // (rows, T, D)
  const void* dfinal;     // (sequences, D, N)
  View du, ddelta;        // (rows, T, D)
  View db, dc;            // as b and c
  View dz;                // (rows, T, D), if there is a z
  void *da, *dd, *dbias;  // (D, N), (D) and (D)
  void* dh0;              // (sequences, D, N); rows of empty sequences are not written
} SelectiveScan;

#define SSD_TILE 64   // steps of a matrix product
#define SSD_SPAN 256  // steps between the states that the backward of ssd starts from

// h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t for H heads of width P.
typedef struct {
  int64_t threads;
  int64_t dtype;  // of the state, A and its gradient
  Sequences sequences;
  int64_t heads, width, states, groups;
  View x;              // (rows, T, H, P)
  View dt;             // (rows, T, H)
  View b, c;           // (rows, T, G, N)
  const void* a;       // (H)
  const void* h0;      // (sequences, H, P, N)
  const int32_t* ids;  // (rows, T), the sequence of each step where rows hold several; or null
  View y;              // (rows, T, H, P)
  void* final;         // (sequences, H, P, N); rows of empty sequences are not written
  void* saved;         // (rows, ceil(T / SSD_SPAN), H, N, P), the states entering each span; or null
  // Backward only.
  View dy;             // (rows, T, H, P)
  const void* dfinal;  // (sequences, H, P, N)
  View dx, ddt;        // (rows, T, H, P) and (rows, T, H)
  View db, dc;         // (rows, T, G, N)
  void* da;            // (H)
  void* dh0;           // (sequences, H, P, N); rows of empty sequences are not written
} Ssd;

// h_t = A h_{t-1} + u_t, y_t = 2 Re sum_n C_n h_n; A, C and states are complex, as pairs of numbers.
typedef struct {
  int64_t threads;
  int64_t dtype;  // of the parts of the state
  Sequences sequences;
  int64_t width, states;
  View u;          // (rows, T, D)
  const void* a;   // (D, N, 2)
  const void* c;   // (D, N, 2)
  const void* h0;  // (sequences, D, N, 2)
  View y;          // (rows, T, D)
  void* final;     // (sequences, D, N, 2); rows of empty sequences are not written
  // Backward only.
  View dy;             // (rows, T, D)
  const void* dfinal;  // (sequences, D, N, 2)
  View du;             // (rows, T, D)
  void *da, *dc;       // (D, N, 2)
  void* dh0;           // (sequences, D, N, 2); rows of empty sequences are not written
} DiagonalSSM;

// h_t = a_t h_{t-1} + b_t elementwise, or with `reverse` a_t h_{t+1} + b_t. Complex tensors are given as twice as many
// numbers.
typedef struct {
  int64_t threads;
  int64_t dtype;  // of the parts of the state
  int64_t complex, reverse;
  Sequences sequences;
  int64_t width;
  View a, b;       // (rows, T, D)
  const void* h0;  // (sequences, D)
  View h;          // (rows, T, D); the backward reads it
  void* final;     // (sequences, D); rows of empty sequences are not written
  // Backward only.
  View dh;             // (rows, T, D)
  const void* dfinal;  // (sequences, D)
  View da, db;         // (rows, T, D)
  void* dh0;           // (sequences, D); rows of empty sequences are not written
} LinearScan;

// y_t = bias + sum_j weight_j x_{t - (W-1) + j}, with SiLU or without; a state holds the W - 1 inputs before the first,
// oldest first. Time may be contiguous in every view.
typedef struct {
  int64_t threads;
  int64_t dtype;  // of the state, the weights and their gradients
  Sequences sequences;
  int64_t width, taps;
  int64_t silu;
  View x;              // (rows, T, D)
  const void* weight;  // (D, W)
  const void* bias;    // (D), or null
  const void* h0;      // (sequences, D, W - 1)
  const int32_t* ids;  // (rows, T), the sequence of each step where rows hold several, negative for padding; or null
  View y;              // (rows, T, D)
  void* final;         // (sequences, D, W - 1); rows of empty sequences are not written
  // Backward only.
  View dy;                // (rows, T, D)
  const void* dfinal;     // (sequences, D, W - 1)
  View dx;                // (rows, T, D)
  void *dweight, *dbias;  // (D, W) and (D)
  void* dh0;              // (sequences, D, W - 1); rows of empty sequences are not written
} CausalConv1d;

// One step of SelectiveScan: h' = exp(dt A) h + dt x B, y = (C h' + D x) silu(z) with dt = softplus(dt + dt_bias).
// Views are (rows, 1, ...). Row i of x has row `reads[i]` of h, which has `h_rows`, and row `writes[i]` of next, which
// has `next_rows`; where a pointer is null, row i. A negative index is padding: y is zero there, and so is row i of
// next where `writes` is null. Indices that are not below the number of rows are refused. h and next may be the same.
typedef struct {
  int64_t threads;
  int64_t dtype;  // that is computed in: of A, D and dt_bias
  int64_t rows, width, states, groups_b, groups_c;
  int64_t per;       // how many neighbouring channels share a step size
  int64_t matrix;    // whether A is (D, N); otherwise it is (D / per), one rate for each step size
  int64_t softplus;  // whether there is one
  int64_t gated;     // whether there is a z
  View h;            // (h_rows, 1, D, N)
  View x;            // (rows, 1, D)
  View dt;           // (rows, 1, D / per)
  const void* a;
  View b, c;            // (rows, 1, G, N)
  const void* d;        // (D), or null
  View z;               // (rows, 1, D)
  const void* dt_bias;  // (D / per), or null
  View y;               // (rows, 1, D)
  View next;            // (next_rows, 1, D, N)
  int64_t h_rows, next_rows;
  const int64_t* reads;   // (rows), or null
  const int64_t* writes;  // (rows), or null
} SelectiveUpdate;

// A tensor (rows, D, S) with any strides.
typedef struct {
  void* data;
  int64_t row, channel, slot;  // strides
  int64_t dtype;
} Inputs;

// T steps of CausalConv1d, with SiLU or without, from a state of the last S inputs, S at least W - 1: oldest first, or
// with `seen` in a ring, where the input after `seen[i]` others goes to slot `seen[i]` mod S. `renewed` slots of next
// are written, those of the newest inputs: all S of them, or, where next is h itself, as many as there are new inputs.
// Rows are found as those of SelectiveUpdate.
typedef struct {
  int64_t threads;
  int64_t dtype;  // that is computed in: of the weights
  int64_t rows, length, width, taps, size, renewed;
  int64_t silu;
  View x;              // (rows, T, D)
  Inputs h;            // (h_rows, D, S)
  const void* weight;  // (D, W)
  const void* bias;    // (D), or null
  View y;              // (rows, T, D)
  Inputs next;         // (next_rows, D, S)
  int64_t h_rows, next_rows;
  const int64_t* reads;   // (rows), or null
  const int64_t* writes;  // (rows), or null
  const int64_t* seen;    // (rows), or null
} ConvUpdate;

// y = norm(v) weight + bias over each of G slices of a row, where norm(v) = c / sqrt(mean(c^2) + eps) with c = v, or
// with `center` c = v - mean(v); v = x, x + residual or x silu(z), or the gate is behind: y = (norm(x) weight + bias)
// silu(z). Views are (rows, 1, D).
typedef struct {
  int64_t threads;
  int64_t dtype;  // of what is computed, the weight, the bias and their gradients
  int64_t rows, width, groups;
  int64_t center, norm_before_gate;
  double eps;
  View x;
  View residual;       // or null
  View z;              // or null; not beside a residual
  const void* weight;  // (D)
  const void* bias;    // (D), or null
  View y;
  View r;  // v, where there is a residual; or null
  // Backward only.
  View dy;
  View dr;                // or null
  View dx;                // with a residual the gradient of that, too
  View dresidual;         // the same in another dtype, or null
  View dz;                // if there is a z
  void *dweight, *dbias;  // (D)
} Norm;

#define INT8_CHUNK 32  // a group of weights of 8 bits is a multiple of it, or a whole row

// y = W x + b for a few rows of x: W is read once. Numbers of 16 bits are computed with in float, and so are those of
// 8: number k of output i stands for itself times scales[i][k / group].
typedef struct {
  int64_t threads;
  int64_t dtype;  // that is computed in: of the bias
  int64_t rows, inputs, outputs;
  View x;              // (rows, 1, inputs)
  View weight;         // (outputs, 1, inputs), of the dtype that is computed in, or of 8 or 16 bits beside float
  const void* bias;    // (outputs), or null
  View y;              // (rows, 1, outputs)
  const void* scales;  // (outputs, ceil(inputs / group)), float, where the weight is INT8
  int64_t group;       // inputs that share a scale
} Linear;

// The Kalman filter of M observations of N states, each step a transition and then the observation:
// h' = A h + c + q, q ~ N(0, Q); y = C h' + r, r ~ N(0, R). Rows and columns lie like one contiguous axis; a view that
// is constant in time has the stride 0 there. Everything but `seen` has the dtype of the state. The four moments are
// given together, or all null. The smoother takes double alone; in its place of the filter's moments it leaves the
// means and covariances given all observations, and in that of the predicted covariances those of each state with the
// one before it.
typedef struct {
  int64_t threads;
  int64_t dtype;  // of the state
  int64_t rows, length, states, observed;
  View a;                                  // (rows, T, N, N)
  View shift;                              // (rows, T, N)
  View q;                                  // (rows, T, N, N), symmetric
  View c;                                  // (rows, T, M, N)
  View r;                                  // (rows, T, M, M), symmetric
  View y;                                  // (rows, T, M), read where seen
  const uint8_t* seen;                     // (rows, T, M), 0 where an observation is missing
  const void *mean, *cov;                  // (rows, N) and (rows, N, N), of the state before the first step
  void* loglik;                            // (rows, T); NaN where an observation has no variance
  void *means, *covs;                      // (rows, T, N) and (rows, T, N, N), after each observation; or null
  void *predicted_means, *predicted_covs;  // the same before it; or null
  void *last_mean, *last_cov;              // (rows, N) and (rows, N, N)
  // Smoother only, which finds in the four moments what the filter left there.
  void *first_mean, *first_cov;  // as last_mean and last_cov, of the state before the first step
  // Backward only.
  const void* dloglik;                                   // (rows, T)
  const void *dmeans, *dcovs;                            // as those moments, or all four null
  const void *dpredicted_means, *dpredicted_covs;        // the same
  const void *dlast_mean, *dlast_cov;                    // (rows, N) and (rows, N, N)
  void *da, *dshift, *dq, *dc, *dr, *dy, *dmean, *dcov;  // contiguous, of every step; or null where not wanted
} KalmanFilter;

// A Markov chain of K states that is seen through log-likelihoods b of its states: p_t = v_t e_t / c_t with
// e_t = exp(b_t - top_t), and v_{t+1} = p_t A_t, where top_t is the largest of b_t, or 0 if that is not finite, and c_t
// the sum of v_t e_t. Rows and columns of A lie like one contiguous axis; a view that is constant in time has the
// stride 0 there. Everything but the path has the dtype of b.
typedef struct {
  int64_t threads;
  int64_t dtype;
  int64_t rows, length, states;
  View a;             // (rows, T - 1, K, K), from each step to the next
  View b;             // (rows, T, K)
  const void* start;  // (rows, K), v_1; the smoother does not read it
  void* p;            // (rows, T, K); the smoother reads it
  // Filter only.
  void *sum, *top;  // (rows, T)
  // Smoother only: r_t = A_t after_{t+1}, 1 at the end, weight_t is the sum of p_t r_t, and after_t that of e_t r_t
  // divided by its sum.
  void* after;   // (rows, T, K), or null
  void* probs;   // (rows, T, K): p_t r_t / weight_t
  void* weight;  // (rows, T)
  // Most likely path only, where A and start are logarithms.
  const int64_t* lengths;  // (rows), steps that there are; or null
  int64_t* path;           // (rows, T), -1 where there is no step
  void* score;             // (rows), of its logarithm; 0 without steps
} MarkovChain;

// The log-likelihood of stationary series with normal shocks e_t of the given variance, y_t = phi_1 y_{t-1} + .. +
// phi_p y_{t-p} + e_t + theta_1 e_{t-1} + .. + theta_q e_{t-q}, and its gradient. With a direction, what is left in
// place of the gradient is its derivative along that. All tensors are contiguous and of one dtype.
typedef struct {
  int64_t threads;
  int64_t dtype;
  int64_t rows, length, p, q;
  const void *ar, *ma, *variance, *y;                  // (rows, p), (rows, q), (rows) and (rows, T)
  const void *ar_way, *ma_way, *variance_way, *y_way;  // a direction: the same, or all null
  void* loglik;                                        // (rows), NaN where phi is not stationary; or null
  void *dar, *dma, *dvariance, *dy;                    // as what they are of, or all null; dy may be by itself
} Arma;

// One step of a block: x + out(mixer(norm(x))) with a Mamba as the mixer, of M features, D channels, N states, rank R
// and W taps. All tensors are contiguous. The next states may be where the states are.
typedef struct {
  int64_t threads;
  int64_t dtype;     // that is computed in: of all but the matrices
  int64_t matrices;  // the dtype of the matrices: the same, or of 8 or 16 bits beside float
  int64_t rows, features, width, states, rank, taps;
  int64_t group;  // where matrices are INT8: neighbours in a row that share a scale, as in Linear
  double eps;
  const void *x, *conv, *h;                                         // (rows, M), (rows, D, W - 1), (rows, D, N)
  const void* norm;                                                 // (M)
  const void *in_weight, *in_bias;                                  // (2 D, M), (2 D) or null
  const void *conv_weight, *conv_bias;                              // (D, W), (D) or null
  const void *maps, *steps;                                         // (R + 2 N, D) and (D, R), matrices
  const void *dt_bias, *a, *d;                                      // (D), (D, N), (D)
  const void *out_weight, *out_bias;                                // (M, D), (M) or null
  const void *in_scales, *maps_scales, *steps_scales, *out_scales;  // of the matrices, where those are INT8
  void *y, *next_conv, *next_h;
} MambaStep;

// The same with a Mamba-2, of H heads of width P and G groups, whose convolution has D = H P + 2 G N channels.
typedef struct {
  int64_t threads;
  int64_t dtype;     // that is computed in: of all but the matrices
  int64_t matrices;  // the dtype of the matrices: the same, or of 8 or 16 bits beside float
  int64_t rows, features, heads, width, states, groups, taps;
  int64_t group;  // where matrices are INT8: neighbours in a row that share a scale, as in Linear
  int64_t norm_before_gate;
  double eps, gate_eps, low, high;      // the last two: bounds of the step
  const void *x, *conv, *h;             // (rows, M), (rows, D, W - 1), (rows, H, P, N)
  const void* norm;                     // (M)
  const void *in_weight, *in_bias;      // (H P + D + H, M), (H P + D + H) or null
  const void *conv_weight, *conv_bias;  // (D, W), (D) or null
  const void *dt_bias, *a, *d;          // (H) each
  const void* gate;                     // (H P), the weight of the norm at the gate; or null, where there is no norm
  const void *out_weight, *out_bias;    // (M, H P), (M) or null
  const void *in_scales, *out_scales;   // of the matrices, where those are INT8
  void *y, *next_conv, *next_h;
} Mamba2Step;

// The same with a diagonal, time-invariant system as the mixer: h' = a h + b u and s = Re(c h') + D u of u = norm(x),
// where each of the M features has N states of its own, or with `shared` all of them read and write the same N. With
// g = gelu(s), out(g) = p sigmoid(q), where p and q are the halves of W g + bias, or with `gate` g and W g + bias.
// Complex numbers are pairs of the real and the imaginary part.
typedef struct {
  int64_t threads;
  int64_t dtype;     // that is computed in: of all but the matrix
  int64_t matrices;  // the dtype of the matrix W: the same, or of 16 bits beside float
  int64_t rows, features, states;
  int64_t shared, gate;
  double eps;
  const void *x, *h;                  // (rows, M) and (rows, M, N, 2), or shared (rows, N, 2)
  const void* norm;                   // (M)
  const void *a, *b;                  // (M, N, 2) both, or shared (N, 2) and (N, 2, M)
  const void *c, *d;                  // (M, N, 2), conjugated, and (M)
  const void *out_weight, *out_bias;  // (2 M, M), (2 M) or null; with a gate (M, M), (M) or null
  void *y, *next_h;
} LtiStep;

// The same with attention as the mixer, of H query heads of width P and G heads of keys (P) and values (V). Position p
// of a row lies in slot p of its cache, or in slot p mod S of a ring. The first 2 R features of a query or key are
// turned in pairs: i and R + i, or interleaved 2 i and 2 i + 1. The caches are written where they are.
typedef struct {
  int64_t threads;
  int64_t dtype;     // that is computed in: of all but the matrices and the caches
  int64_t matrices;  // the dtype of the matrices: the same, or of 8 or 16 bits beside float
  int64_t caches;    // the dtype of keys and values: the same, or of 16 bits beside float
  int64_t rows, features, heads, groups, width, values, slots, turned;
  int64_t group;  // where matrices are INT8: neighbours in a row that share a scale, as in Linear
  int64_t ring, interleaved;
  double eps, scale, softcap, magnitude;  // factor of the scores; their bound, or 0; factor of turned features
  const void* x;                          // (rows, M)
  const int64_t* length;                  // (rows), tokens that a row has seen; below S without a ring
  const void* norm;                       // (M)
  const void *in_weight, *in_bias;        // ((H + G) P + G V, M) and as many, or null
  const double* frequencies;              // (R), the angle by which a pair turns in a step
  const void *out_weight, *out_bias;      // (M, H V), (M) or null
  const void *in_scales, *out_scales;     // of the matrices, where those are INT8
  void *y, *k, *v;                        // the last two: (rows, S, G, P) and (rows, S, G, V)
  int64_t* next_length;
} AttentionStep;

enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4 };

// The same with a feed-forward of D hidden features in the place of the mixer: x + down(f(gate(u)) up(u)), or without a
// gate x + down(f(up(u))), where u = norm(x). Of a gated matrix the first D rows are those of the gate.
typedef struct {
  int64_t threads;
  int64_t dtype;     // that is computed in: of all but the matrices
  int64_t matrices;  // the dtype of the matrices: the same, or of 8 or 16 bits beside float
  int64_t rows, features, hidden;
  int64_t group;  // where matrices are INT8: neighbours in a row that share a scale, as in Linear
  int64_t gated, activation;
  double eps, factor;  // the second: of what the activation reads
  const void* x;
  const void* norm;                   // (M)
  const void *in_weight, *in_bias;    // (2 D, M) and (2 D), or without a gate (D, M) and (D); a bias may be null
  const void *out_weight, *out_bias;  // (M, D), (M) or null
  const void *in_scales, *out_scales;
  void* y;
} MlpStep;

// What follows the last block: y = W norm(x) + bias, times a factor, then bounded to `cap` tanh(y / cap).
typedef struct {
  int64_t threads;
  int64_t dtype;     // that is computed in: of all but the matrix
  int64_t matrices;  // the dtype of the matrix: the same, or of 8 or 16 bits beside float
  int64_t rows, features, outputs;
  int64_t group;            // where the matrix is INT8: neighbours in a row that share a scale, as in Linear
  double eps, factor, cap;  // the last one: 0 for no bound
  const void* x;
  const void* norm;                   // (M)
  const void *out_weight, *out_bias;  // (V, M), (V) or null
  const void* out_scales;
  View y;  // (rows, V)
} HeadStep;

enum { MAMBA_STEP = 0, MAMBA2_STEP = 1, LTI_STEP = 2, ATTENTION_STEP = 3, MLP_STEP = 4, HEAD_STEP = 5 };

// A token of each row, from logits and the options of the row: temperature, k, p, the least share, and the penalties of
// tokens that were seen; 0 for no k, infinity for no p. The number drawn is in [0, 1).
typedef struct {
  int64_t threads;
  int64_t rows, tokens, remembered;
  View logits;                    // (rows, V)
  const double *options, *draws;  // (rows, 6) and (rows)
  const int64_t* history;         // (rows, remembered); negative ones are none
  int64_t *token, *finite;        // (rows): the token, and whether the logits were finite
} Draw;

// Steps of blocks, one after the other.
typedef struct {
  int64_t threads;
  int64_t count;
  const int64_t* kinds;  // (count): MAMBA_STEP and the others
  const int64_t* steps;  // (count): the addresses of the structures
} Steps;

#ifdef __cplusplus
}
#endif
