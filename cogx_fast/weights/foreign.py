"""What is no plain checkpoint of this model, said to be what it is: adapters, quantized weights, wrapped names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from cogx_fast.weights.errors import CheckpointError, some
from cogx_fast.weights.headers import FLOATING

Found = Mapping[str, tuple[tuple[int, ...], str]]

_ADAPTER = re.compile(r"lora_|\.base_layer\.|^base_model\.|\.hada_|\.modules_to_save\.")
_SAT = re.compile(r"(^|\.)mixins\.|\.query_key_value\.")
_WRAPPED = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before the names of what they wrap, anywhere in a name."""
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.")
"""What programs put before all names of a model: the original code and ComfyUI, pipelines, DDP, trainers."""
_BEFORE_BLOCKS = re.compile(r"(?!base_model\.)(.*?\.)??(?=(?:transformer_blocks|patch_embed)\.)")
"""Whatever else stands before the names of the parts that every transformer has (not PEFT's, which says more)."""

_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.absmax|\.quant_map|\.nested_absmax|quant_state|bitsandbytes|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.weight\._data$|\.weight\._scale$|\.weight\._packed|\.weight\._shift$"), "quanto"),
    (re.compile(r"\.qweight$|\.qzeros$|\.g_idx$"), "GPTQ or AWQ"),
    (re.compile(r"scaled_fp8|\.scale_weight$|\.scale_input$"), "ComfyUI (scaled fp8)"),
    (re.compile(r"\.weight_scale(_inv|_2)?$|\.input_scale$|\.weight_packed$"), "compressed-tensors or ModelOpt"),
    (re.compile(r"\.smooth_factor|\.wscales$|\.wzeros$|\.proj_(down|up)$"), "nunchaku (SVDQuant)"),
    (re.compile(r"_?qdata$|:scale$|\.scales?$|\.zero_point$"), "another library or version of torchao"),
)
"""Quantized weights by the names that go with them."""
_MODULES: dict[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "optimum": "quanto",
    "quanto": "quanto",
    "diffusers.quantizers.gguf": "GGUF",
    "nunchaku": "nunchaku (SVDQuant)",
    "hqq": "HQQ",
}
"""Quantized weights by where their class is from."""
_IN_FLOATING_POINT = "load the original checkpoint in floating point and quantize it here (quant=...)"


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what wrappers put into it and without what all of them begin with."""
    bare = {name: _WRAPPED.sub("", name) for name in names}
    while bare:
        prefixes = (*_PREFIXES, *_prefixes(bare.values()))
        prefix = next((each for each in prefixes if all(name.startswith(each) for name in bare.values())), None)
        if prefix is None:
            break
        bare = {name: rest.removeprefix(prefix) for name, rest in bare.items()}
    return bare


def _prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the blocks of a transformer, or of each of several."""
    matches = map(_BEFORE_BLOCKS.match, names)
    return sorted({match[1] for match in matches if match and match[1]})


def refuse_foreign(found: Found, origin: str) -> None:
    """Raise ``CheckpointError`` for tensors that are no plain weights of one transformer.

    Args:
        found: shape and stored dtype by name.
        origin: where they are, for the message.
    """
    adapters = [name for name in found if _ADAPTER.search(name)]
    if adapters:
        raise CheckpointError(
            f"{origin}: holds adapter (LoRA) weights ({some(adapters, 2)}): load the model that they are for, with "
            "loras=[this file]; or fuse them (pipe.fuse_lora()) and unload the adapters (pipe.unload_lora_weights()) "
            "first, then save or load the model"
        )
    for pattern, library in _NAMES:
        named = [name for name in found if pattern.search(name)]
        if named:
            raise CheckpointError(f"{origin}: is quantized by {library} ({some(named, 2)}): {_IN_FLOATING_POINT}")
    odd = [name for name, (_, dtype) in found.items() if dtype not in FLOATING]
    if odd:
        kinds = sorted({found[name][1] for name in odd})
        raise CheckpointError(
            f"{origin}: holds quantized or unknown weights ({some(odd, 2)}; {some(kinds)}): {_IN_FLOATING_POINT}"
        )
    sat = [name for name in found if _SAT.search(name)]
    if sat:
        raise CheckpointError(
            f"{origin}: holds weights in the layout of CogVideoX's original code ({some(sat, 2)}): convert them with "
            "diffusers' scripts/convert_cogvideox_to_diffusers.py, or take the diffusers release of the model"
        )
    parts = {prefix: [name for name in found if name.startswith(prefix)] for prefix in _prefixes(found)}
    for prefix, inside in parts.items():
        if 0 < len(inside) < len(found) and any(name.startswith(f"{prefix}transformer_blocks.") for name in inside):
            others = [name for name in found if name not in set(inside)]
            raise CheckpointError(
                f"{origin}: holds more than a transformer: {len(inside)} names begin with {prefix!r}, and "
                f"{len(others)} do not ({some(others, 2)}): take the former out into a file of their own"
            )


def refuse_kinds(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise ``CheckpointError`` for a live model's tensors of a kind that this package cannot take.

    Args:
        tensors: those that are neither plain nor quantized by torchao.
        origin: the model, for the message.
    """
    for name, tensor in tensors.items():
        kind = type(tensor)
        path = f"{kind.__module__}."
        if kind.__name__ == "DTensor":
            raise CheckpointError(
                f"{origin}: its weights are sharded over several processes (DTensor: {some(tensors, 2)}), by FSDP or "
                "tensor parallelism: gather them first (torch.distributed.checkpoint.state_dict.get_model_state_dict "
                "with full_state_dict=True), or load the checkpoint in each process"
            )
        library = next((library for module, library in _MODULES.items() if path.startswith(f"{module}.")), None)
        if library is not None:
            raise CheckpointError(
                f"{origin}: is quantized by {library} ({name} is a {kind.__name__}): {_IN_FLOATING_POINT}"
            )
    if tensors:
        first = type(next(iter(tensors.values()))).__name__
        raise CheckpointError(
            f"{origin}: {some(tensors, 2)} are of {first}, neither plain tensors nor quantized by torchao: load the "
            "original checkpoint in floating point"
        )


_WRAPPERS = {
    "DistributedDataParallel": "pass its .module",
    "DataParallel": "pass its .module",
    "FullyShardedDataParallel": "gather the weights first (FSDP.summon_full_params, or a full state dict), and pass "
    "the model that was wrapped",
    "PeftModel": "merge its adapters (merge_and_unload()), and pass what that returns",
}


def unwrapping(kinds: Iterable[str]) -> str | None:
    """How to get the model out of a wrapper of one of these classes."""
    return next((f"it is wrapped by {kind}: {_WRAPPERS[kind]}" for kind in kinds if kind in _WRAPPERS), None)


__all__ = ["Found", "bare_names", "refuse_foreign", "refuse_kinds", "unwrapping"]
