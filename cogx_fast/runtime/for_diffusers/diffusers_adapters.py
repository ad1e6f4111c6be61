"""What diffusers' model answers about adapters (``PeftAdapterMixin``). Importing it needs diffusers.

What is loaded to be used is merged into the weights (``for_diffusers.adapters``). What is trained stands in the model
as PEFT has it, around query, key and value apart; while it does, diffusers' own methods do all that is asked of
adapters.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import CogVideoXTransformer3DModel as Upstream
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn

from cogx_fast.runtime.attached import ADAPTERS, AttachedError, take_off_adapters
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.weights.lora import LoraLike, read_loras
from cogx_fast.weights.quantized import is_quantized

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _theirs_in_training(method: _Method) -> _Method:
    """A method in whose place diffusers' of the same name runs while an adapter is trained."""

    @functools.wraps(method)
    def run(self: AdapterMethods, *arguments: Any, **options: Any) -> Any:
        if self._is_trained:
            return self._theirs(method.__name__, *arguments, **options)
        return method(self, *arguments, **options)

    return cast(_Method, run)


class AdapterMethods(CogVideoXModel):
    """The methods of a model that takes adapters."""

    _trained_configs: dict[str, Any] | None = None
    """PEFT's configurations by adapter; None: it has put none on the model."""
    _trained_scale = 1.0
    """What trained adapters are multiplied by at present, as the last call asked for."""

    def _follow_scale(self, attention_kwargs: Mapping[str, Any] | None) -> None:
        scale = float((attention_kwargs or {}).get("scale", 1.0))
        if self._is_trained:
            self._scale_trained(scale)
        elif "adapters" in self._modules:
            self._adapters().scale_calls(scale)

    def _scale_trained(self, scale: float) -> None:
        if scale == self._trained_scale:
            return
        from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

        unscale_lora_layers(self, self._trained_scale)
        scale_lora_layers(self, scale)
        self._trained_scale = scale

    @property
    def _is_trained(self) -> bool:
        return self._trained_configs is not None

    def _theirs(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What diffusers' method of that name does, with the trained adapters as strong as they are without a call."""
        self._scale_trained(1.0)
        return getattr(Upstream, name)(self, *arguments, **options)

    def set_loras(self, loras: Sequence[LoraLike]) -> None:
        """As ``CogVideoXModel.set_loras``; adapters that pipelines loaded come on top of these.

        Raises:
            AttachedError: (a ValueError) an adapter that is trained is on the model.
        """
        if self._is_trained:
            raise AttachedError("an adapter that is trained is on the model: call unload_lora() first")
        if "adapters" in self._modules:
            self._adapters().stand_on(read_loras(loras, self._config))
        else:
            super().set_loras(loras)

    def _adapters(self) -> Any:
        from cogx_fast.runtime.for_diffusers.adapters import Adapters

        if "adapters" not in self._modules:
            self.adapters = Adapters(self)
        return self.adapters

    @_theirs_in_training
    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Mapping[str, Tensor] | str | os.PathLike[str],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        network_alphas: Mapping[str, float] | None = None,
        weight_name: str | None = None,
        **others: Any,
    ) -> None:
        """Take a LoRA, merged into the weights; it becomes the active one (as ``pipe.load_lora_weights`` asks for it).

        Args:
            pretrained_model_name_or_path_or_dict: its tensors, a ``.safetensors`` file, or the folder of one.
            prefix: names that begin otherwise are another part's; taken all the same where no name begins so.
            hotswap: it takes the place of the adapter of that name.
            adapter_name: its name; None makes one.
            metadata: peft's configuration of it.
            network_alphas: alphas by module, of older files.
            weight_name: the file's name in its folder.
            **others: diffusers', which matter while an adapter is trained.

        Raises:
            LoraError: (a ValueError) it cannot be merged; nothing is changed then.
            ValueError: the name is taken already.
        """
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, Mapping):
            from safetensors import safe_open

            path = Path(given)
            with safe_open(path / (weight_name or LORA_WEIGHT_NAME_SAFE) if path.is_dir() else path, "pt") as file:
                texts = file.metadata() or {}
                given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            metadata = json.loads(texts["lora_adapter_metadata"]) if "lora_adapter_metadata" in texts else metadata
        tensors = dict(given) | {f"{name}.alpha": torch.tensor(value) for name, value in (network_alphas or {}).items()}
        mine = {name: tensor for name, tensor in tensors.items() if prefix and name.startswith(f"{prefix}.")}
        self._adapters().add(adapter_name, mine or tensors, metadata, hotswap=hotswap)

    @_theirs_in_training
    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Have these adapters be the active ones, as strong as said (1 each where nothing is)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        strengths = weights if isinstance(weights, list) else [weights] * len(names)
        if len(strengths) != len(names):
            raise ValueError(f"{len(names)} adapters are named and {len(strengths)} weights given: one for each")
        self._adapters().use(names, strengths)

    @_theirs_in_training
    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Have the active adapters stay in the weights, whichever are active later, until ``unfuse_lora``."""
        self._adapters().fuse(lora_scale, adapter_names)

    @_theirs_in_training
    def unfuse_lora(self) -> None:
        """Take back what ``fuse_lora`` did."""
        self._adapters().unmerge()

    @_theirs_in_training
    def enable_lora(self) -> None:
        """Turn adapters on again."""
        self._adapters().enable_adapters(True)

    @_theirs_in_training
    def disable_lora(self) -> None:
        """Turn all adapters off; the weights are what they were before any was loaded, to the bit."""
        self._adapters().enable_adapters(False)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget these adapters."""
        if self._is_trained:
            self._theirs("delete_adapters", adapter_names)
            if not self._trained_configs:
                self.unload_lora()
            return
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._adapters().delete_adapter(name)

    def unload_lora(self) -> None:
        """Forget all adapters; what is fused stays in the weights."""
        blocks: list[Any] = list(self.transformer_blocks)
        if "adapters" in self._modules:
            self._adapters().unload()
            del self.adapters
        if not blocks[0].attn1.is_split:
            return
        take_off_adapters(self)
        self.merged.look(self)
        for block in blocks:
            block.attn1.join()
        self.merged.note(self)
        for name in ("_trained_configs", "_trained_scale", "_hf_peft_config_loaded"):  # the class has what says none
            self.__dict__.pop(name, None)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters.

        Raises:
            ValueError: there is none.
        """
        if self._is_trained:
            return [each] if isinstance(each := self._theirs("active_adapters"), str) else list(each)
        if not self._adapters().configs:
            raise ValueError("no adapter is loaded: load one first")
        return list(self._adapters().active_adapters)

    def enable_lora_hotswap(self, **_: Any) -> None:
        """Nothing to prepare: another adapter never makes anything compile again."""

    def save_lora_adapter(self, *arguments: Any, **options: Any) -> None:
        """Write an adapter that is trained, as diffusers does.

        Raises:
            AttachedError: (a ValueError) there is none: what was loaded is in the weights, and its file is there.
        """
        if not self._is_trained:
            raise AttachedError("adapters that were loaded are merged into the weights; their files are there already")
        self._theirs("save_lora_adapter", *arguments, **options)

    # -- adapters to train, which are PEFT's own -----------------------------------------------------------------------

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put an adapter of PEFT on the model, to be trained: query, key and value are apart while there is one.

        Its weights have diffusers' names, so ``pipe.save_lora_weights(folder,
        peft.get_peft_model_state_dict(model))`` writes a file that diffusers loads. ``unload_lora`` takes it off.

        Args:
            adapter_config: ``peft.LoraConfig``; its targets are among ``to_q``, ``to_k``, ``to_v``, ``to_out.0``,
                ``ff.net.0.proj`` and ``ff.net.2``.
            adapter_name: its name.

        Raises:
            AttachedError: (a ValueError) a target that this model does not have apart, weights that are quantized, or
                LoRAs in them that were loaded as adapters.
        """
        if "adapters" in self._modules:
            raise AttachedError("adapters that were loaded are on the model: call unload_lora() before one is trained")
        blocks: list[Any] = list(self.transformer_blocks)
        if any(is_quantized(parameter) for parameter in self.parameters()):
            raise AttachedError("the model is quantized: load it without quant=... to train an adapter")
        was_split = blocks[0].attn1.is_split
        if not was_split:
            self.merged.look(self)
            for block in blocks:
                block.attn1.split()
            self.merged.note(self)
        try:
            _check_targets(self, adapter_config)
            Upstream.add_adapter(self, adapter_config, adapter_name)
        except BaseException:
            if not was_split:
                self.unload_lora()
            raise

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' configurations by name; there is none where there are no adapters. PEFT adds to it."""
        if self._trained_configs is not None:
            return self._trained_configs
        configs = getattr(self._modules.get("adapters"), "configs", None)
        if not configs:
            raise AttributeError("peft_config")
        return dict(configs)

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        """PEFT writes it at the end of every injection: adapters that cannot work are taken off again."""
        blocks: list[Any] = list(self.transformer_blocks)
        if not blocks[0].attn1.is_split:
            take_off_adapters(self)
            raise AttachedError(ADAPTERS)
        self._trained_configs = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        """Forget them: diffusers deletes it with the last adapter."""
        self._trained_configs = {}


def _check_targets(model: nn.Module, config: Any) -> None:
    """Raise ``AttachedError`` where a target by name is nothing in this model, which PEFT would pass over."""
    targets = getattr(config, "target_modules", None)
    names = [name for name, _ in model.named_modules()]
    absent = [
        each
        for each in (targets if isinstance(targets, list | tuple | set) else ())
        if not any(name == each or name.endswith(f".{each}") for name in names)
    ]
    if absent:
        raise AttachedError(
            f"target_modules {', '.join(sorted(absent))} are not apart in this model: expected some of to_q, to_k, "
            "to_v, to_out.0, ff.net.0.proj, ff.net.2"
        )


__all__ = ["AdapterMethods"]
