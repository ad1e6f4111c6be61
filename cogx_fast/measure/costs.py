"""What a transformer costs, from its configuration alone: parameters, memory and floating-point operations.

Nothing here needs torch. Everything is counted over one list of the model's linears with their real shapes.

Suffixes in words: B videos in a batch, S joint tokens, D model width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from cogx_fast.config import TransformerConfig
from cogx_fast.sizes import Tokens, own_grid

PARTS = ("patch embed", "time embedding", "modulation", "attention", "feed-forward", "norms", "head")
"""Parts of the model in the order of the forward pass."""

DTYPE_BYTES = {"fp32": 4, "bf16/fp16": 2}
QUANTIZED = "int8/fp8 linears"
_QUANTIZED_PARTS = ("attention", "feed-forward")
_SCALE_BYTES = 4  # one fp32 scale an output row


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
    return (config.max_text_seq_length + math.prod(own_grid(config))) * config.inner_dim


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
