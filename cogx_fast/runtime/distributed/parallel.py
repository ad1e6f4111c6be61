"""One step on several ranks: the runner's ``split`` slot.

*Guidance*: the videos of a batch, with the prompt and without, on groups of their own; one gather of the prediction.
*Sequence*: each rank of a group has a part of the joint stream; only attention needs the others'
(``attention.exchange``), and the prediction is gathered after the output projection, where a token has fewest values.

Every rank is called with the whole input and returns the whole prediction, so pipelines run unmodified on each.

Suffixes: B batch, S joint tokens, L tokens of a rank, R ranks of a sequence group, P values of a patch, D model width.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogx_fast.attention.attend import Mask
from cogx_fast.attention.backends import BACKENDS
from cogx_fast.attention.exchange import Exchange
from cogx_fast.attention.masks import SparseBlocks
from cogx_fast.attention.plan import hash_config
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.runtime.composition import Feature
from cogx_fast.runtime.distributed.sharded import check_shardable, refuse_sharded, shard_blocks, sharded
from cogx_fast.runtime.runner import ForBlocks, Inputs, Whole
from cogx_fast.runtime.step_caching.step_cache import StepCache, place_of
from cogx_fast.runtime.tensors import leaves
from cogx_fast.version import __version__

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cogx_fast.runtime.distributed.ranks import Ranks
    from cogx_fast.runtime.module import CogVideoXModel

_NAMES = ("guidance", "sequence")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a step is shared by ``guidance · sequence`` ranks.

    Raises:
        ValueError: a number below 1.
    """

    guidance: int = 1
    """Groups that share the batch: 2 for a video with the prompt and without."""
    sequence: int = 1
    """Ranks that share the tokens of a video; a divisor of the model's heads."""
    decode: bool = False
    """Whether the ranks also share the tiles that a pipeline's VAE decodes (``accelerate``), which turns tiling on."""
    shard_weights: bool = False
    """Whether each rank keeps only its share of the blocks' weights (FSDP2), for GPUs that cannot hold the model."""
    lost_after: float = 12.0
    """Seconds without a sign of life after which a rank is lost and the job ends."""

    def __post_init__(self) -> None:
        for name in _NAMES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")

    @classmethod
    def for_ranks(cls, ranks: int, num_heads: int, *, guided: bool = True, decode: bool = False) -> ParallelConfig:
        """The best for so many ranks: guidance first, which sends least.

        Raises:
            ValueError: the rest does not divide the heads.
        """
        guidance = 2 if guided and ranks % 2 == 0 else 1
        if num_heads % (ranks // guidance):
            raise ValueError(f"{ranks} ranks: {_not_divided(num_heads, ranks // guidance)}")
        return cls(guidance=guidance, sequence=ranks // guidance, decode=decode)


def parallelize(model: CogVideoXModel, parallel: ParallelConfig | DeviceMesh | None) -> None:
    """Have a model's steps shared from the next call on. Every rank of the job calls it.

    Args:
        model: the same on every rank.
        parallel: how, or a mesh with dimensions "guidance" and "sequence" (or one of them); None: not any more.

    Raises:
        ValueError: it does not fit the model, its slots or the number of ranks.
    """
    runner = model.runner
    refuse_sharded(model, "set_parallel", "load the model again, with another ParallelConfig")
    if parallel is None:
        return runner.use(replace(runner.slots, split=Whole()))
    heads = model.config.num_attention_heads
    if isinstance(parallel, ParallelConfig):
        if parallel.decode:
            raise ValueError(
                "decode=True shares what a pipeline's VAE decodes, and this is its transformer alone: use "
                "cogx_fast.accelerate(pipe, parallel=...)"
            )
        guidance, sequence = parallel.guidance, parallel.sequence
    else:
        guidance, sequence = _sizes_of(parallel)
    if sequence > 1:
        runner.refuse_packaged(f"sequence={sequence} needs another code of the blocks (guidance alone does not)")
    if heads % sequence:
        raise ValueError(_not_divided(heads, sequence))
    from cogx_fast.runtime.distributed import ranks

    lost_after = parallel.lost_after if isinstance(parallel, ParallelConfig) else ranks.LOST_AFTER
    ranks.start(lost_after)
    job = ranks.ranks(lost_after)
    with job.together():
        job.agree({"mesh": f"guidance {guidance}, sequence {sequence}"})
    if guidance * sequence != job.size:
        raise ValueError(
            f"guidance={guidance}, sequence={sequence} is for {guidance * sequence} ranks, and the job has {job.size}: "
            f"use torchrun --nproc-per-node {guidance * sequence}, or share it otherwise"
        )
    mesh = parallel if not isinstance(parallel, ParallelConfig) else _mesh((guidance, sequence), _NAMES)
    split = Split(_part(mesh, "guidance"), _part(mesh, "sequence"), job)
    if isinstance(parallel, ParallelConfig) and parallel.shard_weights:
        split.shard_weights(model)
    return runner.use(replace(runner.slots, split=split))


@dataclass(frozen=True)
class Part:
    """This rank among those that share something."""

    size: int = 1
    index: int = 0
    group: str = ""

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, one behind the other along dimension 0."""
        if self.size == 1:
            return tensor
        ops = torch.ops._c10d_functional
        gathered: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(tensor.contiguous(), self.size, self.group))
        return gathered

    def rows(self, length: int) -> slice:
        """This rank's of so many; the last ranks' may reach beyond."""
        each = -(-length // self.size)
        return slice(self.index * each, (self.index + 1) * each)


class Split(Whole):
    """A part of each step in this process. A value of ``Slots.split``.

    Args:
        guidance: this rank among the groups that share the batch.
        sequence: among the ranks that share the tokens.
        ranks: of the job.
    """

    feature = Feature.PARALLEL
    is_traceable = False
    """Collectives that wait for all ranks, and checks of what they were given, stand between the blocks' graphs."""

    def __init__(self, guidance: Part, sequence: Part, ranks: Ranks) -> None:
        self.guidance, self.sequence = guidance, sequence
        self._ranks = ranks
        self._lock = threading.Lock()
        self._generation: tuple[Any, ...] = ()
        self._at = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Whole, ()  # a copy is one process's own

    def shard_weights(self, model: CogVideoXModel) -> None:
        """Have each rank keep its share of the blocks' weights, for good. A model on the meta device stays as it is.

        Raises:
            DisagreementError: ranks have different models; none is changed then.
            ShardError: (a ValueError) its weights cannot be divided.
        """
        check_shardable(model)
        if model.device.type == "meta":
            return
        with self._ranks.together():
            facts = _describe_model(model)
            self._ranks.agree(facts)
            shard_blocks(model, _mesh((self._ranks.size,), ("weights",)), facts["weights"])

    # -- the batch ----------------------------------------------------------------------------------------------------

    def step(self, model: CogVideoXTransformer, inputs: Inputs, compute: Callable[[Inputs], Tensor]) -> Tensor:
        """The prediction for all videos, on every rank.

        Raises:
            RankError: another rank is lost.
            ValueError: ranks were given different things, or what cannot be shared; the same on all of them.
        """
        if torch.is_grad_enabled():
            raise ValueError("parallel is for inference: call the model under torch.no_grad(), or load it without")
        if not self._lock.acquire(blocking=False):
            raise ValueError("a parallel model is called by two threads at once, whose order ranks cannot agree on")
        try:
            part = self._of_batch(inputs)
            with self._ranks.together():
                self._agree(model, inputs)
                return self.guidance.gather(compute(part))
        finally:
            self._lock.release()

    def _of_batch(self, inputs: Inputs) -> Inputs:
        batch, groups = inputs.text_BTE.shape[0], self.guidance.size
        if batch % groups:
            raise ValueError(
                f"guidance={groups} shares a batch of {batch}, which it does not divide: without guidance "
                "(guidance_scale=1) use sequence alone"
            )
        if groups == 1:
            return inputs
        rows = self.guidance.rows(batch)
        mask = inputs.mask
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = mask[rows].clone()
        return inputs._replace(
            latents_BFCHW=inputs.latents_BFCHW[rows].clone(),
            text_BTE=inputs.text_BTE[rows].clone(),
            timestep_B=inputs.timestep_B[rows],  # a view still: the step cache reads the step from it
            ofs_B=None if inputs.ofs_B is None else inputs.ofs_B[rows],
            mask=mask,
        )

    # -- the tokens ---------------------------------------------------------------------------------------------------

    def enter(self, x_BSD: Tensor, inputs: ForBlocks) -> tuple[Tensor, ForBlocks]:
        """This rank's tokens, and the mask of its heads."""
        if self.sequence.size == 1:
            return x_BSD, inputs
        tokens = x_BSD.shape[1]
        rows = self.sequence.rows(tokens)

        def mine(each: Tensor, dim: int) -> Tensor:
            present = each.narrow(dim, min(rows.start, tokens), max(0, min(rows.stop, tokens) - rows.start))
            missing = rows.stop - rows.start - present.shape[dim]
            return F.pad(present, (0, 0) * (each.dim() - 1 - dim) + (0, missing)) if missing else present.clone()

        rotary = inputs.rotary and (mine(inputs.rotary[0], 0), mine(inputs.rotary[1], 0))
        exchange = Exchange(
            self._of_heads(inputs.mask),
            torch.empty(tokens, dtype=torch.bool, device=x_BSD.device) if tokens % self.sequence.size else None,
            self.sequence.size,
            self.sequence.group,
        )
        inputs = inputs._replace(is_text_S1=mine(inputs.is_text_S1, 0), rotary=rotary, mask=exchange)
        return mine(x_BSD, 1), inputs

    def _of_heads(self, mask: Mask | SparseBlocks | Exchange) -> Mask | SparseBlocks:
        assert not isinstance(mask, Exchange)
        if isinstance(mask, SparseBlocks) and mask.choice_LN.shape[1] > 1:
            return mask._replace(choice_LN=mask.choice_LN[:, self.sequence.rows(mask.choice_LN.shape[1])].clone())
        if isinstance(mask, Tensor) and mask.shape[1] > 1:
            return mask[:, self.sequence.rows(mask.shape[1])].clone()
        return mask

    def leave(self, x_BSD: Tensor, text_len: int, video_len: int, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Every rank's patches, gathered; those made of text and of what was added are left out."""
        if self.sequence.size == 1:
            return super().leave(x_BSD, text_len, video_len, head)
        gathered_RBLP = self.sequence.gather(head(x_BSD)).unflatten(0, (self.sequence.size, -1))
        return gathered_RBLP.transpose(0, 1).flatten(1, 2)[:, text_len : text_len + video_len]

    # -- the same on every rank ---------------------------------------------------------------------------------------

    def _agree(self, model: CogVideoXTransformer, inputs: Inputs) -> None:
        """Before the first step of a generation, compare what it is of."""
        place = place_of(inputs.timestep_B)
        timesteps = inputs.timestep_B if place is None else place.timesteps
        sizes = inputs.latents_BFCHW.shape, inputs.text_BTE.shape
        generation = (sizes, timesteps.data_ptr(), timesteps._version)
        if place is not None and generation == self._generation and place.step > self._at:
            self._at = place.step
            return
        self._generation = ()
        facts = _describe_model(model) | {
            "mesh": f"guidance {self.guidance.size}, sequence {self.sequence.size}",
            "version": f"cogx_fast {__version__}, torch {torch.__version__}",
            "size of the latents": _sizes(inputs.latents_BFCHW),
            "prompt length": str(inputs.text_BTE.shape[1]),
            "prompt": _digest(inputs.text_BTE),
            "seed or image (latents)": _digest(inputs.latents_BFCHW),
            "schedule of steps": f"{len(timesteps)} of {_digest(timesteps)}",
            "attention mask": "none" if not isinstance(inputs.mask, Tensor) else _digest(inputs.mask),
        }
        self._ranks.agree(facts)
        self._generation, self._at = generation, -1 if place is None else place.step


def _describe_model(model: Any) -> dict[str, str]:
    from quant import recipe_of

    recipe, shards = recipe_of(model), sharded(model)
    reuse = model.runner.slots.reuse
    inexact = [name for name in model.attention_backends if not BACKENDS[name].exact]
    compilation = model.runner.compilation
    return {
        "model": hash_config(model.config),
        "dtype": str(model.dtype),
        "weights": digest_weights(model) if shards is None else shards.digest,
        "recipe": "none" if recipe is None else f"{recipe.name} {_hash(recipe.to_toml())}",
        "step cache": _hash(repr(reuse.strategy)) if isinstance(reuse, StepCache) else "none",
        "attention plan": "none" if model.attention_plan is None else _hash(repr(model.attention_plan)),
        "approximate attention": ", ".join(inexact) or "none",
        "compilation": "none" if compilation is None else _hash(repr(compilation.config)),
    }


def digest_weights(model: Any) -> str:
    """Of a few values of every weight, which tell another checkpoint, LoRA or seed."""
    weights = [each for each in leaves(model) if not each.is_meta and each.numel()]
    if not weights:
        return "elsewhere"  # offloaded
    few = [each[tuple(slice(None, None, max(1, size // 2)) for size in each.shape)] for each in weights]
    return _digest(torch.cat([each.flatten().float() for each in few]))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sizes(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))


def _sizes_of(mesh: DeviceMesh) -> tuple[int, int]:
    names = mesh.mesh_dim_names or ()
    if not names or set(names) - set(_NAMES):
        raise ValueError(f"the mesh's dimensions are named {names}, expected 'guidance' and 'sequence', or one of them")
    sizes = dict(zip(names, mesh.shape, strict=True))
    return sizes.get("guidance", 1), sizes.get("sequence", 1)


def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    on_cuda = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config())
    return init_device_mesh("cuda" if on_cuda else "cpu", shape, mesh_dim_names=names)


def _part(mesh: DeviceMesh, name: str) -> Part:
    import torch.distributed._functional_collectives  # noqa: F401  # tells the compiler the shapes of collectives

    if name not in (mesh.mesh_dim_names or ()) or mesh[name].size() == 1:
        return Part()
    return Part(mesh[name].size(), mesh[name].get_local_rank(), mesh[name].get_group().group_name)


def _not_divided(heads: int, sequence: int) -> str:
    able = [str(degree) for degree in range(2, heads + 1) if heads % degree == 0]
    return f"sequence={sequence} does not divide the model's {heads} heads: use {', '.join(able)}"


__all__ = ["ParallelConfig", "Part", "Split", "digest_weights", "parallelize"]
