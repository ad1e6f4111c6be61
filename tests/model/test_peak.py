"""Not compiled, a step holds no more memory at a time than diffusers' does, by the sizes of live tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cases import for_each
from tests.model.pairs import new_pair, with_tables
from tests.support import RELEASED, inputs, small


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make, from then until it is freed; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((arguments, keywords)) if isinstance(each, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._storages:
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._storages.add(storage._cdata)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._live -= size


def peak_bytes(model: nn.Module, arguments: dict[str, Any]) -> int:
    with torch.no_grad():
        model(**arguments)  # tables are made here
        with LiveBytes() as live:
            model(**arguments)
    return live.peak


def test_the_count_is_of_what_lives_at_a_time() -> None:
    with LiveBytes() as live:
        kept = torch.ones(10)
        for _ in range(3):
            torch.ones(100).add_(1).view(10, 10)
        assert kept.sum() == 10
    assert live.peak == 440


@for_each("dtype", [torch.bfloat16, torch.float32], "name", RELEASED)
def test_an_eager_step_needs_no_more_memory_than_diffusers(name: str, dtype: torch.dtype) -> None:
    """But for what a step makes once, modulation of all layers and tables, which at released sizes is 0.3 % of it."""
    config = small(name, num_attention_heads=16)
    both = new_pair(config)
    arguments = with_tables(config, inputs(config, dtype=dtype, frames=16))
    ours, theirs = (peak_bytes(model.to(dtype), arguments) for model in (both.ours, both.theirs))
    assert ours <= 1.01 * theirs
