"""What the battery found, for people and programs: a short table, JSON, CSV, the ceilings, and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.gpu.cases import DIFFUSERS, OURS, Case
from cogx_fast import roofline
from cogx_fast.terminal import table
from cogx_fast.timing import Interval

Found = Mapping[str, Any]
COLUMNS = (
    "case", "status", "model", "owner", "attention", "attention_plan", "quant", "scope", "extrapolated", "ms_p20",
    "ms_p50", "ms_p80",
    "ratio_to_compiled_peer", "ratio_to_eager_peer", "tflops", "share_of_bf16_ceiling", "peak_gib", "compile_cold_s",
    "compile_warm_s", "error_fp32", "error_diffusers", "seconds", "error",
)  # fmt: skip


def rows(results: Found, chosen: Sequence[Case]) -> list[dict[str, Any]]:
    """A row a step case, with ratios to the peers of its model and its share of the measured bf16 ceiling."""
    found = {result["case"]: result for result in results["cases"]}
    ceiling = ceilings(results).get("bf16")
    return [_row(case, found[case.name], found, ceiling) for case in chosen if case.kind == "step" and
            case.name in found]  # fmt: skip


def ceilings(results: Found) -> dict[str, float]:
    """Measured ceilings as ``cogx-fast roofline --ceilings`` reads them: TFLOP/s and GB/s."""
    return {result["ceiling"]: result["value"] for result in results["cases"] if "ceiling" in result}


def table_of(results: Found, chosen: Sequence[Case]) -> str:
    """What was not run, attention kernels, ceilings and, last, the short table of steps."""
    here = results["environment"]
    steps = [_words(row) for row in rows(results, chosen) if row["ms_p50"] is not None]
    kernels = [
        (found["case"], f"{found['tflops']:.1f}", f"{found['milliseconds']:.3f}", f"{found['error_fp32']:.1e}")
        for found in results["cases"]
        if "milliseconds" in found
    ]
    measured = ", ".join(
        f"{name} {value:.1f} {'GB/s' if name == 'bandwidth' else 'TFLOP/s'}"
        for name, value in ceilings(results).items()
    )
    header = (
        "step", "ms", "p20–p80", "× compiled", "× eager", "TFLOP/s", "% ceiling", "GiB", "cold s", "warm s", "error"
    )  # fmt: skip
    state = (" (changed)" if here["dirty"] else "") + _toy(chosen)
    sections = [
        "\n".join(_not_timed(results)),
        table(("attention alone", "TFLOP/s", "ms", "error"), kernels) if kernels else "",
        f"ceilings measured here: {measured or 'none'}",
        table(header, steps) if steps else "no step was timed",
        f"{here['device']}, torch {here['torch']}, diffusers {here['diffusers']}, torchao {here['torchao']}, commit "
        f"{str(here['commit'])[:9]}{state}\n"
        "TFLOP/s of a dense step: sparse plans do fewer.\n"
        "× : ratios of medians of processes that ran one after another. ~ : extrapolated from few layers.\n"
        "cold: first call of one layer's model; warm: of the first model timed, with the cache on disk.\n"
        "error: relative, of one layer's model, against fp32. % ceiling: of the bf16 products measured here.",
    ]
    return "\n\n".join(section for section in sections if section)


def write(results: Found, chosen: Sequence[Case], out: Path) -> list[str]:
    """Write ``results.json``, ``results.csv``, ``ceilings.json`` and the plots.

    Returns:
        What was done, a sentence each.
    """
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "ceilings.json").write_text(json.dumps(ceilings(results)) + "\n")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(results, chosen))
    return [f"results: {out}", *_plots(results, chosen, out)]


def _toy(chosen: Sequence[Case]) -> str:
    return " — TOY SIZES, THE TIMES MEAN NOTHING" if any(case.quick for case in chosen) else ""


def _row(case: Case, result: Found, found: Mapping[str, Found], ceiling: float | None) -> dict[str, Any]:
    seconds = result.get("seconds_step")
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"case": case.name, "status": result["status"], "model": case.model, "owner": case.owner}
    row |= {
        "attention": case.attention,
        "attention_plan": case.attention_plan,
        "quant": case.quant,
        "scope": case.scope,
        "seconds": result["seconds"],
    }
    row |= {key: result.get(key) for key in ("error_fp32", "error_diffusers", "error")}
    row["compile_cold_s"] = result.get("first_call_cold")
    if seconds is not None:
        row |= {f"ms_{name}": 1e3 * seconds[name] for name in ("p20", "p50", "p80")}
        row |= {key: result[key] for key in ("tflops", "peak_gib", "extrapolated")}
        row["compile_warm_s"] = result["first_call_warm"]
        row["share_of_bf16_ceiling"] = result["tflops"] / ceiling if ceiling else None
        for name, scope in (("compiled", "model"), ("eager", "eager")):
            peer = found.get(f"{case.model}/{DIFFUSERS}/{scope}", {}).get("seconds_step")
            row[f"ratio_to_{name}_peer"] = seconds["p50"] / peer["p50"] if peer else None
    return row


def _words(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "–" if row[name] is None else format(row[name], form)

    return (
        row["case"] + (" ~" if row["extrapolated"] else ""),
        number("ms_p50", ".1f"),
        f"{number('ms_p20', '.1f')}–{number('ms_p80', '.1f')}",
        number("ratio_to_compiled_peer", ".3f"),
        number("ratio_to_eager_peer", ".3f"),
        number("tflops", ".1f"),
        number("share_of_bf16_ceiling", ".0%"),
        number("peak_gib", ".1f"),
        number("compile_cold_s", ".1f"),
        number("compile_warm_s", ".1f"),
        number("error_fp32", ".1e"),
    )


def _not_timed(results: Found) -> list[str]:
    lines = [
        f"{result['status'].upper()}: {result['case']}: {result.get('error', '')}"
        for result in results["cases"]
        if result["status"] in ("failed", "timeout", "red")
    ]
    for status, words in (("unsupported", "UNSUPPORTED here"), ("no time", "NO TIME LEFT for")):
        names = [result["case"] for result in results["cases"] if result["status"] == status]
        if names:
            lines.append(f"{words}: {', '.join(names)}")
    return lines


def _plots(results: Found, chosen: Sequence[Case], out: Path) -> list[str]:
    timed = [row for row in rows(results, chosen) if row["ms_p50"] is not None]
    bars = [(row["case"], _interval(row), "ours" if row["owner"] == OURS else "peer") for row in timed
            if row["ratio_to_compiled_peer"]]  # fmt: skip
    device = results["environment"]["device"] + _toy(chosen)
    lines = []
    if bars:
        label = "time of a step, diffusers with torch.compile = 1 (20 % and 80 % of the steps)"
        lines.append(drawing.ratios(out / "ratios.png", bars, title=device, label=label))
    kernels = {row["case"]: next(r for r in results["cases"] if r["case"] == row["case"])["kernels"] for row in timed}
    if kernels:
        try:
            _draw_kernels(kernels, device, out / "kernels.png")
            _draw_roofline(timed, {case.name: case for case in chosen}, ceilings(results), device, out / "roofline.png")
            lines.append(f"plots: {out / 'kernels.png'}, {out / 'roofline.png'}")
        except ModuleNotFoundError:
            lines.append("no plots: matplotlib is not installed (pip install 'cogx-fast[plot]')")
    return lines


def _interval(row: Mapping[str, Any]) -> Interval:
    ratio, middle = row["ratio_to_compiled_peer"], row["ms_p50"]
    low, high = (ratio * row[name] / middle for name in ("ms_p20", "ms_p80"))
    return Interval(median=ratio, low=min(low, ratio), high=max(high, ratio))


def _draw_kernels(kernels: Mapping[str, Mapping[str, float]], device: str, path: Path) -> None:
    made, axes = drawing.figure(1, height=1.4 + 0.32 * len(kernels), title=f"{device}: a step's time by kind of kernel")
    axis, left = axes[0, 0], dict.fromkeys(kernels, 0.0)
    for kind in sorted({kind for each in kernels.values() for kind in each}):
        widths = [1e3 * each.get(kind, 0.0) for each in kernels.values()]
        axis.barh(list(kernels), widths, left=list(left.values()), label=kind)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    axis.invert_yaxis()
    axis.set_xlabel("ms, from torch's profiler", fontsize=8)
    axis.legend(fontsize=8)
    made.savefig(path, dpi=150)


def _draw_roofline(
    timed: Sequence[Mapping[str, Any]],
    cases: Mapping[str, Case],
    measured: Mapping[str, float],
    device: str,
    path: Path,
) -> None:
    made, axes = drawing.figure(1, height=4.2, title=f"{device}: achieved against the ceilings measured on it")
    axis = axes[0, 0]
    intensities = [1.0, 1e5]
    for products in ("bf16", "fp8", "int8"):
        if products in measured and "bandwidth" in measured:
            at_most = [min(measured[products], each * measured["bandwidth"] / 1e3) for each in intensities]
            knee = 1e3 * measured[products] / measured["bandwidth"]
            axis.plot([intensities[0], knee, intensities[1]], [at_most[0], measured[products], measured[products]],
                      linewidth=1, label=f"{products} products")  # fmt: skip
    for row in timed:
        case = cases[row["case"]]
        scheme = case.quant if case.quant in roofline.SCHEMES else roofline.UNQUANTIZED
        parts = roofline.parts(case.config, case.tokens, batch=2, scheme=scheme)
        intensity = sum(part.flops for part in parts) / sum(part.bytes for part in parts)
        colour = drawing.COLOURS["ours" if case.owner == OURS else "peer"]
        axis.plot(intensity, row["tflops"], "o", color=colour, markersize=5)
        axis.annotate(case.name, (intensity, row["tflops"]), xytext=(6, -3), textcoords="offset points", fontsize=6)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte, at the least bytes", ylabel="TFLOP/s")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    made.savefig(path, dpi=150)
