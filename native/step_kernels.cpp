// Compiled once for every instruction set, as kernels.cpp is.
#include "kernels.h"

#include "attention_step.h"
#include "block.h"
#include "dense.h"
#include "lti_step.h"
#include "mlp_step.h"

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)

namespace isa = DUALFORM_ISA;

const StepKernels NAME(steps_, DUALFORM_ISA) = {
    {isa::dense::read_rows<float>, isa::dense::read_rows<double>},
    {isa::dense::forward<float>, isa::dense::forward<double>},
    {isa::block::mamba<float>, isa::block::mamba<double>},
    {isa::block::mamba2<float>, isa::block::mamba2<double>},
    {isa::block::lti<float>, isa::block::lti<double>},
    {isa::block::attention<float>, isa::block::attention<double>},
    {isa::block::mlp<float>, isa::block::mlp<double>},
    {isa::block::head<float>, isa::block::head<double>},
};
