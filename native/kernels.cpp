// Compiled once for every instruction set, with its flags and its name in DUALFORM_ISA.
#include "kernels.h"

#include "arma.h"
#include "causal_conv1d.h"
#include "diagonal_ssm.h"
#include "kalman.h"
#include "kalman_reverse.h"
#include "kalman_smoother.h"
#include "linear_scan.h"
#include "markov.h"
#include "norm.h"
#include "selective_scan.h"
#include "ssd.h"
#include "update.h"

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define STRING(a) #a
#define QUOTED(a) STRING(a)

namespace isa = DUALFORM_ISA;

const Kernels NAME(kernels_, DUALFORM_ISA) = {
    QUOTED(DUALFORM_ISA),
    isa::WIDTH,
    &NAME(steps_, DUALFORM_ISA),
    {isa::selective::forward<float>, isa::selective::forward<double>},
    {isa::selective::backward<float>, isa::selective::backward<double>},
    {isa::ssd::forward<float>, isa::ssd::forward<double>},
    {isa::ssd::backward<float>, isa::ssd::backward<double>},
    {isa::diagonal::forward<float>, isa::diagonal::forward<double>},
    {isa::diagonal::backward<float>, isa::diagonal::backward<double>},
    {{isa::linear::forward<float, false>, isa::linear::forward<float, true>},
     {isa::linear::forward<double, false>, isa::linear::forward<double, true>}},
    {{isa::linear::backward<float, false>, isa::linear::backward<float, true>},
     {isa::linear::backward<double, false>, isa::linear::backward<double, true>}},
    {isa::conv::forward<float>, isa::conv::forward<double>},
    {isa::conv::backward<float>, isa::conv::backward<double>},
    {isa::update::selective<float>, isa::update::selective<double>},
    {isa::update::conv<float>, isa::update::conv<double>},
    {isa::norm::forward<float>, isa::norm::forward<double>},
    {isa::norm::backward<float>, isa::norm::backward<double>},
    {isa::kalman::forward<float>, isa::kalman::forward<double>},
    {isa::kalman::backward<float>, isa::kalman::backward<double>},
    isa::kalman::smooth,
    {isa::markov::filter<float>, isa::markov::filter<double>},
    {isa::markov::smooth<float>, isa::markov::smooth<double>},
    {isa::markov::path<float>, isa::markov::path<double>},
    {isa::arma::forward<float>, isa::arma::forward<double>},
    {isa::add_groups<float>, isa::add_groups<double>},
};
