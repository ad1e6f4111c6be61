"""The compiled model: symbolic sizes from the first call on, one graph for each kind of block, recompiles explained.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens, T text tokens, D model width.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cogx_fast.model.attention import Mask, Rotary
from cogx_fast.model.backends import lacks_bf16
from cogx_fast.model.masks import LayerBlocks, SparseBlocks
from cogx_fast.model.transformer import Block, CogVideoXTransformer
from cogx_fast.runtime.attached import Attached, AttachedError, named, on_module, on_modules, refuse
from cogx_fast.runtime.cachedir import CacheDirectory
from cogx_fast.runtime.flags import Flags
from cogx_fast.runtime.kinds import kind_of, own
from cogx_fast.runtime.watch import Call, RecompileError, RecompileWarning, explain_recompile, show_progress

if TYPE_CHECKING:
    from cogx_fast.runtime.module import CogVideoXModel

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

_RECOMPILE_LIMIT = 256
"""Graphs kept for one kind of block: every size of a long session with ``dynamic=False`` (torch's own limit is 8)."""
_BATCH_HINT = 2
"""The batch that kernels are tuned for where the graph holds for every batch; guidance doubles a batch of one."""

_INSTEAD = (
    "use compile=False, pipe.enable_model_cpu_offload(), or enable_group_offload(offload_type='block_level', "
    "num_blocks_per_group=1) with CompileConfig(scope='block'), which move what is around the compiled code; for "
    "weights in eight bits, quant='fp8-weight-only'"
)
_compiling = threading.RLock()
"""Held by the one thread of the process that compiles; calls of what is compiled do not take it."""


@functools.cache
def _flags() -> Flags:
    import torch._dynamo.config as dynamo

    return Flags(dynamo, {"error_on_recompile": True, "recompile_limit": _RECOMPILE_LIMIT})


class Engine:
    """Runs a model compiled; ``CogVideoXModel.forward`` calls it in the traced forward's place.

    Args:
        model: whose blocks (or whole forward) are compiled; the blocks' ``forward`` is replaced.
        compile: ``torch.compile`` with everything but the function.
        whole: compile the whole forward instead of the block.
        nested: with ``whole``: blocks of a kind are one region of the graph, compiled once.
        dynamic: sizes are symbolic.
        strict: a recompile is an error.
        cuda_graphs: the call is recorded and replayed: batch is an ordinary symbol, outputs are copied.
        cache_directory: where torch keeps what it compiles.
    """

    def __init__(
        self,
        model: CogVideoXModel,
        compile: Compile,
        *,
        whole: bool,
        nested: bool,
        dynamic: bool,
        strict: bool,
        cuda_graphs: bool,
        cache_directory: CacheDirectory,
    ) -> None:
        self._model = model
        self._dynamic, self._strict, self._cuda_graphs = dynamic, strict, cuda_graphs
        self._running = threading.local()
        self._earlier: list[Call] = []
        self._quantizes_activations = _quantizes_activations(model)
        self._cache_directory = cache_directory
        self._compile, self._scope_is_model, self._nested = compile, whole, nested
        self._whole: Callable[..., Any] | None = None
        self._kinds: dict[Any, tuple[Callable[..., Any], Any]] = {}
        self._functions: list[Callable[..., Any] | None] = []
        self._put: list[Any] = [None] * len(model.transformer_blocks)
        self._inside: list[Attached] = []
        self._refuse_wrapped()
        self.follow_attached()

    def remove(self) -> None:
        """Give the blocks their own ``forward`` back.

        Raises:
            AttachedError: (a ValueError) something was put over it.
        """
        self._refuse_wrapped()
        for _, block in self._blocks():
            block.__dict__.pop("forward", None)

    def _blocks(self) -> list[tuple[str, Block]]:
        blocks = self._model.transformer_blocks.named_children()
        return [(f"transformer_blocks.{name}", cast(Block, block)) for name, block in blocks]

    def _refuse_wrapped(self) -> None:
        blocks = zip(self._blocks(), self._put, strict=True)
        wrapped = [(name, block) for (name, block), put in blocks if vars(block).get("forward") not in (None, put)]
        found = [each for name, block in wrapped for each in on_module(block, name) if each.kind != "module"]
        refuse(
            [replace(each, remedy="take it away first, and put it there again afterwards") for each in found],
            "compiling, or running eagerly again, replaces what stands over a block's forward",
        )
        for _, block in wrapped:
            del block.__dict__["forward"]  # its class's own, which a hook that was removed leaves behind

    # -- what is attached ---------------------------------------------------------------------------------------------

    def follow_attached(self) -> None:
        """Compile anew where something was attached inside what is compiled, or taken away: torch does not notice.

        Raises:
            AttachedError: (a ValueError) what moves or casts weights in there, which cannot be traced.
            RecompileError: the model was called before, and may not compile again (``strict``).
        """
        inside = [
            each for name, block in self._blocks() for each in on_modules(block, name, itself=self._scope_is_model)
        ]
        if self._scope_is_model:
            rest = (item for item in self._model.named_children() if item[0] != "transformer_blocks")
            inside += [each for name, part in rest for each in on_modules(part, name)]
        placing = [replace(each, remedy=_INSTEAD) for each in inside if each.kind == "placing"]
        refuse(placing, f"{self._what} cannot be compiled as one graph with what moves or casts weights inside it")
        changed = inside != self._inside
        if self._functions and not changed:
            return
        if changed and self._earlier:
            there = f"there is now {named(inside)}" if inside else "nothing is there any more"
            self._tell(
                f"{self._what} compiles again: something was attached inside it or taken away ({there}). Attach it "
                "before the first call"
            )
        self._inside = inside
        if self._scope_is_model:
            self._whole = self._compile(own(CogVideoXTransformer.forward))
        self._functions = [self._function(block) for _, block in self._blocks()]
        for layer, (_, block) in enumerate(self._blocks()):
            function = self._functions[layer]
            if function is None or vars(block).get("forward") is not self._put[layer]:
                continue  # part of the whole, or wrapped by what goes on calling it
            if self._scope_is_model:
                self._put[layer] = block.__dict__["forward"] = functools.partial(function, block)
            elif self._put[layer] is None:
                self._put[layer] = block.__dict__["forward"] = functools.partial(self._run_block, layer, block)

    def _function(self, block: Block) -> Callable[..., Any] | None:
        """The function of a block's kind, which is also what is attached inside it; None: it is part of the whole."""
        # torch has no rule for a region whose inputs are tensor subclasses (2.13): these are part of the graph
        subclasses = any(hasattr(tensor, "__tensor_flatten__") for tensor in block.parameters())
        if self._scope_is_model and (subclasses or not self._nested):
            return None
        inside = on_modules(block, itself=False)
        kind = (kind_of(block), tuple((each.where, each.what, id(each.object)) for each in inside))
        if kind not in self._kinds:
            forward = own(Block.forward)
            region = torch.compiler.nested_compile_region(forward) if self._scope_is_model else self._compile(forward)
            self._kinds[kind] = region, inside  # kept, so that an id remains theirs
        return self._kinds[kind][0]

    # -- calls --------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        latents_BFCHW: Tensor,
        text_BTE: Tensor,
        timestep_B: Tensor,
        ofs_B: Tensor | None = None,
        rotary: Rotary | None = None,
        position_1SD: Tensor | None = None,
        mask: Mask | SparseBlocks = None,
    ) -> Tensor:
        """As ``CogVideoXTransformer.forward``."""
        if torch.compiler.is_compiling():  # under the caller's own torch.compile
            return CogVideoXTransformer.forward(
                self._model, latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask
            )
        if isinstance(mask, Tensor):
            mask = mask.view_as(mask)  # the caller's own is not marked
        with self._session(self._describe(latents_BFCHW, text_BTE, mask)):
            if self._whole is None:
                return CogVideoXTransformer.forward(
                    self._model, latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask
                )
            latents_BFCHW, text_BTE = _fresh(latents_BFCHW), _fresh(text_BTE)
            timestep_B = _per_video(timestep_B)
            ofs_B = None if ofs_B is None else _per_video(ofs_B)
            self._mark((latents_BFCHW, text_BTE, timestep_B, ofs_B), batch=True)
            self._mark((latents_BFCHW,), 1, 3, 4)
            self._mark((text_BTE, position_1SD), 1)
            self._mark_tokens(rotary, mask)
            if not (self._cuda_graphs and latents_BFCHW.is_cuda):
                return self._run(
                    self._whole, self._model, latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask
                )
            torch.compiler.cudagraph_mark_step_begin()
            sample = self._run(
                self._whole, self._model, latents_BFCHW, text_BTE, timestep_B, ofs_B, rotary, position_1SD, mask
            )
            return sample.clone()  # the next replay writes over what was recorded

    def _run_block(
        self,
        layer: int,
        block: Block,
        x_BSD: Tensor,
        mod_B12D: Tensor,
        is_text_S1: Tensor,
        rotary: Rotary | None,
        mask: Mask | LayerBlocks,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return Block.forward(block, x_BSD, mod_B12D, is_text_S1, rotary, mask)
        self._mark((x_BSD, mod_B12D), batch=True)
        self._mark((x_BSD,), 1)
        self._mark((is_text_S1,), 0)
        self._mark_tokens(rotary, mask)
        compiled = self._functions[layer]
        assert compiled is not None
        return self._run(compiled, block, x_BSD, mod_B12D, is_text_S1, rotary, mask)

    # -- symbolic sizes -----------------------------------------------------------------------------------------------

    def _mark(self, tensors: tuple[Tensor | None, ...], *dims: int, batch: bool = False) -> None:
        """Have torch take these dimensions as symbols when it compiles; ``batch``: dimension 0 is B.

        An ordinary symbol is never 1: torch compiles sizes of 1 apart. So B is an unbacked one, which holds for 1 too
        (measured: benchmarks/NOTES.md) and of which torch must know that it is not 0: quantizing of activations asks.
        CUDA graphs are not recorded with unbacked symbols; there B = 1 is apart. So it is with quantized activations in
        versions of torch that cannot be told.
        """
        if not self._dynamic:
            return
        from torch._dynamo.decorators import mark_dynamic, mark_unbacked

        for tensor in tensors:
            if tensor is None:
                continue
            if batch and not self._is_one_apart(tensor.device):
                mark_unbacked(tensor, 0, hint_override=_BATCH_HINT, shape_id="batch", **_batch_bounds(mark_unbacked))
            elif batch:
                mark_dynamic(tensor, 0)
            if dims and getattr(tensor, "_dynamo_dynamic_indices", None) != {*dims}:
                mark_dynamic(tensor, list(dims))

    def _is_one_apart(self, device: torch.device) -> bool:
        from torch._dynamo.decorators import mark_unbacked

        if self._cuda_graphs and device.type == "cuda":
            return True
        return self._quantizes_activations and not _batch_bounds(mark_unbacked)

    def _mark_tokens(self, rotary: Rotary | None, mask: Mask | LayerBlocks | SparseBlocks) -> None:
        self._mark(rotary or (), 0)
        if isinstance(mask, LayerBlocks | SparseBlocks):
            self._mark((mask.counts_PQ,), 1)
            self._mark((mask.columns_PQQ,), 1, 2)
        if isinstance(mask, SparseBlocks):
            self._mark(tuple(mask.order), 0)
        if isinstance(mask, Tensor):
            self._mark((mask,), *(dim for dim in (2, 3) if mask.shape[dim] > 1), batch=True)

    # -- one call -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _session(self, call: Call) -> Iterator[None]:
        """What holds during a call, and only then: torch's flags, the progress line, the cache directory.

        A call that may compile, the first of its kind, is alone: torch takes what one thread compiles while another
        waits for the same for a recompile.
        """
        self._running.call = call
        known = any(call.settings == earlier.settings for earlier in self._earlier) if self._dynamic else False
        with ExitStack() as stack:
            if not known and call not in self._earlier:
                self._check_dtype(call)
                stack.enter_context(_compiling)
            stack.enter_context(self._cache_directory.used())
            stack.enter_context(_flags().held())
            stack.enter_context(show_progress(self._what))
            yield
            if call not in self._earlier:
                self._earlier.append(call)

    def _check_dtype(self, call: Call) -> None:
        """Inductor leaves bf16 alone there, which fails as a graph break in words of Dynamo's."""
        device, dtype = call.settings["device"], call.settings["the weights' dtype"]
        if self._model._recorder is not None and dtype == torch.bfloat16 and lacks_bf16(device):
            raise ValueError(
                f"the model is in bfloat16 on {torch.cuda.get_device_name(device)}, for which torch compiles none "
                "(compute capability 8.0 is needed): load it with dtype='fp16', or without compile"
            )

    def _run(self, compiled: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The compiled function, with a recompile explained and a cache directory that fails replaced."""
        from torch._dynamo.exc import RecompileError as TorchRecompileError
        from torch._dynamo.exc import Unsupported

        run = functools.partial(self._cache_directory.retried, compiled, *arguments)
        try:
            with contextlib.suppress(TorchRecompileError):
                return run()
            with _compiling:
                try:
                    return run()  # what this call needs may have been compiled by another thread meanwhile
                except TorchRecompileError as error:
                    self._tell(self._explain(str(error)))
                import torch._dynamo.config as dynamo

                with dynamo.patch(error_on_recompile=False):
                    return run()
        except Unsupported as error:
            if not self._inside:
                raise
            raise AttachedError(
                f"{self._what} cannot be compiled as one graph with what is attached inside it: "
                f"{named(self._inside)}. What to do: use compile=False; or write it so that torch can trace it. "
                f"torch's reason: {error}"
            ) from error

    @property
    def _what(self) -> str:
        return "the model" if self._scope_is_model else "the block"

    def _explain(self, guards: str) -> str:
        call: Call | None = getattr(self._running, "call", None)
        if call is None:
            return f"{self._what} compiles again outside of a call of the model: {guards}"
        return explain_recompile(call, self._earlier, guards, what=self._what, dynamic=self._dynamic)

    def _tell(self, message: str) -> None:
        if self._strict:
            raise RecompileError(f"{message}. This is an error because of CompileConfig(strict=True)")
        warnings.warn(message, RecompileWarning, stacklevel=2)

    def _describe(self, latents_BFCHW: Tensor, text_BTE: Tensor, mask: Mask | SparseBlocks) -> Call:
        model = self._model
        weight = next(model.parameters())
        sizes: dict[str, Any] = {
            "hidden_states' size": tuple(latents_BFCHW.shape),
            "encoder_hidden_states' size": tuple(text_BTE.shape),
        }
        settings: dict[str, Any] = {
            "hidden_states' dtype": latents_BFCHW.dtype,
            "encoder_hidden_states' dtype": text_BTE.dtype,
            "device": latents_BFCHW.device,
            "attention_mask": _kind_of_mask(mask),
            "grad mode": "inference"
            if torch.is_inference_mode_enabled()
            else "on"
            if torch.is_grad_enabled()
            else "off",
            "a gradient of hidden_states": latents_BFCHW.requires_grad,
            "a gradient of encoder_hidden_states": text_BTE.requires_grad,
            "autocast": torch.is_autocast_enabled(latents_BFCHW.device.type),
            "training mode": model.training,
            "attention backend": ", ".join(model.attention_backends),
            "the weights' dtype": weight.dtype,
            "a gradient of the weights": weight.requires_grad,
        }
        return Call(sizes=sizes, settings=settings)


def _kind_of_mask(mask: Mask | SparseBlocks) -> str:
    if mask is None:
        return "None"
    if not isinstance(mask, Tensor):
        return type(mask).__name__
    return f"{mask.dtype} of " + " × ".join(
        name if size > 1 else "1" for name, size in zip("BNSS", mask.shape, strict=True)
    )


def _fresh(tensor: Tensor) -> Tensor:
    """The same values, laid out the same way whatever the caller's strides, in an object of our own to mark."""
    return tensor.contiguous().view_as(tensor)


def _per_video(tensor_B: Tensor) -> Tensor:
    """A number for each video as fp32, which is what it is read as, one after the other in memory."""
    return tensor_B.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _quantizes_activations(model: nn.Module) -> bool:
    """Whether a weight is quantized in another way than torchao's weight-only ones, which say so."""
    missing = object()
    subclasses = (tensor for tensor in model.parameters() if hasattr(tensor, "__tensor_flatten__"))
    return any(getattr(tensor, "act_quant_kwargs", missing) is not None for tensor in subclasses)


@functools.cache
def _batch_bounds(mark_unbacked: Callable[..., None]) -> dict[str, int]:
    """That a batch is 1 or more, and no more than cuDNN's attention takes, as arguments of torch's ``mark_unbacked``.

    Quantizing of activations asks the one, torch 2.13's choice between attention kernels the other; 2.11 cannot be
    told either, and asks for neither but with quantized activations.
    """
    return {"min": 1, "max": 65535} if "min" in inspect.signature(mark_unbacked).parameters else {}


__all__ = ["Engine"]
