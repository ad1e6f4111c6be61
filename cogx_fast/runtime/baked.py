"""Baked schedules: what the timestep decides, as a table over a schedule's timesteps in place of the weights.

All blocks' modulation is one linear, a seventh of 5b's parameters, for the sake of one row a video. With the timesteps
known it is a table of as many rows; its weights lie in host memory (pinned where there is CUDA), and the table is made
from there, layer by layer. A step looks its row up on the device: the graph compares timesteps, nobody waits.

Which timesteps there are is read from the call: pipelines hand over a view of their scheduler's timesteps. All of them
are read once in a generation, which waits for the device once; others than those of the table are baked anew. What is
known of no schedule is computed from the host's weights for that call alone, with a warning: it is right, and slow.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogx_fast.model.tracing import is_traced
from cogx_fast.model.transformer import CogVideoXTransformer, Conditioning
from cogx_fast.runtime.attached import on_modules, refuse
from cogx_fast.runtime.step_caching.step_cache import place_of
from cogx_fast.runtime.streaming import HostPart
from cogx_fast.runtime.tensors import plain_tensors

MOST_STEPS = 256
"""Timesteps that are taken for a schedule; each takes 3 MiB of 5b's table."""
_TABLES_HELD = 2
"""Two pipelines may use one model in turns."""


class ScheduleError(ValueError):
    """A schedule that cannot be baked, or a call that a baked one is not for; the message says what to do."""


class Table(NamedTuple):
    """Conditioning of some timesteps. Suffixes: T timesteps, B batch, L layers, D model width."""

    timesteps_T: Tensor
    """In fp32, as which they are read."""
    mod_TL12D: Tensor
    out_T2D: Tensor

    def look_up(self, timestep_B: Tensor) -> Conditioning:
        """The rows of timesteps that are among the table's."""
        row_B = (self.timesteps_T == timestep_B.float()[:, None]).int().argmax(1)
        return Conditioning(self.mod_TL12D.index_select(0, row_B), self.out_T2D.index_select(0, row_B))


class BakedSchedule:
    """Makes the tables of a model, and keeps its modulation's weights in host memory.

    Args:
        timesteps: those of calls whose timestep is a number or lies on the CPU; pipelines' are found in the call.
    """

    def __init__(self, timesteps: Sequence[float] = ()) -> None:
        self._given = tuple(timesteps)
        self._host: HostPart | None = None
        self._tables: OrderedDict[Any, Table] = OrderedDict()
        self._read: dict[str, tuple[Tensor, int, tuple[float, ...]]] = {}
        self._has_told = False
        self._making = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return BakedSchedule, (self._given,)  # a copy of the model has weights of its own

    def hold(self, model: CogVideoXTransformer) -> None:
        """Have the modulation's weights in host memory, if they are not there yet.

        Raises:
            AttachedError: (a ValueError) something is attached to the modulation, which would not run.
        """
        refuse(on_modules(model.modulation, "modulation"), "schedule=... computes the modulation ahead of time")
        if self._host is None or not self._host.is_of(model.modulation):
            self._host = HostPart(model.modulation)

    def release(self, *, elsewhere_than: torch.device | None = None) -> None:
        """Drop the tables; with ``elsewhere_than`` those that do not lie on that device."""
        with self._making:
            for key, table in list(self._tables.items()):
                if table.mod_TL12D.device != elsewhere_than:
                    del self._tables[key]

    def table(
        self,
        model: CogVideoXTransformer,
        timestep: Any,
        ofs: Any,
        timestep_B: Tensor,
        ofs_B: Tensor | None,
        dtype: torch.dtype,
    ) -> Table:
        """A table that has a call's timesteps.

        Args:
            model: whose call it is.
            timestep, ofs: as the caller gave them.
            timestep_B, ofs_B: the same for each video, on the device.
            dtype: of the stream.

        Raises:
            ScheduleError: gradients of the conditioning are asked for, or the call is traced.
        """
        if is_traced():
            raise ScheduleError("schedule=... finds its table outside of compiled code: use load(..., compile=True)")
        if torch.is_grad_enabled() and any(each.requires_grad for each in model.time_embedding.parameters()):
            raise ScheduleError(
                "schedule=... has baked the conditioning, which has no gradients: call the model under torch.no_grad() "
                "(pipelines do), or train it without schedule"
            )
        with self._making:
            self.hold(model)
            values, offset = self._schedule_of(timestep), self._number("ofs", ofs) if ofs_B is not None else ()
            if values is None or offset is None or len(set(offset)) > 1:
                self._tell()
                return bake(model, timestep_B, ofs_B, dtype)
            device = timestep_B.device
            autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
            key = values, offset, dtype, device, autocast, _state(model)
            if key not in self._tables:
                while len(self._tables) >= _TABLES_HELD:
                    self._tables.popitem(last=False)
                timesteps_T = torch.tensor(values, dtype=torch.float32, device=device)
                ofs_T = torch.full_like(timesteps_T, offset[0]) if offset else None
                self._tables[key] = bake(model, timesteps_T, ofs_T, dtype)
            return self._tables[key]

    def _schedule_of(self, timestep: Any) -> tuple[float, ...] | None:
        """All timesteps of the schedule that a call's belong to; None: it is not known."""
        if isinstance(timestep, Tensor) and (place := place_of(timestep.reshape(-1))) is not None:
            if len(place.timesteps) <= MOST_STEPS:
                return tuple(dict.fromkeys(self._values("timestep", place.timesteps)))
            return None
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return None
        return self._given if set(self._number("timestep", timestep) or ()) <= set(self._given) else None

    def _number(self, name: str, value: Any) -> tuple[float, ...] | None:
        """A call's number, or one for each video."""
        if not isinstance(value, Tensor):
            return (float(value),)
        return self._values(name, value.reshape(-1))

    def _values(self, name: str, tensor: Tensor) -> tuple[float, ...]:
        """A tensor's values, which are read once while they stay the same."""
        known = self._read.get(name)
        if (
            known is None
            or known[0].data_ptr() != tensor.data_ptr()
            or known[0].shape != tensor.shape
            or known[1] != tensor._version
        ):
            known = self._read[name] = (tensor, tensor._version, tuple(map(float, tensor.tolist())))
        return known[2]

    def _tell(self) -> None:
        if not self._has_told:
            self._has_told = True
            warnings.warn(
                "the timestep is of no schedule that is known (no view of a scheduler's timesteps, and not among those "
                "given as schedule=...): the conditioning is computed from weights in host memory, in each such call",
                stacklevel=7,
            )


@torch.no_grad()
def bake(model: CogVideoXTransformer, timesteps_T: Tensor, ofs_T: Tensor | None, dtype: torch.dtype) -> Table:
    """The table of some timesteps: ``model.condition``, with the modulation's weights brought layer by layer.

    Args:
        model: its modulation's weights may lie elsewhere than ``timesteps_T``, where the table comes to lie.
        timesteps_T: diffusion timesteps.
        ofs_T: 1.5 image-to-video's offset with each, or None.
        dtype: of the stream.
    """
    with torch.inference_mode(False):
        timesteps_T = timesteps_T.to(torch.float32, copy=True)  # of an inference tensor one that is none
        if len(timesteps_T) == 1:  # which a compiler takes for a size of its own
            timesteps_T = timesteps_T.repeat(2)
        emb_TE = model.time_embedding(timesteps_T, dtype)
        if model.ofs_embedding is not None and ofs_T is not None:
            emb_TE = emb_TE + model.ofs_embedding(ofs_T.expand(len(timesteps_T)), dtype)
        linear, device = model.modulation.linear, timesteps_T.device
        given_TE = F.silu(emb_TE)

        def product(rows: slice) -> Tensor:
            weight, bias = (each[rows].to(device, non_blocking=True) for each in (linear.weight, linear.bias))
            return F.linear(given_TE, weight, bias)

        rows, layers = linear.out_features, model.modulation.num_layers
        if len(plain_tensors(linear.weight)) > 1:  # a quantized one is not taken apart
            mod_TR = product(slice(None))
        else:
            of_layer = [slice(first, first + rows // layers) for first in range(0, rows, rows // layers)]
            first = product(of_layer[0])
            mod_TR = first.new_empty(len(timesteps_T), rows)
            for each in of_layer:
                mod_TR[:, each] = product(each)
        mod_TL12D = mod_TR.unflatten(1, (layers, model.modulation.VECTORS, -1))
        return Table(timesteps_T, mod_TL12D, model.norm_out.condition(emb_TE))


def read_schedule(schedule: Any) -> tuple[float, ...]:
    """The timesteps that a schedule has by itself; none, where it learns them from its pipeline.

    Args:
        schedule: True; a diffusers scheduler; or numbers.

    Raises:
        ScheduleError: it is none of them.
    """
    if schedule is True or (hasattr(schedule, "timesteps") and getattr(schedule, "num_inference_steps", 0) is None):
        return ()
    values = getattr(schedule, "timesteps", schedule)
    try:
        timesteps = tuple(map(float, values.tolist() if isinstance(values, Tensor) else values))
    except (TypeError, ValueError):
        raise ScheduleError(
            f"schedule is {type(schedule).__name__}, expected True, a diffusers scheduler, or its timesteps as numbers"
        ) from None
    if not 0 < len(timesteps) <= MOST_STEPS or not all(0 <= each < 1e4 for each in timesteps):
        raise ScheduleError(
            f"schedule has {len(timesteps)} timesteps ({', '.join(map(str, timesteps[:3]))}, ...), expected 1 to "
            f"{MOST_STEPS} of 0 to 1000: call set_timesteps first"
        )
    return tuple(dict.fromkeys(timesteps))


def _state(model: CogVideoXTransformer) -> tuple[Any, ...]:
    """Changes when a weight of the conditioning is written to or replaced."""
    parts = (model.time_embedding, model.ofs_embedding, model.modulation, model.norm_out)
    return tuple((id(each), each._version) for part in parts if part is not None for each in part.parameters())


__all__ = ["MOST_STEPS", "BakedSchedule", "ScheduleError", "Table", "bake", "read_schedule"]
