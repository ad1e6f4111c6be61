"""Find an attention plan: run a few dense denoising steps and score every window for every layer and head.

Nothing sparse is run. From sampled queries, what a head would have put out had it seen only the blocks that a pattern
keeps follows from its dense attention: the sums over those blocks, weighted anew.

Suffixes: B batch, S joint tokens, R sampled queries, N heads, K head width, D model width, L layers, P patterns,
Q blocks of the stream, J tokens in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogx_fast.attention.plan import FULL, LAST_TIMESTEP, AttentionPlan, PlanError, hash_config, hash_weights
from cogx_fast.attention.windows import Pattern, block_boxes, kept_blocks
from cogx_fast.model.tables import Grid
from cogx_fast.model.transformer import Attention, Block
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.runner import Runner

if TYPE_CHECKING:
    from cogx_fast.pipelines.generation import Request

CANDIDATES: tuple[Pattern, ...] = (
    *(Pattern(kind="spatial", frames=frames) for frames in (0, 1)),
    *(Pattern(kind="temporal", space=space) for space in (0.0, 1 / 8)),
    Pattern(kind="tiles", frames=1, space=1 / 8),
    Pattern(kind="tiles", frames=3, space=1 / 4),
    *(Pattern(kind="radial", space=space) for space in (1 / 8, 1 / 4, 1 / 2)),
)
"""The windows that are tried, besides the full one."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A plan, and what was measured for it."""

    plan: AttentionPlan
    grid: Grid
    text_len: int
    kept_LN: Tensor
    """The part of all blocks that is kept."""
    head_errors_LN: Tensor
    """Relative error of each head's output, the largest seen."""
    block_errors_L: Tensor
    """Relative error of each block's attention output, all heads sparse together, the largest seen."""


def find_plan(
    pipe: Any,
    requests: Sequence[Request],
    *,
    max_error: float,
    dense_part: float = 0.2,
    candidates: Sequence[Pattern] = CANDIDATES,
    rows: int = 64,
    block_size: int = AttentionPlan.block_size,
    tile: tuple[int, int] = AttentionPlan.tile,
    on_step: Callable[[int], None] | None = None,
) -> Finding:
    """Choose for every layer and head the sparsest pattern whose error is small enough.

    Two passes over the requests, all dense. The first takes each head alone; the second all heads of a block as chosen,
    and gives the head that matters most a denser pattern until the block's error is small enough, too.

    Args:
        pipe: a CogVideoX pipeline with this package's transformer in it, neither compiled nor with a plan.
        requests: what to generate, all of one size; a few steps each are enough.
        max_error: the largest relative error (2-norm, over the sampled queries) allowed to a head's output and to a
            block's attention output.
        dense_part: the first part of the schedule, which stays dense and is not looked at.
        candidates: patterns to try.
        rows: queries sampled in each call.
        block_size: tokens in a block.
        tile: frames and rows of a block (``AttentionPlan.tile``).
        on_step: called with the number of denoising steps done, of twice those of all requests.

    Raises:
        PlanError: (a ValueError) there is nothing to look at, or the pipeline's transformer is not as said above.
    """
    from cogx_fast.pipelines.generation import count_steps, run_pipeline

    model = pipe.transformer
    if not isinstance(model, CogVideoXModel) or type(model.runner) is not Runner or model.attention_plan is not None:
        raise PlanError("plans are found with this package's transformer, uncompiled and without a plan: load it so")
    if not (max_error >= 0 and 0 <= dense_part < 1 and rows > 0):
        raise PlanError(
            f"max_error is {max_error}, dense_part {dense_part}, rows {rows}: expected 0 or more, 0 to 1, 1 or more"
        )
    observer = _Observer(
        model, (FULL, *candidates), dense_above=LAST_TIMESTEP * (1 - dense_part), rows=rows, block_size=block_size,
        tile=tile,
    )  # fmt: skip
    count = count_steps(on_step)
    for look in (observer.score_heads, observer.check_block):
        with observer.watching(look):
            for request in requests:
                run_pipeline(pipe, request, decode=False, on_step=count)
        if observer.grid is None:
            raise PlanError("no step after the dense ones was run: ask for more steps, or a smaller dense part")
        if look == observer.score_heads:
            observer.choose(max_error)
    return observer.finding(max_error, len(requests))


class _Observer:
    """What is gathered while the model runs."""

    def __init__(
        self,
        model: CogVideoXModel,
        patterns: Sequence[Pattern],
        *,
        dense_above: float,
        rows: int,
        block_size: int,
        tile: tuple[int, int],
    ) -> None:
        self.model, self.patterns, self.dense_above, self.rows = model, patterns, dense_above, rows
        self.block_size, self.tile = block_size, tile
        self.grid: Grid | None = None
        self.text_len = 0
        layers, heads = model.config.num_layers, model.config.num_attention_heads
        self.errors_LNP = torch.zeros(layers, heads, len(patterns))
        self.choice_LN = torch.zeros(layers, heads, dtype=torch.long)
        self.block_errors_L = torch.zeros(layers)
        self.max_error = math.inf
        self._generator = torch.Generator().manual_seed(0)
        self._looking = False

    def watching(self, look: Callable[[int, Attention, Tensor, Tensor], None]) -> ExitStack:
        """While this is open, every attention of a step that is not dense is shown to ``look``."""

        def before(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("hidden_states", "encoder_hidden_states", "timestep")  # pipelines give them by name
            latents, text, timestep = (kwargs[name] for name in names)
            self._looking = float(torch.as_tensor(timestep).max()) < self.dense_above
            if self._looking:
                self._begin(latents.shape, text.shape[1], latents.device)

        def after(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                if self._looking:
                    attention = cast(Attention, module)
                    look(layer, attention, self._head_outputs(attention, args[0], args[1]), output[:, self._rows_R])

            return hook

        stack = ExitStack()
        stack.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer, block in enumerate(self.model.transformer_blocks):
            stack.callback(cast(Block, block).attn1.register_forward_hook(after(layer)).remove)
        return stack

    def score_heads(self, layer: int, _: Attention, heads_NPBRK: Tensor, __: Tensor) -> None:
        """The first pass: each head's error under each pattern."""
        errors_NP = _norms(heads_NPBRK - heads_NPBRK[:, :1]) / _norms(heads_NPBRK[:, :1])
        self.errors_LNP[layer] = self.errors_LNP[layer].maximum(errors_NP.cpu())

    def choose(self, max_error: float) -> None:
        """The sparsest pattern of each head whose error is small enough."""
        self.max_error = max_error
        allowed_LNP = self.errors_LNP <= max_error
        self.choice_LN = torch.where(allowed_LNP, self.kept_P, math.inf).argmin(-1)

    def check_block(self, layer: int, attention: Attention, heads_NPBRK: Tensor, output_BRD: Tensor) -> None:
        """The second pass: the block's error with all heads as chosen, and denser patterns where it is too large."""
        weight_DNK = cast(nn.Linear, attention.to_out[0]).weight.float().unflatten(1, (len(heads_NPBRK), -1))
        size = output_BRD.float().norm()
        choice_N = self.choice_LN[layer]
        while True:
            numbers = torch.arange(len(choice_N))
            wrong_NBRK = heads_NPBRK[numbers, choice_N] - heads_NPBRK[:, 0]
            wrong_NBRD = torch.einsum("nbrk,dnk->nbrd", wrong_NBRK, weight_DNK)
            error = float(wrong_NBRD.sum(0).norm() / size)
            if error <= self.max_error or not bool(choice_N.any()):
                break
            worst = int(_norms(wrong_NBRD).argmax())
            choice_N[worst] = self._denser(layer, worst)
        self.block_errors_L[layer] = max(float(self.block_errors_L[layer]), error)

    def finding(self, max_error: float, prompts: int) -> Finding:
        """The plan, with the patterns that it uses, and its figures."""
        assert self.grid is not None
        used = sorted({0, *self.choice_LN.flatten().tolist()})
        plan = AttentionPlan(
            patterns=tuple(self.patterns[index] for index in used),
            choice=tuple(tuple(used.index(index) for index in row) for row in self.choice_LN.tolist()),
            dense_above=self.dense_above,
            block_size=self.block_size,
            tile=self.tile,
            config_hash=hash_config(self.model.config),
            weights_hash=hash_weights(self.model),
            origin=f"found on {prompts} prompts with errors up to {max_error:g} at {' × '.join(map(str, self.grid))}",
        )
        errors = self.errors_LNP.gather(-1, self.choice_LN[..., None])[..., 0]
        return Finding(
            plan=plan,
            grid=self.grid,
            text_len=self.text_len,
            kept_LN=plan.kept(self.grid, self.text_len),
            head_errors_LN=errors,
            block_errors_L=self.block_errors_L,
        )

    def _denser(self, layer: int, head: int) -> int:
        """The next denser pattern with a smaller error; the full one in the end."""
        chosen = int(self.choice_LN[layer, head])
        errors_P = self.errors_LNP[layer, head]
        better = (self.kept_P > self.kept_P[chosen]) & (errors_P < errors_P[chosen])
        better[0] = True
        return int(torch.where(better, self.kept_P, math.inf).argmin())

    def _begin(self, latents_shape: torch.Size, text_len: int, device: torch.device) -> None:
        grid = self.model.config.grid(latents_shape[1], latents_shape[3], latents_shape[4])
        if self.grid is None:
            boxes = block_boxes(grid, self.tile, text_len, self.block_size)
            keep_PQQ = torch.stack([kept_blocks(pattern, boxes) for pattern in self.patterns])
            self.kept_P = keep_PQQ.float().mean((1, 2))
            plan = AttentionPlan(patterns=(FULL,), choice=((0,),), block_size=self.block_size, tile=self.tile)
            self._keep_PQQ = keep_PQQ.to(device)
            self._order_S = plan.on_grid(grid, text_len, device).joint_order_S
            self.grid, self.text_len = grid, text_len
        if (grid, text_len) != (self.grid, self.text_len):
            raise PlanError(f"a plan is found at one size, got {self.grid} and {grid} patches")
        places = torch.randint(text_len, len(self._order_S), (self.rows,), generator=self._generator).to(device)
        self._rows_R = self._order_S[places]
        self._keep_PRQ = self._keep_PQQ[:, places // self.block_size].float()

    def _head_outputs(self, attention: Attention, x_BSD: Tensor, rotary: Any) -> Tensor:
        """What each head puts out for the sampled queries under each pattern, the full one first: ``out_NPBRK``."""
        q_BSNK, k_BSNK, v_BSNK = attention.project(x_BSD, rotary)
        q_BRNK = q_BSNK[:, self._rows_R].float()
        outputs = []
        for head in range(attention.num_heads):
            k_BSK, v_BSK = (each[:, self._order_S, head].float() for each in (k_BSNK, v_BSNK))
            outputs.append(masked_outputs(q_BRNK[:, :, head], k_BSK, v_BSK, self._keep_PRQ, self.block_size))
        return torch.stack(outputs)


def masked_outputs(q_BRK: Tensor, k_BSK: Tensor, v_BSK: Tensor, keep_PRQ: Tensor, block_size: int) -> Tensor:
    """One head's attention when each query sees only some blocks of keys.

    Args:
        q_BRK: sampled queries.
        k_BSK, v_BSK: all keys and values in the stream's order.
        keep_PRQ: 1 for the blocks of keys that each query sees under each pattern.
        block_size: tokens in a block.

    Returns:
        ``out_PBRK``.
    """
    tokens = k_BSK.shape[1]
    padding = keep_PRQ.shape[-1] * block_size - tokens
    weights_BRS = (q_BRK @ k_BSK.mT / math.sqrt(q_BRK.shape[-1])).softmax(-1)
    weights_BRQJ = F.pad(weights_BRS, (0, padding)).unflatten(-1, (-1, block_size))
    v_BQJK = F.pad(v_BSK, (0, 0, 0, padding)).unflatten(1, (-1, block_size))
    sums_BRQK = torch.einsum("brqj,bqjk->brqk", weights_BRQJ, v_BQJK)
    totals_PBR = torch.einsum("prq,brq->pbr", keep_PRQ, weights_BRQJ.sum(-1))
    return torch.einsum("prq,brqk->pbrk", keep_PRQ, sums_BRQK) / totals_PBR.clamp(min=1e-20)[..., None]


def _norms(values: Tensor) -> Tensor:
    """The 2-norm over the last three axes."""
    return values.flatten(-3).norm(dim=-1)


__all__ = ["CANDIDATES", "Finding", "find_plan", "masked_outputs"]
