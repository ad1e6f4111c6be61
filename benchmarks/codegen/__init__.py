"""The code that a GPU would run, generated, compiled and counted on a machine without one.

TorchInductor lowers a module on fake tensors of a *described* device and Triton compiles its kernels to that device's
machine code. Nothing is launched, so times and numerics stay unknown; what is known exactly is what would be launched:
kernels, library calls, the attention kernel, bytes moved, operations, registers, spills, shared memory.

    from benchmarks.codegen import report
    from benchmarks.codegen.cases import CASES

    print(report(CASES["5b/ours/cudnn"], "h100").triton_launches)
"""

from benchmarks.codegen.cases import CASES, Case
from benchmarks.codegen.report import CodegenError, Report
from benchmarks.codegen.run import report, reports, unavailable
from cogx_fast.measure.devices import DEVICES, Device

__all__ = ["CASES", "DEVICES", "Case", "CodegenError", "Device", "Report", "report", "reports", "unavailable"]
