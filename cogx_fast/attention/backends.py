"""Ways to compute attention: every backend by its exact name, what it needs and what it can do.

Suffixes: B batch, S joint tokens, N heads, K head width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cogx_fast.model.tracing import is_traced

_HALF = (torch.float16, torch.bfloat16)
_FLEX_OPTIONS = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}
"""For head widths up to 64, where the template's default needs 255 registers and spills (benchmarks/NOTES.md)."""


_FLEX_OPTIONS_TURING = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_warps": 4, "fwd_num_stages": 1}
"""Turing has 64 KiB of shared memory for a block, and no copies into it that overlap with products."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention, and what it can do."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """(q_BNSK, k_BNSK, v_BNSK, mask) -> out_BNSK"""
    about: str
    """What it is, in a line."""
    exact: bool = True
    """Equal to softmax attention up to rounding."""
    masks: type | None = None
    """The kind of mask it takes besides None."""
    devices: tuple[str, ...] | None = None
    """Device types it runs on; None is all."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """None is every floating-point one."""
    head_dims: tuple[int, ...] | None = None
    """Head widths it takes; None is all."""
    capabilities: tuple[int, ...] | None = None
    """Major compute capabilities of NVIDIA GPUs it runs on; None is all."""
    bf16_anywhere: bool = False
    """It takes bf16 on NVIDIA GPUs before compute capability 8.0, which have no instructions for it."""
    module: str | None = None
    """An optional package's module that it needs."""
    install: str = ""
    """How to get that."""
    prepare: Callable[[], None] | None = None
    """Called once before a model with it runs."""

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run there, and what to do; None if it can."""
        if self.devices is not None and device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, and the model is on {device.type}"
        if self.capabilities is not None and device.type == "cuda":
            major = torch.cuda.get_device_capability(device)[0]
            if major not in self.capabilities:
                wanted = " or ".join(f"{capability}.x" for capability in self.capabilities)
                return f"it needs a GPU of compute capability {wanted}, and this one has {major}.x"
        if dtype == torch.bfloat16 and not self.bf16_anywhere and lacks_bf16(device):
            return "it takes bfloat16 from compute capability 8.0 on: load the model in float16"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' and '.join(map(_short, self.dtypes))}, and the model is in {_short(dtype)}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"it takes heads of width {', '.join(map(str, self.head_dims))}, and the model has {head_dim}"
        if self.module is not None and not _is_installed(self.module):
            return f"it needs the package {self.module}: {self.install}"
        return None


def lacks_bf16(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU without instructions for bf16: Turing and older."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def ready_backend(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend of that name, ready to run there.

    Raises:
        ValueError: there is none, or it cannot run there; the message says what to install or choose.
    """
    backend = get_backend(name)
    reason = backend.why_not(device, dtype, head_dim)
    if reason is not None:
        able = [other for other, chosen in BACKENDS.items() if chosen.why_not(device, dtype, head_dim) is None]
        raise ValueError(f"attention backend {name!r} cannot run here: {reason}. Here run {', '.join(able)}")
    if backend.prepare is not None:
        backend.prepare()
    return backend


# -- torch's own -------------------------------------------------------------------------------------------------------


def _sdpa(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    if q_BNSK.is_cuda and mask is not None and torch.is_grad_enabled():
        # cuDNN's kernel can make NaN of the queries' gradient where there is a mask (pytorch/pytorch#196678)
        return _without_cudnn(q_BNSK, k_BNSK, v_BNSK, mask)
    if q_BNSK.dtype == torch.bfloat16 and not is_traced() and lacks_bf16(q_BNSK.device):
        # else its products would be written out, every score of them: 113 GiB for 5b
        q_BNSK, k_BNSK, v_BNSK = q_BNSK.float(), k_BNSK.float(), v_BNSK.float()
        mask = mask.float() if isinstance(mask, Tensor) and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK, attn_mask=mask).bfloat16()
    if q_BNSK.is_cpu and not is_traced():
        # Its kernel reads a head's keys and values again for every few queries: rows that lie together faster. The
        # output lies as the queries do.
        k_BNSK, v_BNSK = k_BNSK.contiguous(), v_BNSK.contiguous()
    return F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK, attn_mask=mask)


def _pinned(*kernels: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
    """Torch's attention by these kernels alone, in its own order: a process that sets one before torch prefers cuDNN's
    on Hopper, at its first attention, is put back to the order without that preference."""

    def run(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
        with sdpa_kernel(list(kernels)):
            return F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK, attn_mask=mask)

    return run


def _flex(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    options = _FLEX_OPTIONS if q_BNSK.is_cuda and q_BNSK.shape[-1] <= 64 else None
    if q_BNSK.is_cuda and torch.cuda.get_device_capability(q_BNSK.device)[0] < 8:
        options = _FLEX_OPTIONS_TURING
    if v_BNSK.device.type == "cpu":  # torch 2.13's CPU kernel forgets where a view begins (pytorch/pytorch#157612)
        v_BNSK = v_BNSK.contiguous()
    return _flex_attention(q_BNSK, k_BNSK, v_BNSK, mask, options)


def _flex_flash(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    return _flex_attention(q_BNSK, k_BNSK, v_BNSK, mask, {"BACKEND": "FLASH"})


def _flex_attention(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any, options: Any) -> Tensor:
    out = flex_attention(q_BNSK, k_BNSK, v_BNSK, block_mask=mask, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


# -- other packages' ---------------------------------------------------------------------------------------------------


def _activate(implementation: str) -> None:
    """Put FlashAttention 3 or 4 in place of torch's flash kernel, for the whole process: torch has no smaller way.

    Raises:
        ValueError: the other one has that place.
    """
    current = torch.nn.attention.current_flash_attention_impl()
    if current not in (None, implementation):
        raise ValueError(
            f"{implementation} is asked for, but {current} is active in this process, and torch holds one: call "
            "torch.nn.attention.restore_flash_attention_impl() and build the models again, or choose the same"
        )
    if current is None:
        torch.nn.attention.activate_flash_attention_impl(implementation)


@functools.cache
def _register_sage() -> None:
    """SageAttention's function as one operator, so that it is traced as a whole."""
    sageattn = importlib.import_module("sageattention").sageattn

    @torch.library.custom_op("cogx_fast::sage_attention", mutates_args=())
    def sage_attention(q_BSNK: torch.Tensor, k_BSNK: torch.Tensor, v_BSNK: torch.Tensor) -> torch.Tensor:
        return sageattn(q_BSNK, k_BSNK, v_BSNK, tensor_layout="NHD", is_causal=False).contiguous()

    @sage_attention.register_fake
    def _(q_BSNK: torch.Tensor, k_BSNK: torch.Tensor, v_BSNK: torch.Tensor) -> torch.Tensor:
        return q_BSNK.new_empty(q_BSNK.shape)


def _sage(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    q_BSNK, k_BSNK, v_BSNK = (x.transpose(1, 2) for x in (q_BNSK, k_BNSK, v_BNSK))
    return torch.ops.cogx_fast.sage_attention(q_BSNK, k_BSNK, v_BSNK).transpose(1, 2)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_without_cudnn = _pinned(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_FLASH = _pinned(SDPBackend.FLASH_ATTENTION)
_CUDA = ("cuda",)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="sdpa", run=_sdpa, masks=Tensor, bf16_anywhere=True,
            about="torch's scaled_dot_product_attention, by the kernel that torch chooses",
        ),
        Backend(name="flex", run=_flex, masks=BlockMask, about="FlexAttention's generated kernel"),
        Backend(
            name="flex-flash", run=_flex_flash, masks=BlockMask, devices=_CUDA, dtypes=_HALF, capabilities=(9, 10),
            module="flash_attn.cute", install="pip install --pre flash-attn-4",
            about="FlexAttention by FlashAttention 4's kernel",
        ),
        Backend(
            name="sdpa-cudnn", run=_pinned(SDPBackend.CUDNN_ATTENTION), devices=_CUDA, dtypes=_HALF,
            capabilities=(8, 9, 10, 12), about="cuDNN's kernel, or an error",
        ),
        Backend(
            name="sdpa-flash", run=_FLASH, devices=_CUDA, dtypes=_HALF, capabilities=(8, 9, 10, 12),
            about="FlashAttention 2 as it comes with torch, or an error",
        ),
        Backend(
            name="sdpa-efficient", run=_pinned(SDPBackend.EFFICIENT_ATTENTION), masks=Tensor, devices=_CUDA,
            about="memory-efficient attention (xFormers'), or an error",
        ),
        Backend(
            name="sdpa-math", run=_pinned(SDPBackend.MATH), masks=Tensor, bf16_anywhere=True,
            about="products and a softmax with every score in memory: a reference",
        ),
        Backend(
            name="fa3", run=_FLASH, devices=_CUDA, dtypes=_HALF, capabilities=(9,), module="flash_attn_interface",
            install="build hopper/ of https://github.com/Dao-AILab/flash-attention",
            prepare=functools.partial(_activate, "FA3"), about="FlashAttention 3, in torch's flash kernel's place",
        ),
        Backend(
            name="fa4", run=_FLASH, devices=_CUDA, dtypes=_HALF, capabilities=(9, 10), module="flash_attn.cute",
            install="pip install --pre flash-attn-4",
            prepare=functools.partial(_activate, "FA4"), about="FlashAttention 4, in torch's flash kernel's place",
        ),
        Backend(
            name="sage", run=_sage, exact=False, devices=_CUDA, dtypes=_HALF, head_dims=(64, 96, 128),
            capabilities=(8, 9, 12), module="sageattention",
            install="pip install sageattention (or build https://github.com/thu-ml/SageAttention for version 2)",
            prepare=_register_sage, about="SageAttention: products of 8-bit integers; approximate",
        ),
    )
}  # fmt: skip
"""Every backend by its exact name."""

UPSTREAM_NAMES = {
    "native": "sdpa", "_native_cudnn": "sdpa-cudnn", "_native_flash": "sdpa-flash", "flash": "sdpa-flash",
    "_native_efficient": "sdpa-efficient", "_native_math": "sdpa-math", "flex": "flex", "_flash_3": "fa3",
    "sage": "sage",
}  # fmt: skip
"""diffusers' names (``AttentionBackendName``) for the same kernels; ``flash`` is FlashAttention 2."""

__all__ = ["BACKENDS", "UPSTREAM_NAMES", "Backend", "get_backend", "lacks_bf16", "ready_backend"]
