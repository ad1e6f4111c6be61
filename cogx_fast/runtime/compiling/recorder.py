"""The backend of a model's ``torch.compile``: Inductor, which leaves a note of what it made, for ``warm_start``.

A file of its own, imported where something is compiled: it is made of private parts of torch.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cogx_fast.runtime.compiling.candidates import candidates
from cogx_fast.runtime.compiling.warm_start import LIBRARY

if TYPE_CHECKING:
    from cogx_fast.runtime.compiling.compile import CompileConfig


class Recorder(torch._TorchCompileInductorWrapper):
    """Inductor, and what it made of one model.

    torch keeps the artifacts of a whole process on one list. While a graph of this model is compiled they go to a list
    of its own as well.

    Args:
        config: how the model is compiled, a key of the bundle.
        options: Inductor's on a device: of the one that a graph is for, which may be another than the model was on
            when this was made.
    """

    __name__ = "inductor"

    def __init__(self, config: CompileConfig, options: Callable[[torch.device], Mapping[str, Any]]) -> None:
        super().__init__(None, dict(options(torch.device("cpu"))), config.dynamic)
        self.made_by = config
        self._options = options
        self.when_called: Callable[[], Any] | None = None
        """Called once, before the first graph is compiled."""
        self.artifacts: list[Any] = []
        self.libraries: set[Path] = set()

    def __call__(self, model_: Any, inputs_: Any, **options: Any) -> Any:
        """Compile a graph for the device that its inputs are on."""
        device = next(each.device for each in inputs_ if isinstance(each, torch.Tensor))
        when_called, self.when_called = self.when_called, None
        if when_called is not None:
            when_called()
        self.config = {}
        self.apply_options(dict(self._options(device)))
        with self._recording(), candidates(device, self.config):
            return super().__call__(model_, inputs_, **options)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        from torch._inductor.codecache import PyCodeCache
        from torch.compiler._cache import CacheArtifactManager as Manager

        before = len(PyCodeCache.modules)
        with Manager.with_fresh_cache():
            yield
            made = list(Manager._seen_artifacts)
        for artifact in made:
            if artifact not in self.artifacts:
                self.artifacts.append(artifact)
            if artifact not in Manager._seen_artifacts:
                Manager._seen_artifacts.add(artifact)
                Manager._new_cache_artifacts[artifact.type()].append(artifact)
        for module in PyCodeCache.modules[before:]:
            self.libraries |= _libraries(module)


def _libraries(module: types.ModuleType) -> set[Path]:
    """The C++ libraries whose kernels a generated module calls."""
    owners = {getattr(kernel, "__self__", None) for kernel in vars(module).values() if callable(kernel)}
    files = {getattr(owner, "__file__", None) for owner in owners if isinstance(owner, types.ModuleType)}
    made = (Path(file) for file in files if file)  # torch's own functions have owners, too
    return {file for file in made if LIBRARY.fullmatch(f"libraries/{file.parent.name}/{file.name}")}


__all__ = ["Recorder"]
