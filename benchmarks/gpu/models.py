"""Ours and the peers, built and prepared as their users would."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import DIFFUSERS, OURS, Case
from cogx_fast import bench, load
from cogx_fast.config import TransformerConfig
from cogx_fast.model.backends import BACKENDS
from cogx_fast.runtime.compile import CompileConfig
from cogx_fast.runtime.plan import LAST_TIMESTEP

DTYPE = torch.bfloat16
BATCH = 2
run = bench.run


class UnsupportedError(RuntimeError):
    """This machine or its packages cannot run the case; the message says what is missing."""


def upstream(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' transformer with random weights, the same every time."""
    tokens = Case(name="", kind="step", limit=0, model="tiny").tokens  # of no effect: building needs no sizes
    return bench.random_upstream(bench.Work(config=config, tokens=tokens, dtype=dtype, device=device))


def perturbed(model: nn.Module) -> Any:
    """The same with norms, biases and gates away from their trivial start, so that the block shows in the result."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def arguments(case: Case, dtype: torch.dtype, device: torch.device, *, dense: bool = False) -> dict[str, Any]:
    """Random arguments of one call, the same every time; ``dense``: at a timestep where sparse plans are dense."""
    found = bench.call_arguments(case.config, case.tokens, BATCH, dtype, device)
    if dense and case.attention_plan:
        found["timestep"] = torch.full_like(found["timestep"], int(LAST_TIMESTEP) - 1)
    return found


def prepare(case: Case, model: Any) -> Any:
    """diffusers' model as the case's owner runs it: replaced by ours, quantized, compiled. Compiling happens in the
    first call.

    Raises:
        UnsupportedError: something that it needs is not here.
    """
    if case.owner == OURS:
        reason = BACKENDS[case.attention].why_not(model.device, model.dtype, case.config.attention_head_dim)
        if reason:
            raise UnsupportedError(f"{case.attention}: {reason}")
        quant: dict[str, Any] = {"quant": case.quant} if case.quant else {}
        compile_config: Any = False
        if case.scope != "eager":
            compile_config = CompileConfig(scope=case.scope, backend="aot_eager" if case.quick else "inductor")
        try:
            plan = case.attention_plan or None
            return load(model, attention=case.attention, attention_plan=plan, compile=compile_config, **quant)
        except ValueError as error:
            if case.quant:  # a recipe says what it lacks before it touches a weight
                raise UnsupportedError(str(error)) from error
            raise
    if case.owner == "sage":
        _use_sage()
    elif case.owner != DIFFUSERS:
        raise ValueError(f"owner is {case.owner!r}, expected {OURS}, {DIFFUSERS} or sage")
    if case.quant:
        _quantize(model, case.quant)
    if case.scope == "eager":
        return model
    if case.quick:
        return torch.compile(model, fullgraph=True, backend="aot_eager")
    return torch.compile(model, fullgraph=True, mode="max-autotune")


def is_exact(case: Case) -> bool:
    """Whether its attention is softmax attention up to rounding."""
    return BACKENDS[case.attention].exact if case.owner == OURS else case.owner == DIFFUSERS


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp32; infinite where anything is not finite."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    return difference.item() if bool(actual.isfinite().all()) else float("inf")


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """fp32 that is fp32: no tf32 in products and convolutions."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Give memory back, and let the next call compile again, with this process's cache on disk."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _quantize(model: nn.Module, scheme: str) -> None:
    """torchao's own recipe on the linears of the blocks, as its documentation and diffusers' do it."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    def in_blocks(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "transformer_blocks" in name and (".attn1." in name or ".ff." in name)

    configs = {
        "fp8-row": lambda: Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        ),
        "int8-dynamic": lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    }  # fmt: skip
    try:
        quantize_(model, configs[scheme](), filter_fn=in_blocks)
    except AssertionError as error:  # torchao's way to say that a device is too old
        raise UnsupportedError(f"torchao: {error or scheme}") from error


def _use_sage() -> None:
    """SageAttention in the place of SDPA, for this process."""
    from sageattention import sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        if attn_mask is not None:
            raise UnsupportedError("SageAttention takes no mask")
        out: Tensor = sageattn(q, k, v, is_causal=options.get("is_causal", False))
        return out

    torch.nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
