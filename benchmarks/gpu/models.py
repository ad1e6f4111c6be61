"""Ours and the peers, built and prepared as their users would, and attention alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.gpu.cases import BATCH, CACHES, FLEX_OPTIONS, SPARSE, STEPS, Case
from cogx_fast import load
from cogx_fast.attention.backends import BACKENDS
from cogx_fast.attention.masks import full_block_mask
from cogx_fast.attention.plan import LAST_TIMESTEP
from cogx_fast.measure import contest
from cogx_fast.runtime.compiling.compile import CompileConfig

DTYPE = torch.bfloat16
Step = Callable[[], Tensor]


class UnsupportedError(RuntimeError):
    """This machine or its packages cannot run the case; the message says what is missing."""


def upstream(case: Case, device: torch.device, dtype: torch.dtype = DTYPE) -> Any:
    """diffusers' transformer with random weights, the same every time."""
    return contest.random_upstream(contest.Work(config=case.config, tokens=case.tokens, dtype=dtype, device=device))


def perturbed(case: Case, device: torch.device) -> Any:
    """The same in fp32, ``perturb``ed."""
    return perturb(upstream(case, device, torch.float32))


def perturb(model: Any) -> Any:
    """A model with norms, biases and gates away from their trivial start, so that the block shows."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def step(model: Any, case: Case, device: torch.device, dtype: torch.dtype = DTYPE, *, dense: bool = False) -> Step:
    """A call of the model with random arguments, the same every time; ``dense``: where sparse plans are dense."""
    arguments = contest.call_arguments(case.config, case.tokens, BATCH, dtype, device)
    if dense:
        arguments["timestep"] = torch.full_like(arguments["timestep"], int(LAST_TIMESTEP) - 1)
    return lambda: contest.run(model, arguments)


def loop(model: Any, case: Case, device: torch.device) -> Step:
    """A generation's calls, one after another."""
    arguments = contest.call_arguments(case.config, case.tokens, BATCH, DTYPE, device)
    timesteps = torch.linspace(LAST_TIMESTEP, 1, STEPS).round().long().to(device)  # a call's is a view of them
    return lambda: [contest.run(model, arguments | {"timestep": each.expand(BATCH)}) for each in timesteps][-1]


def compiled_peer(case: Case, device: torch.device, *, quick: bool) -> Any:
    """diffusers' model as everything is compared with it."""
    options: dict[str, Any] = {"backend": "aot_eager"} if quick else {"mode": "max-autotune"}
    return torch.compile(upstream(case, device), fullgraph=True, **options)


def prepare(case: Case, model: Any, *, quick: bool) -> Any:
    """diffusers' model as the case's owner runs it: replaced by ours, quantized, compiled in its first call.

    Raises:
        UnsupportedError: something that it needs is not here.
    """
    if case.owner == "diffusers":
        if case.recipe == "eager":
            return model
        _quantize(model, case.recipe)
        return torch.compile(model, fullgraph=True, **({"backend": "aot_eager"} if quick else {"mode": "max-autotune"}))
    sparse = case.recipe == SPARSE
    backend = "aot_eager" if quick and not sparse else "inductor"  # flex-attention skips blocks by Inductor's kernel
    chosen: dict[str, Any] = {"attention": "flex", "attention_plan": SPARSE} if sparse else {"attention": "sdpa"}
    if case.quant:
        chosen["quant"] = case.quant
    if case.recipe in CACHES:
        chosen["step_cache"] = case.recipe
    try:
        return load(model, compile=CompileConfig(scope=case.scope, backend=backend), **chosen)
    except ValueError as error:
        if case.quant:  # a recipe says what it lacks before it touches a weight
            raise UnsupportedError(str(error)) from error
        raise


def attention(case: Case, device: torch.device, *, quick: bool) -> tuple[Step, Step, float]:
    """An attention kernel alone on the model's heads and tokens, SDPA's on the same, and the first one's error.

    Raises:
        UnsupportedError: the kernel does not run here.
    """
    config, tokens = case.config, case.tokens.joint
    shape = (BATCH, tokens, config.num_attention_heads, config.attention_head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=DTYPE).transpose(1, 2) for _ in range(3))
    family, _, variant = case.recipe.partition(" ")
    backend = BACKENDS[family]
    reason = backend.why_not(device, DTYPE, config.attention_head_dim)
    if reason or (variant and device.type == "cpu"):
        raise UnsupportedError(f"{case.recipe}: {reason or 'the kernel for CPUs has no such options'}")
    if backend.prepare is not None:
        backend.prepare()
    kernel: Any = backend.run
    if variant:

        def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
            return flex_attention(q, k, v, block_mask=mask, kernel_options=FLEX_OPTIONS[variant])

    mask = full_block_mask(device) if backend.masks is BlockMask else None
    if mask is not None:  # eager, it would hold every score in memory
        kernel = torch.compile(kernel, fullgraph=True, backend="aot_eager" if quick else "inductor")
    rows = min(tokens, 256)  # the first queries of one head, against all keys
    with exact_fp32():
        plain = torch.softmax(q[0, 0, :rows].float() @ k[0, 0].float().T / config.attention_head_dim**0.5, -1)
        expected = plain @ v[0, 0].float()
    error = relative_error(kernel(q, k, v, mask)[0, 0, :rows], expected)
    return lambda: kernel(q, k, v, mask), lambda: BACKENDS["sdpa"].run(q, k, v, None), error


def one_layer(case: Case) -> Case:
    """The case's block, in every step whole."""
    return dataclasses.replace(case, part="block", recipe="bf16" if case.recipe in CACHES else case.recipe)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp32; infinite where anything is not finite."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    return float("inf") if bool((~actual.isfinite()).any()) else difference.item()


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """fp32 that is fp32: no tf32 in products and convolutions."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # by allow_tf32 they could not be put back
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


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
