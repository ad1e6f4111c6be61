"""Position tables: pure functions of a grid.

They are computed once per grid and held, so that the compiled graph only reads them. Each equals what diffusers'
pipelines and ``CogVideoXPatchEmbed`` compute (``models/embeddings.py``, ``pipelines/cogvideo``).

Suffixes: S joint tokens, T text tokens, V video tokens, D model width, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogx_fast.config import TransformerConfig

THETA = 10_000.0

Grid = tuple[int, int, int]


def rotary_tables(config: TransformerConfig, grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of the video tokens, as the pipelines give them.

    Of the K channels of a head a quarter turns with time, three eighths with height and three eighths with width; each
    frequency stands twice, for a pair of neighbouring channels. CogVideoX 1.0 stretches the default grid over the asked
    one ("linspace"), 1.5 counts patches ("slice").

    Args:
        config: the model's configuration.
        grid: patches along (time, height, width).
        device: where to make them.

    Returns:
        ``(cos_VK, sin_VK)``, fp32.
    """
    frames, height, width = grid
    if config.patch_size_t is None:
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        (top, left), (bottom, right) = _crop_region((height, width), base)
        rows = torch.linspace(top, bottom * (height - 1) / height, height, device=device, dtype=torch.float32)
        columns = torch.linspace(left, right * (width - 1) / width, width, device=device, dtype=torch.float32)
    else:
        rows = torch.arange(height, device=device, dtype=torch.float32)
        columns = torch.arange(width, device=device, dtype=torch.float32)
    times = torch.arange(frames, device=device, dtype=torch.float32)

    eighth = config.attention_head_dim // 8
    angles_FHWK = torch.cat(
        [
            _angles(times, 2 * eighth)[:, None, None].expand(frames, height, width, -1),
            _angles(rows, 3 * eighth)[None, :, None].expand(frames, height, width, -1),
            _angles(columns, 3 * eighth)[None, None].expand(frames, height, width, -1),
        ],
        dim=-1,
    )
    angles_VK = angles_FHWK.flatten(0, 2)
    return angles_VK.cos(), angles_VK.sin()


def join_rotary(cos_VK: Tensor, sin_VK: Tensor, text_len: int) -> tuple[Tensor, Tensor]:
    """Tables of the joint stream from those of the video: text rows turn by nothing.

    The sine of each even channel is negated, so that a rotation is ``x * cos + swap(x) * sin`` where ``swap`` exchanges
    the two channels of each pair (see ``attention.RotaryNorm``).

    Args:
        cos_VK, sin_VK: tables of the video tokens, of any floating dtype.
        text_len: text tokens before them.

    Returns:
        ``(cos_SK, sin_SK)``, fp32.
    """
    signed_VK = torch.stack([-sin_VK[:, 0::2], sin_VK[:, 1::2]], dim=-1).flatten(1)
    cos_SK = torch.nn.functional.pad(cos_VK.float(), (0, 0, text_len, 0), value=1.0)
    return cos_SK, torch.nn.functional.pad(signed_VK.float(), (0, 0, text_len, 0))


def sincos_table(config: TransformerConfig, grid: Grid, device: torch.device | None = None) -> Tensor:
    """The sin-cos positions that are added to the video tokens of models without rotary ones (2b).

    A quarter of the D channels encodes time, the rest column and row in halves. In float64, as upstream has them: they
    are rounded once, to the dtype of the stream.

    Args:
        config: the model's configuration.
        grid: patches along (time, height, width).
        device: where to make it.

    Returns:
        ``position_VD``, float64.
    """
    frames, height, width = grid
    dim = config.inner_dim

    def encode(length: int, channels: int, scale: float) -> Tensor:
        positions = torch.arange(length, device=device, dtype=torch.float32) / scale
        omega = 1.0 / THETA ** (torch.arange(channels // 2, device=device, dtype=torch.float64) / (channels / 2.0))
        angles = torch.outer(positions.double(), omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    spatial, temporal = config.spatial_interpolation_scale, config.temporal_interpolation_scale
    shape = (frames, height, width, -1)
    position_FHWD = torch.cat(
        [
            encode(frames, dim // 4, temporal)[:, None, None].expand(shape),
            encode(width, dim // 8 * 3, spatial)[None, None].expand(shape),
            encode(height, dim // 8 * 3, spatial)[None, :, None].expand(shape),
        ],
        dim=-1,
    )
    return position_FHWD.flatten(0, 2)


def _angles(positions: Tensor, channels: int) -> Tensor:
    exponents = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    return torch.outer(positions, 1.0 / (THETA**exponents)).repeat_interleave(2, dim=1)


def _crop_region(size: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a grid of ``size`` lies, scaled to fit, centred on the ``base`` grid: (top, left), (bottom, right)."""
    (height, width), (base_height, base_width) = size, base
    if height / width > base_height / base_width:
        resized = (base_height, round(base_height / height * width))
    else:
        resized = (round(base_width / width * height), base_width)
    top, left = round((base_height - resized[0]) / 2.0), round((base_width - resized[1]) / 2.0)
    return (top, left), (top + resized[0], left + resized[1])
