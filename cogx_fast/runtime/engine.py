"""The compiled model: symbolic sizes from the first call on, one graph for each kind of block, recompiles explained.

Suffixes: B batch, F latent frames, C channels, H/W latent height/width, S joint tokens, T text tokens, D model width.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogx_fast.model.attention import Mask, Rotary
from cogx_fast.model.masks import LayerBlocks, SparseBlocks
from cogx_fast.model.transformer import Block, CogVideoXTransformer
from cogx_fast.runtime.cachedir import CacheDirectory
from cogx_fast.runtime.candidates import drop_garbage
from cogx_fast.runtime.flags import Flags
from cogx_fast.runtime.watch import Call, RecompileError, RecompileWarning, explain_recompile, show_progress

if TYPE_CHECKING:
    from cogx_fast.runtime.module import CogVideoXModel

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

_RECOMPILE_LIMIT = 256
"""Graphs kept for one kind of block: every size of a long session with ``dynamic=False`` (torch's own limit is 8)."""
_BATCH_HINT = 2
"""The batch that kernels are tuned for where the graph holds for every batch; guidance doubles a batch of one."""

_serial = itertools.count()
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
        self._whole = compile(own(CogVideoXTransformer.forward)) if whole else None
        kinds: dict[Any, Callable[..., Any]] = {}
        for block in model.transformer_blocks:
            # torch has no rule for a region whose inputs are tensor subclasses (2.13): these are part of the graph
            if whole and (not nested or any(hasattr(tensor, "__tensor_flatten__") for tensor in block.parameters())):
                continue
            kind = kind_of(block)
            if kind not in kinds:
                forward = own(Block.forward)
                kinds[kind] = torch.compiler.nested_compile_region(forward) if whole else compile(forward)
            run = kinds[kind] if whole else functools.partial(self._run_block, kinds[kind])
            block.forward = functools.partial(run, block)

    def remove(self) -> None:
        """Give the blocks their own ``forward`` back."""
        for block in self._model.transformer_blocks:
            block.__dict__.pop("forward", None)

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
        compiled: Callable[..., Tensor],
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
        what = "the model" if self._whole else "the block"
        known = any(call.settings == earlier.settings for earlier in self._earlier) if self._dynamic else False
        with ExitStack() as stack:
            if not known and call not in self._earlier:
                stack.enter_context(_compiling)
            stack.enter_context(self._cache_directory.used())
            stack.enter_context(_flags().held())
            stack.enter_context(show_progress(what))
            yield
            if call not in self._earlier:
                self._earlier.append(call)

    def _run(self, compiled: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The compiled function, with a recompile explained and a cache directory that fails replaced."""
        from torch._dynamo.exc import RecompileError as TorchRecompileError

        run = functools.partial(self._cache_directory.retried, compiled, *arguments)
        with contextlib.suppress(TorchRecompileError):
            return self._without_garbage(run())
        with _compiling:
            try:
                return run()  # what this call needs may have been compiled by another thread meanwhile
            except TorchRecompileError as error:
                self._tell(str(error))
            import torch._dynamo.config as dynamo

            with dynamo.patch(error_on_recompile=False):
                return self._without_garbage(run())

    def _without_garbage(self, output: Tensor) -> Tensor:
        recorder = self._model._recorder
        if recorder is not None and recorder.has_timed:
            recorder.has_timed = False
            drop_garbage(output.device)
        return output

    def _tell(self, guards: str) -> None:
        what = "the model" if self._whole else "the block"
        call: Call | None = getattr(self._running, "call", None)
        if call is None:
            message = f"{what} compiles again outside of a call of the model: {guards}"
        else:
            message = explain_recompile(call, self._earlier, guards, what=what, dynamic=self._dynamic)
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


# -- kinds of block ---------------------------------------------------------------------------------------------------


def kind_of(block: nn.Module) -> Any:
    """Equal for blocks that one graph holds for: the same modules with weights of the same types, dtypes and shapes.

    So a model whose blocks are quantized in different ways has as many graphs as ways, and none counts as a recompile.
    """
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    tensors = itertools.chain(block.named_parameters(), block.named_buffers())
    return modules, tuple((name, tensor.requires_grad, *_kind_of_tensor(tensor)) for name, tensor in tensors)


def _kind_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    kind: tuple[Any, ...] = (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)  # a subclass that holds other tensors: quantized ones
    if flatten is not None:
        names, context = flatten()
        inner = ((name, getattr(tensor, name)) for name in names)
        kind += (repr(context), tuple((name, _kind_of_tensor(value)) for name, value in inner))
    return kind


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


def own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object and a name of its own.

    Dynamo keeps what it compiled and counts recompiles by code object, and remembers which sizes changed by the
    function's name: so each kind of block of each model has its own, and none starts with the limits or sizes of
    another of the process.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{next(_serial)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, None, function.__closure__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copy


__all__ = ["Engine", "kind_of", "own"]
