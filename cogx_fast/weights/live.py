"""A live model as a store of weights: shared where they can be, never standing twice."""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cogx_fast.config import UPSTREAM_CLASS, TransformerConfig
from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.checks import check_dtype, check_values, finite
from cogx_fast.weights.errors import CheckpointError, some
from cogx_fast.weights.foreign import bare_names, refuse_kinds, unwrapping
from cogx_fast.weights.headers import NAMES
from cogx_fast.weights.layout import Slot, by_our_name, our_shape, slots
from cogx_fast.weights.quantized import Found, check_alike, is_quantized, recipe_text, taken

_GIVEN_UP = "_cogx_fast_gave_its_weights"


class LiveStore:
    """The weights of a diffusers ``CogVideoXTransformer3DModel``, or of one of our own (``assemble.Store``).

    Where dtype and device stay, both models share their memory afterwards: tensors that are the same in both are the
    same storage, and where ours is one tensor for several of diffusers' it is made once and the source's parameters
    become views of it, so the source keeps working. (Training one changes the other.) Where dtype or device change,
    the weights are copied and the source is left as it is.

    Args:
        source: the model.
        check_attached: looks at what is on the source beside its weights, and raises.
        keep: the source keeps its weights whatever a transform replaces; else each is given up as soon as the new one
            is there, and the source cannot be used any more.

    Raises:
        CheckpointError: another kind of model, or one whose weights cannot be taken; the message says what to do.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        check_attached: Callable[[nn.Module, TransformerConfig], None] | None = None,
        keep: bool = True,
    ) -> None:
        self._given, self._source = source, getattr(source, "_orig_mod", source)  # inside torch.compile's wrapper
        self._check_attached, self._keep = check_attached, keep
        self.config = model_config(self._source)
        self.origin = f"the given {type(self._source).__name__}"
        if getattr(self._source, _GIVEN_UP, False):
            raise CheckpointError(
                f"{self.origin} gave its weights up to the model that was made of it: use that one, or load it anew"
            )
        self._ours = isinstance(self._source, CogVideoXTransformer)
        self._tensors = plain_tensors(self._source, self.origin)
        self.found: Found = (
            _found(self._tensors, self.config, self.origin)
            if self._ours
            else {name: _kind(tensor) for name, tensor in self._tensors.items()}
        )
        self.recipe = recipe_text(self._source)

    @functools.cached_property
    def _parts(self) -> dict[str, list[Tensor]]:
        """What each of our tensors is made of."""
        groups = by_our_name(slots(self.config))
        if self._ours:
            return {name: [self._tensors[name]] for name in groups}
        return {name: [self._tensors[slot.name] for slot in group] for name, group in groups.items()}

    @property
    def quantized(self) -> dict[str, torch.dtype]:
        """As ``Store`` says."""
        return {name: parts[0].dtype for name, parts in self._parts.items() if is_quantized(parts[0])}

    @property
    def device(self) -> torch.device:
        """The one device that all its weights are on.

        Raises:
            CheckpointError: they are on several.
        """
        return _one_device(self._tensors.values(), self.origin)

    def check(self, layout: Mapping[str, Slot], dtype: torch.dtype | None, *, finite: bool) -> None:
        """See that the weights can be taken, and that nothing else on the source would be lost.

        Raises:
            CheckpointError, AttachedError: (ValueErrors) what stands in the way.
        """
        _check_quantized(self._parts, dtype, self.origin)
        if self._check_attached is not None:
            self._check_attached(self._given, self.config)
        if finite and self._ours:
            check_values(self._source, layout, self.origin)
        elif finite:
            _check_upstream_values(self._tensors, layout, self.origin)

    def read(
        self, names: Mapping[str, list[Slot]], dtypes: Mapping[str, torch.dtype], device: torch.device, *, stay: bool
    ) -> dict[str, tuple[Tensor, bool]]:
        """Our tensors: shared where they can be."""
        found = {}
        for name, group in names.items():
            parts = self._parts[name]
            if is_quantized(parts[0]):
                tensor = taken(name, parts, device)
            else:
                tensor = _take(parts, group, our_shape(self.config, group), dtypes[name], device)
            found[name] = tensor, any(part.requires_grad for part in parts)
        return found

    def check_read(self, model: nn.Module, names: Mapping[str, list[Slot]]) -> None:
        """Nothing is left to check."""

    def give_up(self, names: Iterable[str]) -> None:
        """Empty the source's tensors of these names of ours, unless it is to keep them."""
        if self._keep:
            return
        for name in names:
            setattr(self._source, _GIVEN_UP, True)
            for part in self._parts[name]:
                part.data = part.data.new_empty(0)


def model_config(source: nn.Module) -> TransformerConfig:
    """The configuration of a live model.

    Raises:
        CheckpointError: it is no CogVideoX transformer.
        ConfigError: its configuration is none that this package can build.
    """
    known = {kind.__name__ for kind in type(source).__mro__}
    config: Any = getattr(source, "config", None)
    if isinstance(config, TransformerConfig):
        return config
    if UPSTREAM_CLASS not in known or not isinstance(config, Mapping):
        remedy = unwrapping(known) or "pass the pipeline's transformer, or where its files are"
        raise CheckpointError(f"got a {type(source).__name__}, expected diffusers' {UPSTREAM_CLASS}: {remedy}")
    fields = inspect.signature(type(source).__init__).parameters
    added = {key: value for key, value in config.items() if key not in fields and not key.startswith("_")}
    added.pop("quantization_config", None)
    if "_name_or_path" in config:
        added["_name_or_path"] = config["_name_or_path"]
    own = {key: value for key, value in config.items() if key not in added}
    return TransformerConfig.from_dict(own, origin=f"the config of the given {type(source).__name__}").register(**added)


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype))


def _found(tensors: Mapping[str, Tensor], config: TransformerConfig, origin: str) -> Found:
    """The tensors of a model of ours as diffusers would have them."""
    check_ours(tensors, config, origin)
    return {slot.name: (slot.shape, _kind(tensors[slot.our_name])[1]) for slot in slots(config).values()}


def check_ours(tensors: Mapping[str, Tensor], config: TransformerConfig, origin: str) -> None:
    """Raise ``CheckpointError`` where tensors by our names are not those of a configuration."""
    expected = {name: our_shape(config, group) for name, group in by_our_name(slots(config)).items()}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = [name for name in expected | actual if expected.get(name) != actual.get(name)]
    if different:
        raise CheckpointError(
            f"{origin}: {len(different)} tensors are not those of its config: {some(different)}. A model that was "
            "changed after loading (baked, with adapters) cannot be written or taken as it is: load it anew"
        )


def plain_tensors(source: nn.Module, origin: str) -> dict[str, Tensor]:
    """What the source's checkpoint would hold, as the parameters and buffers themselves, quantized or not."""
    processors = {name: getattr(module, "processor", None) for name, module in source.named_modules()}
    fused = [name for name, processor in processors.items() if type(processor).__name__.startswith("Fused")]
    if fused:
        raise CheckpointError(
            f"{origin}: its projections are fused ({some(fused, 1)}): call unfuse_qkv_projections() first"
        )
    persistent = source.state_dict().keys()
    both = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers(remove_duplicate=False))
    bare = bare_names(persistent)  # parts may be wrapped by torch.compile
    tensors = {bare[name]: tensor for name, tensor in both.items() if name in persistent}
    if not isinstance(source, CogVideoXTransformer):  # unfusing leaves the fused copies behind
        tensors = {name: tensor for name, tensor in tensors.items() if ".attn1.to_qkv." not in name}
    plain = (Tensor, nn.Parameter, nn.Buffer)
    tensors = _under_adapters(source, tensors, origin)
    refuse_kinds({n: t for n, t in tensors.items() if type(t) not in plain and not is_quantized(t)}, origin)
    absent = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if absent:
        raise CheckpointError(
            f"{origin}: {some(absent, 2)} hold no values (meta device): call pipe.remove_all_hooks() if the model is "
            "offloaded, or load it with weights"
        )
    return tensors


def _under_adapters(source: nn.Module, tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The weights that PEFT's adapters stand around, by their names without them; every adapter must be merged."""
    layers: dict[str, Any] = {
        name: module
        for name, module in source.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "merged_adapters")
    }
    loose = {
        adapter: name
        for name, layer in layers.items()
        for adapter in layer._all_available_adapter_names()
        if adapter not in layer.merged_adapters or layer.disable_adapters
    }
    if loose:
        raise CheckpointError(
            f"{origin}: adapters that are not merged are on it: {some(loose)} (e.g. on {min(loose.values())}). Call "
            "pipe.fuse_lora() (after pipe.enable_lora() if they are disabled), or pipe.unload_lora_weights() to do "
            "without them"
        )
    for name in layers:
        for tensor in [each for each in tensors if each.startswith(f"{name}.")]:
            values = tensors.pop(tensor)
            if tensor.startswith(f"{name}.base_layer."):
                tensors[tensor.replace(".base_layer.", ".", 1)] = values
    return tensors


def _check_quantized(parts: Mapping[str, list[Tensor]], dtype: torch.dtype | None, origin: str) -> None:
    """Raise ``CheckpointError`` where quantized weights cannot be taken, or not in that dtype."""
    for name, several in parts.items():
        quantized = [part for part in several if is_quantized(part)]
        if not quantized:
            continue
        check_dtype(name, quantized[0].dtype, dtype, origin)
        if len(quantized) < len(several):
            raise CheckpointError(
                f"{origin}: of what is {name} here some weights are quantized and some are not: load the original "
                "checkpoint and quantize it here"
            )
        check_alike(name, several, origin)


def _one_device(tensors: Any, origin: str) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise CheckpointError(
            f"{origin}: its weights are on several devices ({names}): pass device=... to bring them to one"
        )
    return devices.pop()


def return_freed_memory() -> None:
    """Have glibc give back to the system what freed tensors held; it keeps smaller blocks otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@torch.no_grad()
def _take(
    parts: list[Tensor], group: list[Slot], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Our tensor of the source's: shared, or made once and shared back, or copied."""
    stays = all(part.dtype == dtype and part.device == device for part in parts)
    if stays and len(parts) == 1 and parts[0].is_contiguous():
        return parts[0].detach().view(shape)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    views = [tensor] if len(parts) == 1 else [slot.view(tensor) for slot in group]
    for part, view in zip(parts, views, strict=True):
        view.copy_(part.view(view.shape) if len(parts) == 1 else part)
        if stays:
            part.data = view.view(part.shape)
    return tensor


def _check_upstream_values(tensors: Mapping[str, Tensor], layout: Mapping[str, Slot], origin: str) -> None:
    bad = [name for name in layout if not finite(tensors[name])]
    if bad:
        raise CheckpointError(f"{origin}: {len(bad)} tensors hold infinite or NaN weights: {some(bad)}")


__all__ = ["LiveStore", "check_ours", "model_config", "plain_tensors", "return_freed_memory"]
