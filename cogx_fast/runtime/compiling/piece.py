"""A compiled function: compiled by its first call, by one thread at a time, and again only with a message why."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, cast

from cogx_fast.model.tracing import is_traced
from cogx_fast.runtime.attached import Attached, AttachedError, named
from cogx_fast.runtime.compiling.calls import Calls
from cogx_fast.runtime.compiling.kinds import own

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""``torch.compile`` with everything but the function."""

_compiling = threading.RLock()
"""Held by the one thread of the process that compiles; calls of what is compiled do not take it."""


class Piece:
    """A compiled function. Its arguments' sizes are marked as symbols where it compiles, and only then.

    Args:
        function: what is compiled.
        name: of what that is, in a word.
        compile: compiles it.
        mark: marks the sizes of its arguments.
        calls: of the model.
        inside: what is attached inside the modules that it runs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        compile: Compile,
        mark: Callable[..., None],
        calls: Calls,
        inside: list[Attached],
    ) -> None:
        from torch._dynamo.exc import RecompileError as TorchRecompileError

        self._function, self._mark, self._calls, self._inside = function, mark, calls, inside
        self._compiled = compile(own(function, name))
        self._is_warm = False
        self._refused = TorchRecompileError

    def __call__(self, *arguments: Any) -> Any:
        """The function, compiled; under a caller's own ``torch.compile`` a part of that graph."""
        if is_traced():
            return self._function(*arguments)
        if not self._is_warm:
            return self._first(*arguments)
        with contextlib.suppress(self._refused):
            return self._compiled(*arguments)
        return self._again(*arguments)

    def _first(self, *arguments: Any) -> Any:
        with _compiling:  # of two first calls at once, one compiles
            if self._is_warm:
                return self(*arguments)
            with _may_recompile():  # a part of it may, where graph breaks are allowed (``explain``)
                result = self._compile(*arguments)
            self._is_warm = True
            return result

    def _again(self, *arguments: Any) -> Any:
        with _compiling:
            try:
                return self._compile(*arguments)  # what this needs may have been compiled by another thread meanwhile
            except self._refused as error:
                self._calls.tell(self._calls.explain(str(error)))
            with _may_recompile():
                return self._compile(*arguments)

    def _compile(self, *arguments: Any) -> Any:
        from torch._dynamo.exc import Unsupported

        self._mark(*arguments)
        try:
            return self._calls.directory.retried(self._compiled, *arguments)
        except Unsupported as error:
            if not self._inside:
                raise
            raise AttachedError(
                f"{self._calls.what} cannot be compiled as one graph with what is attached inside it: "
                f"{named(self._inside)}. What to do: use compile=False; or write it so that torch can trace it. "
                f"torch's reason: {error}"
            ) from error


def _may_recompile() -> contextlib.AbstractContextManager[Any]:
    import torch._dynamo.config as dynamo

    return cast(contextlib.AbstractContextManager[Any], dynamo.patch(error_on_recompile=False))


__all__ = ["Compile", "Piece"]
