"""A clock that counts work instead of time: what does more is slower, by the same on a calm machine and a busy one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Work(TorchDispatchMode):
    """Adds up the bytes that operators read and write; what only looks at a tensor in another way costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if not function.is_view:
            self.bytes += sum(
                each.nbytes for each in tree_leaves((arguments, keywords, result)) if isinstance(each, Tensor)
            )
        return result


@contextmanager
def work_for_time() -> Iterator[None]:
    """Within, ``cogx_fast.measure.timing`` takes a nanosecond a byte that an operator of torch reads or writes."""
    with Work() as work, mock.patch("cogx_fast.measure.timing.time") as time:
        time.perf_counter = lambda: 1e-9 * work.bytes
        yield


__all__ = ["Work", "work_for_time"]
