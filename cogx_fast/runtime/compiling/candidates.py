"""Which kernels Inductor times for a quantized product on CUDA, and what joins the product before anything else."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_TILE = 64
"""Rows and columns at least of an fp8 product's tile: smaller ones read the operands more often than they need to."""
_ROWS = 1024
"""Of a product for which that holds: a video's tokens. A vector for each video is a small product."""


def candidates(device: torch.device, options: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """While a graph is compiled: what each quantized product is timed with, where a mode times at all.

    - int8: Triton's kernels alone, which scale the int32 sums before they store them; a library's writes them out, four
      bytes each, for another kernel to scale. Inductor offers Triton's on large GPUs only; here they are tried on small
      ones, too.
    - fp8: besides the library's, Triton's with tiles of a size that can win (all of torch 2.13's were 82 to 106 kernels
      to build for each product; a quarter is left).

    All other products keep the candidates that they have.

    With ``epilogue_fusion_first`` what scales a product joins it before it joins anything else. Torch (2.13) decides on
    that only after it has gone through all pairs, so that what should join the product is often part of something else
    by then: it stays out, or, where torch's compile workers are not up yet, torch fails with a ``KeyError``.

    Args:
        device: where the graph runs.
        options: Inductor's for this graph; a choice of backends in them is the caller's own, and stays.
    """
    is_timed = options.get("max_autotune") or options.get("max_autotune_gemm")
    if device.type != "cuda" or not is_timed or "max_autotune_gemm_backends" in options:
        return nullcontext()
    from torch._inductor.virtualized import V

    return V.set_choices_handler(_handler()())


def drop_garbage(device: torch.device) -> None:
    """Free what compiling and timing left there: inputs of kernels that were tried, held by cycles of objects."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@functools.cache
def _handler() -> Any:
    """The class; what compiles a graph has an instance of its own."""
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.kernel.mm import mm_template
    from torch._inductor.select_algorithm import ExternKernelChoice

    class Candidates(InductorChoices):
        def __init__(self) -> None:
            super().__init__()
            self._decided: set[tuple[Any, Any]] = set()  # products, and what did or did not join them

        def can_fuse(  # type: ignore[override]  # torch's is static; it is called on an instance
            self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int
        ) -> bool:
            if any(scheduler.get_fused_node(node) is not node for node in (node1, node2)):
                return False  # part of something else by now
            if (node1, node2) in scheduler.seen_template_fusions:
                self._decided.add((node1, node2))
            elif config.epilogue_fusion_first and not node1.is_template():
                waiting = [pair[1] for pair in scheduler.seen_template_fusions if pair not in self._decided]
                if any(node in waiting or _goes_on(node, waiting) for node in (node1, node2)):
                    return False
            return super().can_fuse(scheduler, node1, node2, shared_data_score)

        def get_template_configs(
            self, kernel_inputs: Any, templates: Any, op_name: str, kwarg_overrides: Any = None
        ) -> list[Any]:
            if op_name == "int_mm" and mm_template not in templates and _has_int8_tensor_cores(kernel_inputs):
                templates = [*templates, mm_template]
            return super().get_template_configs(kernel_inputs, templates, op_name, kwarg_overrides)

        def _finalize_template_configs(
            self, template_choices: Any, kernel_inputs: Any, templates: Any, op_name: str, kwarg_overrides: Any = None
        ) -> list[Any]:
            choices = super()._finalize_template_configs(
                template_choices, kernel_inputs, templates, op_name, kwarg_overrides
            )
            generated = [choice for choice in choices if not isinstance(choice.template, ExternKernelChoice)]
            if op_name == "int_mm":
                return generated or choices
            if op_name == "scaled_mm" and kernel_inputs.mnk_hinted()[0] >= _ROWS:
                large = [choice for choice in generated if _least_side(choice) >= _TILE]
                others = [choice for choice in choices if choice not in generated]
                return others + (large or generated)
            return choices

    return Candidates


def _goes_on(node: Any, waiting: list[Any]) -> bool:
    """Whether it goes on, value by value, with what one of these makes, so that it may join the product after that."""
    read = {dependency.name for dependency in node.unmet_dependencies}
    return not node.is_reduction() and any(read & set(each.get_buffer_names()) for each in waiting)


def _least_side(choice: Any) -> int:
    parameters = choice.params.to_kwargs()
    return min(int(parameters["BLOCK_M"]), int(parameters["BLOCK_N"]))


def _has_int8_tensor_cores(inputs: Any) -> bool:
    """Whether Triton makes int8 products of tensor cores' instructions there: from Ampere on."""
    rows, columns, _ = inputs.mnk_symbolic()
    is_empty = rows == 0 or columns == 0
    return not is_empty and torch.cuda.get_device_capability(inputs.nodes()[0].get_device())[0] >= 8


__all__ = ["candidates", "drop_garbage"]
