"""What a compiled model was called with, and what is said where a call makes it compile again."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from cogx_fast.attention.attend import Mask
from cogx_fast.attention.backends import lacks_bf16
from cogx_fast.attention.masks import SparseBlocks
from cogx_fast.runtime.compiling.flags import Flags
from cogx_fast.runtime.compiling.recompiles import (
    Call,
    RecompileError,
    RecompileWarning,
    explain_recompile,
    show_progress,
)
from cogx_fast.runtime.compiling.torch_cache import CacheDirectory
from cogx_fast.runtime.runner import Inputs

_RECOMPILE_LIMIT = 256
"""Graphs kept for one kind of block: every size of a long session with ``dynamic=False`` (torch's own limit is 8)."""


@functools.cache
def _flags() -> Flags:
    import torch._dynamo.config as dynamo

    return Flags(dynamo, {"error_on_recompile": True, "recompile_limit": _RECOMPILE_LIMIT})


class Calls:
    """The calls of one compiled model.

    Args:
        what: what is compiled, in words: "the block", "the model".
        dynamic: whether sizes are symbolic.
        strict: a recompile is an error.
        inductor: whether Inductor compiles.
        directory: where torch keeps what it compiles.
    """

    def __init__(self, what: str, *, dynamic: bool, strict: bool, inductor: bool, directory: CacheDirectory) -> None:
        self.what, self.directory = what, directory
        self._dynamic, self._strict, self._inductor = dynamic, strict, inductor
        self._running = threading.local()
        self._earlier: list[Call] = []

    def __bool__(self) -> bool:
        """Whether there were any."""
        return bool(self._earlier)

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """What holds during a call, and only then: torch's flags, the progress line, the cache directory."""
        self._running.call, self._running.is_told = call, False
        is_new = call not in self._earlier
        if is_new:
            self._check_dtype(call)
        with ExitStack() as stack:
            stack.enter_context(self.directory.used())
            stack.enter_context(_flags().held())
            stack.enter_context(show_progress(self.what))
            stack.callback(setattr, self._running, "is_told", False)
            yield
        if is_new:
            self._earlier.append(call)

    def _check_dtype(self, call: Call) -> None:
        """Inductor leaves bf16 alone there, which fails as a graph break in words of Dynamo's."""
        device, dtype = call.settings["device"], call.settings["the weights' dtype"]
        if self._inductor and dtype == torch.bfloat16 and lacks_bf16(device):
            raise ValueError(
                f"the model is in bfloat16 on {torch.cuda.get_device_name(device)}, for which torch compiles none "
                "(compute capability 8.0 is needed): load it with dtype='fp16', or without compile"
            )

    def explain(self, guards: str) -> str:
        """Why this call compiles again, in the caller's words; ``guards`` is torch's account."""
        call: Call | None = getattr(self._running, "call", None)
        if call is None:
            return f"{self.what} compiles again outside of a call of the model: {guards}"
        return explain_recompile(call, self._earlier, guards, what=self.what, dynamic=self._dynamic)

    def tell(self, message: str) -> None:
        """Warn of a recompile, once in a call: what makes one part compile again can make the others, too.

        Raises:
            RecompileError: it is forbidden (``CompileConfig(strict=True)``).
        """
        if self._strict:
            raise RecompileError(f"{message}. This is an error because of CompileConfig(strict=True)")
        if getattr(self._running, "is_told", False):
            return
        self._running.is_told = True
        warnings.warn(message, RecompileWarning, stacklevel=2)


def describe_call(model: Any, inputs: Inputs) -> Call:
    """A call as its caller sees it."""
    latents_BFCHW, text_BTE, mask = inputs.latents_BFCHW, inputs.text_BTE, inputs.mask
    weight = next(model.parameters())
    sizes: dict[str, Any] = {
        "hidden_states' size": tuple(latents_BFCHW.shape),
        "encoder_hidden_states' size": tuple(text_BTE.shape),
    }
    grad = "inference" if torch.is_inference_mode_enabled() else "on" if torch.is_grad_enabled() else "off"
    settings: dict[str, Any] = {
        "hidden_states' dtype": latents_BFCHW.dtype,
        "encoder_hidden_states' dtype": text_BTE.dtype,
        "device": latents_BFCHW.device,
        "attention_mask": _kind_of_mask(mask),
        "grad mode": grad,
        "a gradient of hidden_states": latents_BFCHW.requires_grad,
        "a gradient of encoder_hidden_states": text_BTE.requires_grad,
        "autocast": torch.is_autocast_enabled(latents_BFCHW.device.type),
        "training mode": model.training,
        "attention backend": ", ".join(model.attention_backends),
        "the weights' dtype": weight.dtype,
        "a gradient of the weights": weight.requires_grad,
    }
    return Call(sizes=sizes, settings=settings)


def _kind_of_mask(mask: Mask | SparseBlocks) -> str:
    if mask is None:
        return "None"
    if not isinstance(mask, Tensor):
        return type(mask).__name__
    return f"{mask.dtype} of " + " × ".join(
        name if size > 1 else "1" for name, size in zip("BNSS", mask.shape, strict=True)
    )


__all__ = ["Calls", "describe_call"]
