"""Sizes of videos: frames and pixels, latent frames, the grid of patches and how many tokens that is."""

from __future__ import annotations

from dataclasses import dataclass

from cogx_fast.config import TransformerConfig

RELEASED_SPATIAL_FACTOR = 8
_DEFAULT_1_5 = (81, 768, 1360)


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Frames and pixels of a video."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frame{'s' if self.frames != 1 else ''}, {self.height} × {self.width}"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of one video: text ones and a grid of patches."""

    text: int
    grid: tuple[int, int, int]
    """Patches along (time, height, width)."""

    @property
    def video(self) -> int:
        """Video tokens."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def joint(self) -> int:
        """Text and video tokens, S."""
        return self.text + self.video


def default_video(config: TransformerConfig, *, spatial_factor: int = RELEASED_SPATIAL_FACTOR) -> VideoSize:
    """The video that a model is made for.

    For CogVideoX 1.5, whose configuration holds the largest side it takes (300 latent pixels), that is 81 frames of
    768 × 1360, as its model card says.
    """
    if config.patch_size_t is not None and config.sample_height == config.sample_width == 300:
        frames, height, width = _DEFAULT_1_5
        return VideoSize(frames=frames, height=height, width=width)
    return VideoSize(
        frames=config.sample_frames,
        height=config.sample_height * spatial_factor,
        width=config.sample_width * spatial_factor,
    )


def choose_video(
    config: TransformerConfig,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    spatial_factor: int = RELEASED_SPATIAL_FACTOR,
) -> VideoSize:
    """The size that is asked for, with the model's own where nothing is.

    Raises:
        ValueError: the model cannot make a video of that size; the message names the nearest sizes that it can.
    """
    own = default_video(config, spatial_factor=spatial_factor)
    video = VideoSize(
        frames=own.frames if frames is None else frames,
        height=own.height if height is None else height,
        width=own.width if width is None else width,
    )
    step = spatial_factor * config.patch_size
    for name, size in (("height", video.height), ("width", video.width)):
        if size < step or size % step:
            raise ValueError(f"{name} is {size}, expected a multiple of {step} pixels: {_nearest(size, step, 0)}")
    ratio = config.temporal_compression_ratio
    if video.frames < 1 or (video.frames - 1) % ratio:
        raise ValueError(
            f"frames is {video.frames}, expected {ratio}·k + 1 (k = 0, 1, 2, …): {_nearest(video.frames, ratio, 1)}"
        )
    if config.use_learned_positional_embeddings and (video.height, video.width) != (own.height, own.width):
        raise ValueError(
            f"size is {video.height} × {video.width}, but this model has learned positions: it makes "
            f"{own.height} × {own.width} videos only"
        )
    return video


def latent_frames(config: TransformerConfig, frames: int) -> int:
    """Latent frames that the VAE makes of that many frames, before any padding."""
    return (frames - 1) // config.temporal_compression_ratio + 1


def padded_latent_frames(config: TransformerConfig, frames: int) -> int:
    """Latent frames that the transformer is given for them: whole patches in time, as the pipelines pad them."""
    return -(-latent_frames(config, frames) // (config.patch_size_t or 1)) * (config.patch_size_t or 1)


def own_grid(config: TransformerConfig) -> tuple[int, int, int]:
    """Patches along (time, height, width) of the configuration's own size, which learned positions are made for."""
    return config.grid(latent_frames(config, config.sample_frames), config.sample_height, config.sample_width)


def count_tokens(
    config: TransformerConfig, video: VideoSize, *, spatial_factor: int = RELEASED_SPATIAL_FACTOR
) -> Tokens:
    """Tokens of one video; latent frames that do not fill a patch in time are padded, as the pipelines pad them.

    Args:
        config: the model's configuration.
        video: a size that ``choose_video`` gave.
        spatial_factor: pixels along a latent pixel's side.
    """
    frames = padded_latent_frames(config, video.frames)
    grid = config.grid(frames, video.height // spatial_factor, video.width // spatial_factor)
    return Tokens(text=config.max_text_seq_length, grid=grid)


def _nearest(size: int, step: int, offset: int) -> str:
    below = (size - offset) // step * step + offset
    least = offset or step
    options = [option for option in (below, below + step) if option >= least] or [least]
    return "use " + " or ".join(str(option) for option in options)
