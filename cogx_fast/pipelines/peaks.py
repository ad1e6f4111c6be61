"""Peak memory of a step and of decoding: the real code runs at full size on the meta device, and what lives is counted.

That takes seconds and no memory. What torch's allocator adds on a GPU (rounding to 512 bytes, gaps) and what libraries
take for workspaces is not in it; tests on the stand-in for a GPU hold both to each other (tests/cuda_standin).
Attention stands for a kernel that keeps no scores, as those for GPUs are.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogx_fast.config import TransformerConfig
from cogx_fast.sizes import Tokens

_LAYERS = 2
"""What a step holds does not grow with the layers."""
_LATENT_FRAMES = 7
"""What decoding holds does not grow with the frames, but for the video itself: they are decoded by twos."""


def step_peak(
    config: TransformerConfig,
    tokens: Tokens,
    *,
    batch: int,
    dtype: torch.dtype,
    build: Callable[[TransformerConfig], Any] | None = None,
) -> int:
    """Bytes that an eager step holds at its peak, beside weights, inputs and tables. Compiled it is less.

    Where this process has compiled anything, torch's hook on frames keeps what a caller hands over, and an eager step,
    counted or real, holds one stream more.

    Args:
        config: the transformer's.
        tokens: of one video.
        batch: videos in the call; guidance makes two of one.
        dtype: of everything.
        build: makes the model of a configuration, called under the meta device; None: ours.
    """
    fields = dataclasses.asdict(dataclasses.replace(config, num_layers=_LAYERS))
    return _step_peak(tuple(fields.items()), tokens, batch, dtype, build)


@functools.lru_cache(maxsize=64)
def _step_peak(key: tuple[Any, ...], tokens: Tokens, batch: int, dtype: torch.dtype, build: Any) -> int:
    from cogx_fast.runtime.module import CogVideoXModel

    config = TransformerConfig(**dict(key))
    with torch.device("meta"):
        model = _in(dtype, (build or (lambda config: CogVideoXModel(config, attention="sdpa")))(config))
        frames, height, width = tokens.grid
        patch, patch_t = config.patch_size, config.patch_size_t or 1
        latents = (batch, frames * patch_t, config.in_channels, height * patch, width * patch)
        given: dict[str, Any] = {
            "hidden_states": torch.empty(latents, dtype=dtype),
            "encoder_hidden_states": torch.empty(batch, tokens.text, config.text_embed_dim, dtype=dtype),
            "timestep": torch.empty(batch, dtype=torch.long),
        }
        if config.use_rotary_positional_embeddings:
            given["image_rotary_emb"] = (torch.empty(tokens.video, config.attention_head_dim),) * 2
        if config.ofs_embed_dim is not None:
            given["ofs"] = torch.empty(1, dtype=dtype)
        with torch.no_grad(), _WithoutScores():
            model(**given, return_dict=False)  # tables are made
            return peak_bytes(lambda: model(**given, return_dict=False), [*_held_by(model), *_tensors(given)])


def decode_peak(config: Mapping[str, Any], height: int, width: int, *, dtype: torch.dtype) -> int:
    """Bytes that decoding a video holds at its peak, beside the VAE's weights.

    Args:
        config: of a diffusers ``AutoencoderKLCogVideoX``.
        height, width: in pixels.
        dtype: of everything.
    """
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    known = tuple(sorted((name, value) for name, value in fields.items() if not name.startswith("_")))
    return _decode_peak(known, height, width, dtype)


@functools.lru_cache(maxsize=64)
def _decode_peak(key: tuple[Any, ...], height: int, width: int, dtype: torch.dtype) -> int:
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        vae = _in(dtype, AutoencoderKLCogVideoX(**dict(key)))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (1, vae.config.latent_channels, _LATENT_FRAMES, height // factor, width // factor)
        latents = torch.empty(shape, dtype=dtype)
        with torch.no_grad():
            return peak_bytes(lambda: vae.decode(latents, return_dict=False), [*_held_by(vae), latents])


def peak_bytes(run: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes that live at the peak of ``run``, without those of tensors that are there before.

    Args:
        run: computes on any device, best meta.
        held: weights, inputs and tables, of which views may be made.
    """
    counted = _Counted(held)
    with counted:
        run()
    return counted.peak


class _Counted(TorchDispatchMode):
    """Counts the bytes of the storages that live."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class _WithoutScores(TorchFunctionMode):
    """Attention that allocates what a fused kernel does: its output, and a number for each row of scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query_BNSK = args[0]
            logarithms_BNS = query_BNSK.new_empty(query_BNSK.shape[:3], dtype=torch.float32)
            out_BNSK = torch.empty_like(query_BNSK)
            del logarithms_BNS
            return out_BNSK
        return function(*args, **(kwargs or {}))


def _in(dtype: torch.dtype, model: torch.nn.Module) -> Any:
    return torch.nn.Module.to(model, dtype).eval()  # diffusers' own warns of what does not matter here


def _held_by(model: Any) -> list[Tensor]:
    tables = getattr(getattr(model, "inputs", None), "tables", {})
    return [*model.parameters(), *model.buffers(), *_tensors(list(tables.values()))]


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


__all__ = ["decode_peak", "peak_bytes", "step_peak"]
