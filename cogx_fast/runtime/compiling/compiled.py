"""Runners of a compiled model: one graph for each kind of block, or one for the whole step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cogx_fast.attention.exchange import Exchange
from cogx_fast.attention.masks import SparseBlocks
from cogx_fast.model.tracing import is_traced
from cogx_fast.model.transformer import Block, CogVideoXTransformer
from cogx_fast.runtime.attached import Attached, name_of, named, on_modules, patched_forward, refuse
from cogx_fast.runtime.compiling.calls import Calls, describe_call
from cogx_fast.runtime.compiling.kinds import kind_of, own
from cogx_fast.runtime.compiling.piece import Compile, Piece
from cogx_fast.runtime.compiling.symbols import Symbols
from cogx_fast.runtime.runner import CallWith, ComputeBlocks, Inputs, Runner, Slots, call_eagerly, compute_all, run
from cogx_fast.runtime.step_caching.step_cache import Pattern, StepCache

_INSTEAD = (
    "use compile=False, pipe.enable_model_cpu_offload(), or enable_group_offload(offload_type='block_level', "
    "num_blocks_per_group=1) with CompileConfig(scope='block'), which move what is around the compiled code; for "
    "weights in eight bits, quant='fp8-weight-only'"
)
MOST_GRAPHS = 4
"""Of the whole step, for a step cache."""
_AROUND = (
    "patch_embed", "embedding_dropout", "time_embedding", "ofs_embedding", "modulation", "norm_final", "norm_out",
    "proj_out",
)  # fmt: skip
"""What begin and head run."""
_BUILT_OF = ("cogx_fast.model.", "torch.nn.")
"""Where the classes of that are written, where nobody has put others in their place."""


class CompiledRunner(Runner):
    """Runs a model with its parts compiled: one graph for each kind of block, and those of begin and of head.

    The latter two run as they are with gradients, and while something is attached to their modules.

    Args:
        slots: how each part of a step is done otherwise.
        model: whose blocks they are; it is not kept.
        compilation: how, and what it makes.
        compile: compiles a function.
        symbols: which sizes are symbolic.
        calls: how recompiles are told.
    """

    def __init__(
        self, slots: Slots, model: Any, *, compilation: Any, compile: Compile, symbols: Symbols, calls: Calls
    ) -> None:
        super().__init__(slots)
        self.compilation = compilation
        self._compile, self._symbols, self._calls = compile, symbols, calls
        self._pieces: dict[Any, tuple[Any, Any]] = {}
        self._begin = self._around(CogVideoXTransformer.begin, "begin", _own_begin, symbols.mark_begin)
        self._head = self._around(CogVideoXTransformer.head, "head", _own_head, symbols.mark_head)
        self._inside: list[Attached] | None = None
        self.follow_attached(model)

    def __call__(self, model: Any, inputs: Inputs) -> Tensor:
        """A step, compiled; under a caller's own ``torch.compile`` a part of that graph."""
        if is_traced():
            return run(model, self.slots, inputs)
        inputs = self._own(inputs)
        with self._calls.during(describe_call(model, inputs)):
            return self._run(model, inputs)

    def _run(self, model: CogVideoXTransformer, inputs: Inputs) -> Tensor:
        return run(model, self.slots, inputs)

    def _own(self, inputs: Inputs) -> Inputs:
        """With a mask of our own to mark; what else a block is given is made in each call."""
        mask = inputs.mask
        return inputs._replace(mask=_own(mask)) if isinstance(mask, Tensor) else inputs

    # -- what is attached ---------------------------------------------------------------------------------------------

    def follow_attached(self, model: CogVideoXTransformer) -> None:
        """Compile anew where something was attached inside what is compiled, or taken away: torch does not notice.

        Raises:
            AttachedError: (a ValueError) what moves or casts weights in there, which cannot be traced.
            RecompileError: the model was called before, and may not compile again (``strict``).
        """
        _refuse_patches(model)
        inside = self._attached_inside(model)
        placing = [replace(each, remedy=_INSTEAD) for each in inside if each.kind == "placing"]
        refuse(
            placing, f"{self._calls.what} cannot be compiled as one graph with what moves or casts weights inside it"
        )
        self._follow_around(model)
        if inside == self._inside:
            return
        if self._inside is not None and self._calls:
            there = f"there is now {named(inside)}" if inside else "nothing is there any more"
            self._calls.tell(
                f"{self._calls.what} compiles again: something was attached inside it or taken away ({there}). Attach "
                "it before the first call"
            )
        self._inside = inside
        self._prepare(model)

    def _attached_inside(self, model: CogVideoXTransformer) -> list[Attached]:
        """Hooks on a block run around its compiled code; those on what is in it are compiled with it."""
        return [each for name, block in _blocks(model) for each in on_modules(block, name, itself=False)]

    def _follow_around(self, model: CogVideoXTransformer) -> None:
        """Compile what stands around the blocks while it is as it was built: what was attached runs as it is."""
        parts = [part for name, part in model.named_children() if name in _AROUND]
        kinds = {type(module).__module__ for part in parts for module in part.modules()}
        if all(kind.startswith(_BUILT_OF) for kind in kinds) and not any(map(on_modules, parts)):
            self.slots = replace(self.slots, begin=self._begin, head=self._head)
        else:
            self.slots = replace(self.slots.eagerly(), call_block=self.slots.call_block)

    def _around(
        self,
        function: Callable[..., Any],
        name: str,
        own_arguments: Callable[..., tuple[Any, ...]],
        mark: Callable[..., None],
    ) -> Callable[..., Any]:
        pieces: dict[tuple[bool, ...], Piece] = {}

        def call(model: CogVideoXTransformer, *arguments: Any) -> Any:
            """By one graph for all sizes; with a schedule, an order of the tokens, or a stream that is no part of a
            longer one (head's, with tokens on several ranks), by another."""
            if is_traced() or torch.is_grad_enabled():
                return function(model, *arguments)
            tokens = arguments[0]
            is_whole = tokens.stride(0) == tokens.shape[1] * tokens.stride(1)
            given = (is_whole, *(argument is not None for argument in arguments))
            if given not in pieces:
                pieces.setdefault(given, Piece(function, name, self._compile, mark, self._calls, []))
            return pieces[given](model, *own_arguments(*arguments))

        return call

    def _prepare(self, model: CogVideoXTransformer) -> None:
        def compiled(block: nn.Module, inside: list[Attached]) -> Callable[..., Tensor]:
            pieces: dict[Any, Piece] = {}

            def compute(block: Block, x_BSD: Tensor, mod_B12D: Tensor, *rest: Any) -> Tensor:
                """By the one graph for all sizes; with tokens on several ranks there are up to four."""
                mask = rest[-1]
                key = mask.graph(x_BSD) if isinstance(mask, Exchange) else None
                if key not in pieces:
                    piece = Piece(Block.compute, "block", self._compile, self._symbols.mark_block, self._calls, inside)
                    pieces.setdefault(key, piece)
                if not mod_B12D.requires_grad:
                    mod_B12D = mod_B12D.detach()  # as ``_own``: no view of all the blocks' modulation
                result: Tensor = pieces[key](block, x_BSD, mod_B12D, *rest)
                return result

            return compute

        self.slots = replace(self.slots, call_block=CallWith(self._by_kind(model, compiled)))

    def _by_kind(self, model: CogVideoXTransformer, make: Callable[[nn.Module, list[Attached]], Any]) -> list[Any]:
        """For each block what was made for the first one of its kind, which is also what is attached inside it."""
        found = []
        for name, block in _blocks(model):
            inside = on_modules(block, name, itself=False)
            of_kind = ((each.where.removeprefix(name), each.what, id(each.object)) for each in inside)
            kind = kind_of(block), tuple(of_kind)
            if kind not in self._pieces:
                self._pieces[kind] = make(block, inside), inside  # kept, so that an id remains theirs
            found.append(self._pieces[kind][0])
        return found


class WholeRunner(CompiledRunner):
    """Runs a model as one graph, in which a kind of block is a region, compiled once (but for ``unrolled``).

    Under an attention plan it is not: the stream is then as long as two of the graph's sizes together, text and the
    plan's order of the video, and torch (2.13) does not find that sum among a region's inputs (``KeyError``).
    """

    def use(self, slots: Slots) -> None:
        """As ``Runner.use``.

        Raises:
            ValueError: a value cannot be part of a graph, or takes too many.
        """
        check_graphs(slots)
        super().use(slots)
        self._with_plan = replace(self.slots, call_block=call_eagerly)

    def _follow_around(self, model: CogVideoXTransformer) -> None:
        """It is in the one graph."""

    def _attached_inside(self, model: CogVideoXTransformer) -> list[Attached]:
        parts = [*model.named_children(), *_blocks(model)]
        return [each for name, part in parts if name != "transformer_blocks" for each in on_modules(part, name)]

    def _prepare(self, model: CogVideoXTransformer) -> None:
        self._with_plan = replace(self.slots, call_block=call_eagerly)
        if self.compilation is not None and not self.compilation.config.unrolled:
            self.slots = replace(self.slots, call_block=CallWith(self._by_kind(model, _region)))
        assert self._inside is not None
        self._by_pattern: dict[Pattern | None, Piece] = {}

    def _piece(self, pattern: Pattern | None) -> Piece:
        if pattern not in self._by_pattern:
            assert self._inside is not None
            function, mark = (run, self._mark) if pattern is None else (_run_pattern, self._mark_pattern)
            self._by_pattern[pattern] = Piece(function, "model", self._compile, mark, self._calls, self._inside)
        return self._by_pattern[pattern]

    def _mark(self, model: CogVideoXTransformer, slots: Slots, inputs: Inputs) -> None:
        self._symbols.mark_inputs(model, inputs)

    def _mark_pattern(
        self, model: CogVideoXTransformer, slots: Slots, inputs: Inputs, pattern: Pattern, *given: Tensor | None
    ) -> None:
        self._symbols.mark_inputs(model, inputs)
        self._symbols.mark_streams(model, given, half=pattern.conditional)

    def _run(self, model: CogVideoXTransformer, inputs: Inputs) -> Tensor:
        is_replayed = self._symbols.cuda_graphs and inputs.latents_BFCHW.is_cuda
        slots = self._with_plan if isinstance(inputs.mask, SparseBlocks) else self.slots
        step = slots.reuse.begin(model, inputs) if isinstance(slots.reuse, StepCache) else None
        inputs = own_tensors(inputs)
        if is_replayed:
            torch.compiler.cudagraph_mark_step_begin()
        if step is None or step.generation is None:
            slots = slots if step is None else replace(slots, reuse=compute_all)
            sample = cast(Tensor, self._piece(None)(model, slots, inputs))
        else:
            given = step.stand_in, step.difference
            sample, x_BSD, *starts = self._piece(step.pattern)(model, slots, inputs, step.pattern, *given)
            step.end(x_BSD, starts)
        return sample.clone() if is_replayed else sample  # the next replay writes over what was recorded


def _run_pattern(
    model: CogVideoXTransformer,
    slots: Slots,
    inputs: Inputs,
    pattern: Pattern,
    stand_in: Tensor | None,
    difference: Tensor | None,
) -> tuple[Tensor, ...]:
    """A step of a step cache: the prediction, then what ``Step.end`` is told."""
    streams: list[Tensor] = []

    def follow(compute: ComputeBlocks, x_BSD: Tensor, *_: Any) -> Tensor:
        x_BSD, starts = pattern.compute(compute, x_BSD, stand_in, difference)
        streams.extend([x_BSD, *starts])
        return x_BSD

    sample = run(model, slots, inputs, follow)
    return sample, *streams


def _region(block: nn.Module, inside: list[Attached]) -> Callable[..., Any] | None:
    """A block as a region of a graph; None for quantized weights, for which torch has no rule there (2.13)."""
    if any(hasattr(tensor, "__tensor_flatten__") for tensor in block.parameters()):
        return None
    return cast(Callable[..., Any], torch.compiler.nested_compile_region(own(Block.compute, "block")))


def _refuse_patches(model: CogVideoXTransformer) -> None:
    """A block's ``forward`` is told what computes the block; one of the caller's own has to pass that on."""
    found = []
    for name, block in _blocks(model):
        patch = patched_forward(block)
        if patch is not None and not _takes_compute(patch):
            remedy = "let it take **options and pass them to the forward that it stands for"
            found.append(Attached(name, f"a forward of its own ({name_of(patch)})", remedy, "patch"))
    refuse(found, "a compiled block is called with compute=..., which this does not take")


def _takes_compute(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == "compute" or each.kind is each.VAR_KEYWORD for each in parameters)


def _blocks(model: CogVideoXTransformer) -> list[tuple[str, nn.Module]]:
    return [(f"transformer_blocks.{name}", block) for name, block in model.transformer_blocks.named_children()]


def own_tensors(inputs: Inputs) -> Inputs:
    """The same values in objects of our own to mark, laid out the same way whatever the caller's strides."""
    return inputs._replace(
        latents_BFCHW=_own(inputs.latents_BFCHW.contiguous()),
        text_BTE=_own(inputs.text_BTE.contiguous()),
        timestep_B=_per_video(inputs.timestep_B),
        ofs_B=None if inputs.ofs_B is None else _per_video(inputs.ofs_B),
    )


def check_graphs(slots: Slots) -> None:
    """Raise ``StepCacheError`` for a step cache that takes too many graphs of the whole step."""
    if isinstance(slots.reuse, StepCache):
        slots.reuse.check_patterns(MOST_GRAPHS)


def _own_begin(
    patches_BVP: Tensor, text_BTE: Tensor, timestep_B: Tensor, ofs_B: Tensor | None, *ours: Any
) -> tuple[Any, ...]:
    """What begin is given in objects of our own to mark; positions, order and conditioning are."""
    times = _per_video(timestep_B), None if ofs_B is None else _per_video(ofs_B)
    return _own(patches_BVP), _own(text_BTE.contiguous()), *times, *ours


def _own_head(x_BVD: Tensor, out_B2D: Tensor) -> tuple[Any, ...]:
    return _own(x_BVD), out_B2D


def _own(tensor: Tensor) -> Tensor:
    """The same memory in another object. No view, where that can be: of a view torch compares the sizes of what it is
    of, too, which are not marked."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


def _per_video(tensor_B: Tensor) -> Tensor:
    """A number for each video as fp32, which is what it is read as, one after the other in memory."""
    return tensor_B.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


__all__ = ["CompiledRunner", "WholeRunner", "check_graphs", "own_tensors"]
