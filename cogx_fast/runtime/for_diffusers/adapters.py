"""diffusers' adapters (``pipe.load_lora_weights``, ``set_adapters``, …) on a model whose LoRAs are in its weights.

Importing this module needs peft, as diffusers' own methods for adapters do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cogx_fast.weights.lora import Delta, Deltas, Lora, deltas_of, linear_slots, said_in

Weight = float | Mapping[str, float]
"""How strong an adapter is: everywhere, or by what is in a module's name (1 elsewhere), as diffusers takes it."""


class Adapters(nn.Module, BaseTunerLayer):
    """The one layer of peft's kind in a model: it says what every layer with adapters would, and does it for all.

    peft's layers add their products as they run; here the sum is merged into the weights whenever it changes, with an
    exact way back. What is merged for which state of adapters (active, scaled, fused, disabled) is as peft has it.

    Args:
        model: a ``CogVideoXModel``, whose weights are changed.
    """

    weight: Any = None  # of peft's layers, that of the module within
    bias: Any = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._owner = (model,)  # in a tuple: no module of this one
        self.configs: dict[str, LoraConfig] = {}
        self._deltas: dict[str, dict[str, Delta]] = {}
        self._weights: dict[str, Weight] = {}
        self._factors: dict[str, float] = {}
        self._call_scale = 1.0
        self._fused: list[tuple[str, Weight, float]] = []
        self._forever: Deltas = {name: list(each) for name, each in model.merged.deltas.items()}
        """What was loaded with the model, and what was fused and then unloaded."""
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    # -- what peft's layers do -----------------------------------------------------------------------------------------

    def unmerge(self) -> None:
        """Take back what ``fuse`` did."""
        self._fused, self.merged_adapters = [], []
        self._update()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Have these adapters be the active ones, as strong as they are."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._update()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters on or off; off, what is fused is taken back, too."""
        self._disable_adapters = not enabled
        if not enabled:
            self._fused, self.merged_adapters = [], []
        self._update()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        for each in (self.configs, self._deltas, self._weights, self._factors):
            each.pop(adapter_name, None)
        self._fused = [each for each in self._fused if each[0] != adapter_name]
        self.merged_adapters = [name for name in self.merged_adapters if name != adapter_name]
        active = [name for name in self._active_adapter if name != adapter_name]
        self._active_adapter = active or list(self._deltas)[:1]
        self._update()

    # -- what diffusers' model does ------------------------------------------------------------------------------------

    def add(
        self, name: str | None, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, *, hotswap: bool
    ) -> None:
        """Take an adapter, which becomes the active one.

        Args:
            name: its name; None makes one.
            tensors: under any of the names that LoRA files have.
            metadata: peft's configuration of it, as diffusers reads it from a file.
            hotswap: another of the name is there already, whose place it takes.

        Raises:
            LoraError, ValueError: it cannot be merged, or the name is taken, or free with ``hotswap``.
        """
        name = f"default_{len(self._deltas)}" if name is None else name
        if (name in self._deltas) != hotswap:
            raise ValueError(
                f"adapter {name!r} is there already: choose another adapter_name, delete it, or pass hotswap=True"
                if not hotswap
                else f"hotswap=True, but there is no adapter {name!r} to take the place of"
            )
        model = self._owner[0]
        texts = {} if not metadata else {"lora_adapter_metadata": json.dumps(metadata, default=str)}
        linears, said = linear_slots(model.merged.config), said_in(texts, name)
        found = deltas_of(tensors, linears, f"adapter {name!r}", said=said, lora=Lora(""))
        before = (dict(self._deltas), self._active_adapter)
        self._deltas[name] = {f"{module}.weight": delta for module, delta in found.items()}
        self._weights.setdefault(name, 1.0)
        self._factors.setdefault(name, 1.0)
        if not hotswap:
            self._active_adapter = [name]
        try:
            self._update()
        except BaseException:
            self._deltas, self._active_adapter = before
            raise
        first = next(iter(found.values()))
        self.configs[name] = LoraConfig(
            r=first.down.shape[0], target_modules=sorted(found), use_rslora=said.use_rslora,
            use_dora=first.magnitude is not None,
        )  # fmt: skip

    def use(self, names: Sequence[str], weights: Sequence[Weight | None]) -> None:
        """Have these adapters be the active ones, and so strong."""
        missing = [name for name in names if name not in self._deltas]
        if missing:
            raise ValueError(f"adapters {', '.join(missing)} are not there, but {', '.join(self._deltas) or 'none'}")
        for name, weight in zip(names, weights, strict=True):
            self._weights[name], self._factors[name] = 1.0 if weight is None else weight, 1.0
        self.set_adapter(list(names))

    def fuse(self, scale: float, names: Sequence[str] | None) -> None:
        """Have the active adapters (or these) stay, whichever are active later, until ``unmerge``."""
        if scale != 1.0:
            for name in self._active_adapter:
                self._factors[name] *= scale
        for name in self._active_adapter if names is None else names:
            if name not in self.merged_adapters and name in self._deltas:
                self._fused.append((name, self._weights[name], self._factors[name]))
                self.merged_adapters.append(name)
        self._update()

    def unload(self) -> None:
        """Leave in the weights what is fused, for good, and nothing else; the layer is of no use after it."""
        model = self._owner[0]
        model.merged.exchange(model, self._sum(self._fused))

    def stand_on(self, deltas: Deltas) -> None:
        """Have the weights hold these LoRAs whatever becomes of the adapters."""
        self._forever = deltas
        self._update()

    def scale_calls(self, scale: float) -> None:
        """Have active adapters be so much stronger in the calls that follow (``attention_kwargs={"scale": …}``)."""
        if scale != self._call_scale:
            self._call_scale = scale
            self._update()

    def _update(self) -> None:
        """Bring the model's weights up to date."""
        active = [(name, self._weights[name], self._factors[name] * self._call_scale) for name in self._active_adapter]
        chosen = [] if self._disable_adapters else self._fused or active
        model = self._owner[0]
        model.merged.exchange(model, self._sum(chosen))

    def _sum(self, chosen: Sequence[tuple[str, Weight, float]]) -> Deltas:
        found = {name: list(each) for name, each in self._forever.items()}
        stage = 1 + max((each.stage for several in found.values() for each in several), default=-1)
        for adapter, weight, factor in chosen:
            for name, delta in self._deltas[adapter].items():
                scale = delta.scale * factor * _at(name, weight)
                found.setdefault(name, []).append(dataclasses.replace(delta, scale=scale, stage=stage))
        return found


def _at(name: str, weight: Weight) -> float:
    if not isinstance(weight, Mapping):
        return float(weight)
    return float(next((value for part, value in weight.items() if part in name), 1.0))


__all__ = ["Adapters"]
