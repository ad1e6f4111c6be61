"""A VAE's tiles decoded by the ranks of a job.

diffusers decodes a large video by overlapping tiles and blends them. Each tile is decoded by one rank as ``vae.decode``
does it alone; then every rank has all of them, and diffusers' own ``tiled_decode`` blends them: it runs on a copy of
the VAE whose decoder is the table of what has been decoded. So the video is that of one process, bit for bit.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogx_fast.runtime.distributed.parallel import ParallelConfig, Part, digest_weights


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of the latents that is decoded at once."""

    rows: slice
    columns: slice
    shape: torch.Size
    """Of what it is decoded to."""
    rank: int = 0
    """Who decodes it."""
    start: int = 0
    """Where it lies in what that rank sends."""

    @property
    def place(self) -> slice:
        """All of it there."""
        return slice(self.start, self.start + self.shape.numel())


def plan_tiles(vae: Any, shape: tuple[int, ...], ranks: int) -> list[Tile]:
    """Which tiles ``vae.tiled_decode`` cuts latents into, in its order, and who decodes which.

    Args:
        vae: diffusers' ``AutoencoderKLCogVideoX``.
        shape: of the latents, ``(B, C, F, H, W)``.
        ranks: of the job; the largest tiles go to them first, each to who has least.
    """
    batch, _, frames, height, width = shape
    scale, ratio = 2 ** (len(vae.config.block_out_channels) - 1), int(vae.config.temporal_compression_ratio)
    made = frames * ratio if frames % 2 == 0 else (frames - 1) * ratio + 1
    tiles = []
    for rows, columns in itertools.product(
        _cut(height, vae.tile_latent_min_height, vae.tile_overlap_factor_height),
        _cut(width, vae.tile_latent_min_width, vae.tile_overlap_factor_width),
    ):
        size = (rows.stop - rows.start) * scale, (columns.stop - columns.start) * scale
        tiles.append(Tile(rows=rows, columns=columns, shape=torch.Size((batch, vae.config.out_channels, made, *size))))
    loads = [0] * ranks
    for index in sorted(range(len(tiles)), key=lambda index: -tiles[index].shape.numel()):
        rank = loads.index(min(loads))
        tiles[index] = replace(tiles[index], rank=rank, start=loads[rank])
        loads[rank] = tiles[index].place.stop
    return tiles


def _cut(length: int, tile: int, overlap: float) -> list[slice]:
    return [slice(start, min(length, start + tile)) for start in range(0, length, int(tile * (1 - overlap)))]


def sent_bytes(tiles: list[Tile], ranks: int, itemsize: int = 2) -> int:
    """What each rank sends to the others: as much as the one with most has, ``ranks - 1`` times.

    Args:
        tiles: of ``plan_tiles``.
        ranks: of the job.
        itemsize: bytes of a value.
    """
    return (ranks - 1) * _values(tiles) * itemsize


def _values(tiles: list[Tile]) -> int:
    return max(tile.place.stop for tile in tiles)


class SharedTiles:
    """Stands in place of a VAE's ``tiled_decode``. Every rank calls it, and has the whole video.

    Args:
        vae: diffusers' ``AutoencoderKLCogVideoX``.
        lost_after: as of ``ParallelConfig``.
    """

    def __init__(self, vae: Any, lost_after: float) -> None:
        self._vae, self._lost_after = vae, lost_after

    def __call__(self, z: Tensor, return_dict: bool = True) -> Any:
        """As the VAE's own.

        Raises:
            RankError: another rank is lost.
            ValueError: gradients are asked for, or the ranks were given different things.
        """
        import torch.distributed as dist

        from cogx_fast.runtime.distributed import ranks

        if torch.is_grad_enabled():
            raise ValueError("ParallelConfig(decode=True) is for inference: decode under torch.no_grad()")
        vae, job = self._vae, ranks.ranks(self._lost_after)
        tiles = plan_tiles(vae, tuple(z.shape), job.size)
        with job.together():
            job.agree({
                "latents to decode": f"{tuple(z.shape)} in {z.dtype}",
                "tiles": f"{len(tiles)}, the first {tuple(tiles[0].shape)}",
                "VAE": digest_weights(vae),
            })  # fmt: skip
            mine = z.new_empty(_values(tiles))
            for tile in tiles:
                if tile.rank == job.rank:
                    decoded = vae.decode(z[..., tile.rows, tile.columns], return_dict=False)[0]
                    assert (decoded.shape, decoded.dtype) == (tile.shape, z.dtype)
                    mine[tile.place] = decoded.flatten()
            everyone: Any = dist.group.WORLD
            of_ranks = Part(job.size, job.rank, everyone.group_name).gather(mine).view(job.size, -1)
        blender = copy.copy(vae)
        blender._modules = vae._modules | {
            "decoder": _Decoded([of_ranks[tile.rank, tile.place].view(tile.shape) for tile in tiles])
        }
        return type(vae).tiled_decode(blender, z, return_dict=return_dict)


class _Decoded(nn.Module):
    """A decoder that has decoded already: gives each tile in place of its first frames, nothing for the rest."""

    def __init__(self, tiles: list[Tensor]) -> None:
        super().__init__()
        self._tiles = iter(tiles)

    def forward(self, z: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tile; with what the last call gave back in ``conv_cache``, no frames."""
        if conv_cache is not None:
            return conv_cache[:, :, :0], conv_cache
        tile = next(self._tiles)
        return tile, tile


def without_decode(parallel: Any) -> Any:
    """What ``parallel`` is for a pipeline's transformer."""
    return replace(parallel, decode=False) if isinstance(parallel, ParallelConfig) else parallel


def check_decode(pipe: Any, parallel: Any) -> None:
    """Refuse what has no tiles to share.

    Raises:
        ValueError: ``parallel.decode`` is True, and the pipeline's VAE has none.
    """
    vae = getattr(pipe, "vae", None)
    if getattr(parallel, "decode", False) and not hasattr(vae, "tiled_decode"):
        raise ValueError(
            f"ParallelConfig(decode=True) shares the tiles of a VAE, and that of {type(pipe).__name__} has none "
            f"({type(vae).__name__}): leave decode out"
        )


def share_decode(pipe: Any, parallel: Any) -> None:
    """Have a pipeline's VAE decode by tiles, which the ranks share, if ``parallel.decode``; else not any more."""
    vae: Any = getattr(pipe, "vae", None)
    if getattr(parallel, "decode", False):
        vae.enable_tiling()
        vae.tiled_decode = SharedTiles(vae, parallel.lost_after)
    elif isinstance(getattr(vae, "tiled_decode", None), SharedTiles):
        del vae.tiled_decode


__all__ = ["SharedTiles", "Tile", "check_decode", "plan_tiles", "sent_bytes", "share_decode", "without_decode"]
