"""What a transformer costs, from its configuration alone: parameters, memory, tokens and floating-point operations.

Nothing here needs torch. Everything is counted over one list of the model's linears with their real shapes.

Suffixes in words: B videos in a batch, S joint tokens, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cogx_fast.config import TransformerConfig

PARTS = ("patch embed", "time embedding", "modulation", "attention", "feed-forward", "norms", "head")
"""Parts of the model in the order of the forward pass."""

DTYPE_BYTES = {"fp32": 4, "bf16/fp16": 2}
QUANTIZED = "int8/fp8 linears"
_QUANTIZED_PARTS = ("attention", "feed-forward")
_SCALE_BYTES = 4  # one fp32 scale an output row

RELEASED_SPATIAL_FACTOR = 8
_DEFAULT_1_5 = (81, 768, 1360)


class Linear(NamedTuple):
    """Some linears of one shape and role."""

    part: str
    role: str
    """What they compute, in words."""
    inputs: int
    outputs: int
    bias: bool
    rows: str
    """What they are applied to: each "video", "text" or "joint" token, or once for each "video in the batch"."""
    number: int

    @property
    def parameters(self) -> int:
        """Weights and biases of all of them."""
        return self.number * self.outputs * (self.inputs + self.bias)


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


def count_tokens(
    config: TransformerConfig, video: VideoSize, *, spatial_factor: int = RELEASED_SPATIAL_FACTOR
) -> Tokens:
    """Tokens of one video; latent frames that do not fill a patch in time are padded, as the pipelines pad them.

    Args:
        config: the model's configuration.
        video: a size that ``choose_video`` gave.
        spatial_factor: pixels along a latent pixel's side.
    """
    frames = (video.frames - 1) // config.temporal_compression_ratio + 1
    if config.patch_size_t is not None:
        frames = -(-frames // config.patch_size_t) * config.patch_size_t
    grid = config.grid(frames, video.height // spatial_factor, video.width // spatial_factor)
    return Tokens(text=config.max_text_seq_length, grid=grid)


def linears(config: TransformerConfig) -> Iterator[Linear]:
    """Every linear of the model as upstream has it (query, key and value apart; the patch convolution as a linear)."""
    dim, layers, emb = config.inner_dim, config.num_layers, config.time_embed_dim
    patch_values = config.patch_size**2 * (config.patch_size_t or 1)
    gated = config.activation_fn in ("geglu", "swiglu")
    once = "video in the batch"

    patch_bias = config.patch_bias or config.patch_size_t is not None
    yield Linear("patch embed", "patches", config.in_channels * patch_values, dim, patch_bias, "video", 1)
    yield Linear("patch embed", "text", config.text_embed_dim, dim, True, "text", 1)
    yield Linear("time embedding", "timestep", dim, emb, True, once, 1)
    yield Linear("time embedding", "timestep", emb, emb, True, once, 1)
    if config.ofs_embed_dim is not None:
        yield Linear("time embedding", "ofs", config.ofs_embed_dim, config.ofs_embed_dim, True, once, 2)
    yield Linear("modulation", "modulation of blocks", emb, 6 * dim, True, once, 2 * layers)
    yield Linear("attention", "queries, keys, values", dim, dim, config.attention_bias, "joint", 3 * layers)
    yield Linear("attention", "attention out", dim, dim, True, "joint", layers)
    yield Linear("feed-forward", "feed-forward in", dim, (8 if gated else 4) * dim, True, "joint", layers)
    yield Linear("feed-forward", "feed-forward out", 4 * dim, dim, True, "joint", layers)
    yield Linear("modulation", "modulation of the head", emb, 2 * dim, True, once, 1)
    yield Linear("head", "head", dim, config.out_channels * patch_values, True, "video", 1)


def count_parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameters of each of ``PARTS``; their sum is diffusers' ``num_parameters()``. Learned positions are a buffer."""
    counts = dict.fromkeys(PARTS, 0)
    for linear in linears(config):
        counts[linear.part] += linear.parameters
    query_key = 2 * config.num_layers * 2 * config.attention_head_dim
    wide = (2 * config.num_layers + 2) * 2 * config.inner_dim if config.norm_elementwise_affine else 0
    counts["norms"] = query_key + wide
    return counts


def count_positions(config: TransformerConfig) -> int:
    """Values of the buffer of learned positions (5b-i2v), stored beside the parameters; 0 without one."""
    if not config.use_learned_positional_embeddings:
        return 0
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    time, height, width = config.grid(frames, config.sample_height, config.sample_width)
    return (config.max_text_seq_length + time * height * width) * config.inner_dim


def memory(config: TransformerConfig) -> dict[str, int]:
    """Bytes of the weights by dtype.

    ``QUANTIZED`` holds the weights of the blocks' attention and feed-forward linears in one byte and an fp32 scale an
    output row, and everything else in two bytes.
    """
    total = sum(count_parameters(config).values()) + count_positions(config)
    sizes = {name: size * total for name, size in DTYPE_BYTES.items()}
    quantized = [linear for linear in linears(config) if linear.part in _QUANTIZED_PARTS]
    weights = sum(linear.number * linear.inputs * linear.outputs for linear in quantized)
    rows = sum(linear.number * linear.outputs for linear in quantized)
    sizes[QUANTIZED] = weights + _SCALE_BYTES * rows + 2 * (total - weights)
    return sizes


def count_flops(config: TransformerConfig, tokens: Tokens, *, batch: int) -> dict[str, int]:
    """Floating-point operations of one call by part, a multiplication and an addition counted as two.

    The attention's own products, q · kᵀ and the sum over values, are 4 · S² · D · L · B and stand under
    "attention scores"; the parts are their linears. Norms, activations and softmax are not counted.

    Args:
        config: the model's configuration.
        tokens: of one video.
        batch: videos in the call, B; 2 with guidance.
    """
    rows = {"video": tokens.video, "text": tokens.text, "joint": tokens.joint, "video in the batch": 1}
    flops = {part: 0 for part in PARTS if part != "norms"}
    for linear in linears(config):
        flops[linear.part] += 2 * linear.number * linear.inputs * linear.outputs * rows[linear.rows] * batch
    flops["attention scores"] = 4 * tokens.joint**2 * config.inner_dim * config.num_layers * batch
    return flops


def _nearest(size: int, step: int, offset: int) -> str:
    below = (size - offset) // step * step + offset
    least = offset or step
    options = [option for option in (below, below + step) if option >= least] or [least]
    return "use " + " or ".join(str(option) for option in options)
