"""The code that a GPU would run, run on a CPU: do its numbers hold?

``benchmarks.codegen`` has TorchInductor lower a module for a described device. Here the very wrapper and Triton kernels
that it generates are executed on a machine without a GPU, by Triton's interpreter (corrected, and made strict about
memory), and held against eager execution in fp32.

    python -m benchmarks.codegen --numerics [--only 5b/] [--check | --accept | --faults]

A file a subject: ``interpreter`` corrects Triton's, ``library`` has the formulas of library calls, ``kernels`` runs a
graph's code, ``lowering`` finds what it is to run on, ``cases`` says what is run, ``plain`` is the sharp reference,
``measure`` does one case, ``faults`` plants bugs, ``report`` holds the results, ``support`` tells what a GPU can run.

It finds wrong formulas, indices, masks, strides, scales and shapes, accesses outside of a buffer, memory read before it
is written, and programs of a launch that race. It cannot find what is not in the source: miscompiles of Triton and
ptxas, cuBLAS's and cuDNN's own code, races within a program, the tensor cores' order of summation.
"""
