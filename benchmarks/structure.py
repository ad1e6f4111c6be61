"""What the compiler makes of small models of every kind, held against a table: no GPU, the same on every machine.

    python -m benchmarks.structure [--only 5b/] [--check | --accept] [--json FILE]

Each case is compiled as far as the generated code, and not built or run. What is held: graphs, breaks and recompiles
over a set of sizes; kernels by kind, launches, bytes, operations and the most that is held at once at the first size;
bytes of the weights and parameters. Numbers and kernels are those of one call of the model, of what is compiled.
Instructions spent compiling are not held: they are counted by the kernel's perf events, which many
machines lack.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import gate
from cogx_fast.config import HUB_IDS, PRESETS, TransformerConfig
from cogx_fast.measure.explain import Explanation, explain
from cogx_fast.measure.explain.traffic import KINDS
from cogx_fast.runtime.compiling.compile import CompileConfig
from cogx_fast.runtime.module import CogVideoXModel

EXPECTED = Path(__file__).resolve().parent / "expected" / "structure.csv"
LAYERS = 2
SIZES = ((2, 13, 96, 80), (1, 13, 96, 80), (2, 9, 96, 80), (2, 13, 64, 112))
"""(videos, frames, height, width), called in this order; the numbers are those of the first."""
SAME_ON_EVERY_MACHINE = {"cpp.simdlen": 1, "cpp.threads": 1}
"""Neither the processor's vectors nor its cores decide what the code looks like (flex's CPU template needs vectors, but
what is counted of it does not depend on how long they are)."""

Found = Mapping[str, Explanation]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small model and how it is compiled."""

    variant: str
    scope: Any = "block"
    recipe: str = "bf16"
    """A quantization recipe's name, or the dtype without one."""
    attention: str = "sdpa"
    step_cache: str | None = None
    """One by name: each kind of step is compiled, and the numbers are those of a whole one."""
    dynamic: bool | None = None
    """Sizes are symbolic; None: as the package does by itself."""

    @property
    def name(self) -> str:
        """As the table calls it."""
        cached = f"/{self.step_cache}" if self.step_cache else ""
        return f"{self.variant}/{self.scope}/{self.recipe}/{self.attention}{cached}"

    def config(self) -> TransformerConfig:
        """The released model's options at toy size."""
        preset = PRESETS[self.variant]
        return dataclasses.replace(
            preset, num_attention_heads=2, num_layers=LAYERS, text_embed_dim=32, max_text_seq_length=8,
            time_embed_dim=48, ofs_embed_dim=48 if preset.ofs_embed_dim else None,
            sample_height=12, sample_width=10, sample_frames=13,
        )  # fmt: skip

    def sizes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Learned positions are for one size of picture."""
        fixed = PRESETS[self.variant].use_learned_positional_embeddings
        return tuple(size for size in SIZES if not fixed or size[2:] == SIZES[0][2:])

    def model(self) -> CogVideoXModel:
        """The model with random weights."""
        torch.manual_seed(0)
        model = CogVideoXModel(self.config(), attention=self.attention).to(torch.bfloat16).eval()
        if self.recipe != "bf16":
            from quant import plan

            plan(model, self.recipe).apply(model, measure=False)
        model.set_step_cache(self.step_cache)
        return model


def _cases() -> Iterable[Case]:
    for variant in HUB_IDS:
        yield Case(variant=variant)
    yield Case(variant="5b", scope="model")
    yield Case(variant="1.5-5b-i2v", scope="model")
    yield Case(variant="5b", step_cache="balanced")
    yield Case(variant="5b", scope="model", step_cache="balanced")
    yield Case(variant="2b", attention="flex")
    yield Case(variant="5b", attention="flex")
    yield Case(variant="5b", recipe="int8-weight-only")
    yield Case(variant="5b", recipe="fp8-weight-only")
    yield Case(variant="5b", recipe="int8-dynamic")


CASES: dict[str, Case] = {case.name: case for case in _cases()}
"""The gated cases by name: variant/scope/recipe/attention, and a step cache."""


def measure(case: Case, model: CogVideoXModel | None = None, *, sizes: int | None = None) -> Explanation:
    """Compile a case as far as the code.

    Args:
        case: what.
        model: in place of the case's own, e.g. one that something was planted in.
        sizes: how many of the case's sizes to call it with; None: all.
    """
    chosen = {} if case.dynamic is None else {"dynamic": case.dynamic}
    options = SAME_ON_EVERY_MACHINE | ({"cpp.simdlen": None} if case.attention == "flex" else {})
    config = CompileConfig(scope=case.scope, options=options, **chosen)
    # On a processor with int8 products torchao has two formulas, and looks at it to choose: held is our own.
    int8 = mock.patch("cogx_fast.model.products.has_int8_products", new=_never)
    with warnings.catch_warnings(), int8:
        warnings.simplefilter("ignore")  # torchao's and torch's own; a recompile is counted
        return explain(
            model or case.model(), *case.sizes()[:sizes], compile=config, build=False, code_of_first_only=True
        )


def _never() -> bool:
    return False


def metrics(found: Explanation) -> dict[str, int]:
    """What is held of a case; less is better."""
    kinds = found.kinds
    return {
        "graphs": len(found.graphs),
        "breaks": len(found.breaks),
        "recompiles": len(found.recompiles),
        "launches": sum(graph.runs * graph.launches for graph in found.first),
        **{kind: kinds[kind].kernels if kind in kinds else 0 for kind in KINDS},
        "bytes": found.total.bytes,
        "inductor_bytes": sum(graph.runs * graph.inductor_bytes for graph in found.first),
        "flops": found.total.flops,
        "peak_activation_bytes": max((graph.peak_bytes for graph in found.first), default=0),
        "weights_bytes": sum(found.weights.values()),
        "parameters": found.parameters,
    }


def kernels(found: Explanation) -> list[str]:
    """The kernels of the first size, a line each in the order of the code; breaks too."""
    lines = []
    for graph in found.first:
        lines.append(f"{graph.function}, run {graph.runs} times")
        lines += [f"  {kernel}" for kernel in graph.kernels]
    return lines + [f"break: {item.reason} ({item.code})" for item in found.breaks]


def check(found: Found, expected: Path = EXPECTED) -> gate.Verdict:
    """Hold what was found against the table, and say which kernels changed where something did."""
    recorded = gate.read(expected) if expected.is_file() else {}
    verdict = gate.compare(recorded, {name: metrics(item) for name, item in found.items()}, {}, versions())
    if not verdict.passed:
        known = _read_kernels(expected)
        for name, item in found.items():
            changed = difflib.unified_diff(known.get(name, []), kernels(item), lineterm="", n=0)
            verdict.notes += [f"{name} {line}" for line in changed if not line.startswith(("---", "+++", "@@"))]
    return verdict


def accept(found: Found, expected: Path = EXPECTED) -> None:
    """Record what was found; other cases keep theirs, unless they were recorded with other versions."""
    same = expected.is_file() and gate.versions_of(gate.read(expected)) == versions()
    gate.record(expected, versions(), {name: metrics(item) for name, item in found.items()}, {}, order=CASES)
    listed = _read_kernels(expected) if same else {}
    listed |= {name: kernels(item) for name, item in found.items()}
    sections = ["\n".join([f"# {name}", *listed[name]]) for name in CASES if name in listed]
    expected.with_suffix(".txt").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """What the generated code depends on."""
    from importlib.metadata import version

    return {"torch": torch.__version__.partition("+")[0], "torchao": version("torchao").partition("+")[0]}


def _read_kernels(expected: Path) -> dict[str, list[str]]:
    """Each case's kernels, from the file beside the table."""
    path = expected.with_suffix(".txt")
    sections = path.read_text(encoding="utf-8").split("# ")[1:] if path.is_file() else []
    lines = [section.rstrip().splitlines() for section in sections]
    return {name: kernels for name, *kernels in lines}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if anything differs from the recorded table")
    action.add_argument("--accept", action="store_true", help="record what was found")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found there")
    options = parser.parse_args(arguments)
    chosen = {name: case for name, case in CASES.items() if options.only in name}
    if not chosen:
        print(f"no case has {options.only!r} in its name: {', '.join(CASES)}", file=sys.stderr)
        return 2
    found = {name: measure(case) for name, case in chosen.items()}
    if options.json:
        options.json.write_text(json.dumps({name: item.to_dict() for name, item in found.items()}, indent=1) + "\n")
    if options.accept:
        accept(found)
    if options.check:
        verdict = check(found)
        print(verdict)
        return int(not verdict.passed)
    for name, item in found.items():
        print(name, ", ".join(f"{metric} {value:,}" for metric, value in metrics(item).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
