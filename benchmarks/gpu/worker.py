"""What a case's process does."""

from __future__ import annotations

import dataclasses
import time
import traceback
from typing import Any

import torch

from benchmarks.gpu import ceilings, models, steps
from benchmarks.gpu.cases import OURS, Case

LIMIT_EXACT = 1.1
"""Ours may be this much further from fp32 than diffusers in the same dtype."""
LIMIT_QUANTIZED = 0.1
"""Relative error that a recipe or an inexact kernel may make: 20 dB."""
UNSUPPORTED = (NotImplementedError, models.UnsupportedError)


def work(case: Case, device: str) -> dict[str, Any]:
    """Run the case in this process.

    Returns:
        ``status`` and what was found, as plain data.
    """
    place = torch.device(device)
    try:
        if case.kind == "ceiling":
            return {"status": "done", **ceilings.measure(case.attention, place, quick=case.quick)}
        if case.kind == "attention":
            return {"status": "done", **ceilings.attention(case, place)}
        return step(case, place)
    except UNSUPPORTED as error:
        return {"status": "unsupported", "error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001 - whatever a case does, the battery goes on and says so
        traceback.print_exc()
        return {"status": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}


def step(case: Case, device: torch.device) -> dict[str, Any]:
    """First whether it is right, at real shapes; only then how fast it is."""
    if case.plant == "failing":
        raise RuntimeError("planted")
    while case.plant == "hanging":
        time.sleep(1)
    found = correctness(case, device)
    if found["red"]:
        return {"status": "red", "error": found["red"], **found}
    models.forget(device)
    by_layers = []
    for layers in case.layers:
        by_layers.append(steps.time_layers(case, layers, device))
        models.forget(device)
    return {"status": "done", **found, **steps.summary(case, by_layers)}


def correctness(case: Case, device: torch.device) -> dict[str, Any]:
    """The error of one layer's model against diffusers' in fp32, beside diffusers' own in the same dtype.

    With a sparse plan at one of its dense timesteps, which use the same graph: what is sparse is no approximation of
    random weights' attention. That the sparse mask is the right one, ``tests/runtime/test_plan.py`` holds.
    """
    one = dataclasses.replace(case.config, num_layers=1)
    with models.exact_fp32():
        upstream = models.perturbed(models.upstream(one, torch.float32, device))
        arguments = models.arguments(case, torch.float32, device, dense=True)
        reference = models.run(upstream, arguments)
    arguments = models.arguments(case, models.DTYPE, device, dense=True)
    upstream = upstream.to(models.DTYPE)
    peer_error = models.relative_error(models.run(upstream, arguments), reference)
    model = models.prepare(case, upstream)
    begin = time.perf_counter()
    noise = models.run(model, arguments)
    models.synchronize(device)
    cold = time.perf_counter() - begin
    error = models.relative_error(noise * 1.2 if case.plant == "wrong" else noise, reference)
    limit = LIMIT_QUANTIZED if case.quant or not models.is_exact(case) else LIMIT_EXACT * peer_error
    red = ""
    if not error < float("inf"):
        red = "its result is not finite"
    elif case.owner == OURS and error > limit:
        red = f"its error against fp32 is {error:.2e}, the limit {limit:.2e}"
    return {"error_fp32": error, "error_diffusers": peer_error, "first_call_cold": cold, "red": red}
