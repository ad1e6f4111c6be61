"""Faults planted in the generated code, as a bug of the compiler's would be: each must be found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.numerics.cases import CASES
from benchmarks.numerics.kernels import ChangedInput, Edit, NotInTheCode, Settings
from benchmarks.numerics.measure import Prepared, judge, prepare, run
from benchmarks.numerics.report import Figures, wrong
from cogx_fast.measure.devices import Device


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One change of a case's code."""

    name: str
    case: str
    edit: Edit
    size: int = 0
    """Which of the case's sizes shows it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the run said of a fault."""

    fault: str
    case: str
    words: str
    """Why the code is wrong; empty: the fault was missed."""
    stale: str = ""
    """Why it could not be planted: its pattern is not in the code that is generated now."""


def plant(faults: Sequence[Fault], device: Device) -> list[Finding]:
    """Run each fault's case with the fault in it; a case is lowered once for all of its faults."""
    findings = []
    for case in dict.fromkeys(fault.case for fault in faults):
        wanted = [fault for fault in faults if fault.case == case]
        for number, prepared in enumerate(prepare(CASES[case], device)):
            here = [fault for fault in wanted if fault.size == number]
            if here:
                sound = judge(prepared, run(prepared, Settings()))
                findings += [_find(fault, prepared, sound) for fault in here]
    return findings


def _find(fault: Fault, prepared: Prepared, sound: Figures) -> Finding:
    from benchmarks.numerics.interpreter import MemoryFault

    try:
        found = judge(prepared, run(prepared, Settings(edit=fault.edit)))
    except NotInTheCode as error:
        return Finding(fault=fault.name, case=fault.case, words="", stale=str(error))
    except (MemoryFault, ChangedInput) as error:
        return Finding(fault=fault.name, case=fault.case, words=str(error))
    return Finding(fault=fault.name, case=fault.case, words="; ".join(wrong(fault.case, found, sound)))


def _fault(name: str, case: str, pattern: str, replacement: str, size: int = 0) -> Fault:
    re.compile(pattern)
    return Fault(name=name, case=case, edit=Edit(pattern=pattern, replacement=replacement), size=size)


_BLOCK, _FP32 = "5b/block/bf16", "5b/block/fp32"
_SWAPPED = r"\(-1\)\*\(\(r0_2 % 2\)\) \+ 2\*\(r0_2 // 2\)"
"""The index of a channel's neighbour, less one."""

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        _fault("rotary sign", _BLOCK, r"(tmp\d+ = tmp47) \+ (tmp\d+)", r"\1 - \2"),
        _fault("bias of the other channel", _BLOCK, rf"in_ptr2 \+ \(1 \+ {_SWAPPED}\)", "in_ptr2 + (r0_2)"),
        _fault("queries unturned", _BLOCK, rf"in_ptr0 \+ \(1 \+ {_SWAPPED}", "in_ptr0 + (r0_2"),
        _fault("GELU left out", _BLOCK, r"use_gelu=True", "use_gelu=False"),
        _fault("text for video", _BLOCK, r"tl\.where\((tmp\d+), (tmp\d+), (tmp\d+)\)\n", r"tl.where(\1, \3, \2)\n"),
        _fault("gate for scale", _BLOCK, r"in_ptr2 \+ \(512 ", "in_ptr2 + (640 "),
        _fault("last row left out", _BLOCK, r"xmask = xindex < xnumel", "xmask = xindex < xnumel - 1"),
        _fault("a row too many", _BLOCK, r"xmask = xindex < xnumel", "xmask = xindex <= xnumel"),
        _fault("rows that overlap", _BLOCK, r"xoffset = tl\.program_id\(0\) \* XBLOCK",
               "xoffset = tl.program_id(0) * (XBLOCK // 2)"),
        _fault("result not stored", _BLOCK, r"tl\.store\(out_ptr2 \+ \(r0_1 [^\n]*", "pass"),
        _fault("input written", _BLOCK, r"(tl\.store\()out_ptr2( \+ \(r0_2)", r"\1in_ptr0\2"),
        _fault("norm's eps 2e-5", _FP32, r"1e-05", "2e-05"),
        _fault("queries' eps", _FP32, r"1e-06", "1e-05"),
        _fault("batch stride", "symbolic/block/bf16", r"// ks0", "// (ks0 + 1)"),
        _fault("a key too many", "odd/flex/bf16", r"offs_n < KV_LEN", "offs_n < KV_LEN + 1"),
        _fault("a key too many, fp32", "odd/flex/fp32", r"offs_n < KV_LEN", "offs_n < KV_LEN + 1"),
        _fault("no boundary", "odd/flex/fp32", r"CHECK_BLOCK_BOUNDARY=True", "CHECK_BLOCK_BOUNDARY=False"),
        _fault("mask of another video", "5b/masked/bf16", r"(tl\.load\(in_ptr\d+ \+ )tmp2\)", r"\g<1>0 * tmp2)"),
        _fault("a block too few", "5b/sparse/bf16", r"kv_num_blocks \* SPARSE_KV_MULTIPLE",
               "(kv_num_blocks - 1) * SPARSE_KV_MULTIPLE"),
        _fault("mask of another head", "5b/sparse/bf16", r"sparse_idx_hq = off_hq % SPARSE_HQ", "sparse_idx_hq = 0"),
        _fault("int8 rounds down", "5b/int8-dynamic/bf16", r"libdevice\.nearbyint\(", "libdevice.floor("),
        _fault("int8 scale", "5b/int8-dynamic/bf16", r"0\.00784313725490196", "0.0078"),
        _fault("int8 clamp", "5b/int8-dynamic/fp32", r"127\.0, tl\.float32", "120.0, tl.float32"),
        _fault("fp8 scale", "5b/fp8-dynamic/bf16", r"0\.002232142857142857", "0.002"),
        _fault("fp8 clamp", "5b/fp8-dynamic/bf16", r"([^-])448\.0", r"\g<1>240.0"),
        _fault("fp8 tensor's clamp", "5b/fp8-dynamic-tensor/bf16", r"([^-])448\.0", r"\g<1>240.0"),
        _fault("weight's scale left out", "5b/int8-weight-only/fp32", r"(tmp6 = tmp4) \* tmp5\n", r"\1\n"),
    )
}  # fmt: skip
"""By name."""

__all__ = ["FAULTS", "Fault", "Finding", "plant"]
