"""Packages: a model's blocks compiled ahead of time (``runtime.packages.export``), in one file, without its weights.

Weights are inputs of the compiled code, so a package runs any checkpoint of its configuration, with neither Dynamo nor
Inductor nor a compiler. Embedding and head run as they are, as in block-scope compilation. A package is code:
``load_package`` runs the library that it holds.

Suffixes: B batch, S joint tokens, D model width.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from cogx_fast.attention.attend import Mask, Rotary
from cogx_fast.attention.masks import LayerBlocks
from cogx_fast.attention.plan import hash_config
from cogx_fast.model.cpu import has_int8_products
from cogx_fast.runtime.attached import refuse_inside_package
from cogx_fast.runtime.code_file import (
    ArtifactError,
    describe_device,
    describe_versions,
    differences,
    read_artifact,
)
from cogx_fast.runtime.runner import CallWith, Runner, Slots
from cogx_fast.runtime.tensors import OTHER_WEIGHTS, Weights, hash_block

if TYPE_CHECKING:
    from cogx_fast.runtime.module import CogVideoXModel
    from quant import Recipe

KIND = "package"
_FIELDS = (
    "attention", "blocks", "config", "config_hash", "device", "dtype", "int8_products", "recipe", "sizes", "versions",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """The calls that a package is for.

    Raises:
        ValueError: an empty range, or a single size (compile that with ``CompileConfig(dynamic=False)``).
    """

    tokens: tuple[int, int]
    """Fewest and most joint tokens of one video: text and video together."""
    batch: int = 4
    """Most videos in one call; guidance doubles them. Fewer are always possible."""

    def __post_init__(self) -> None:
        fewest, most = self.tokens
        if not 2 <= fewest < most:
            raise ValueError(f"tokens is {self.tokens}, expected (fewest, most) with 2 ≤ fewest < most")
        if self.batch < 2:
            raise ValueError(f"batch is {self.batch}, expected 2 or more: a package is for any batch up to that")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that fits this machine, opened but not run yet; nothing of its code is loaded."""

    path: str
    manifest: Mapping[str, Any]
    members: Mapping[str, bytes]
    device: torch.device

    @classmethod
    def read(cls, path: str | os.PathLike[str], device: torch.device | str | int | None) -> Package:
        """Read and check a file that ``export_package`` wrote.

        Raises:
            ArtifactError: (a ValueError) it is damaged, or made for another version or device.
        """
        manifest, members = read_artifact(path, KIND)
        missing = [field for field in _FIELDS if field not in manifest]
        if missing:
            raise ArtifactError(f"{path}: its manifest has no {', '.join(missing)}: make it again with this cogx_fast")
        place = torch.device(device) if device is not None else torch.device(manifest["device"]["type"])
        _refuse_other(path, manifest, place)
        return cls(path=str(path), manifest=manifest, members=members, device=place)

    @property
    def recipe(self) -> Recipe | None:
        """The recipe that weights for it are quantized with."""
        if self.manifest["recipe"] is None:
            return None
        from quant.recipe import parse_recipe

        return parse_recipe(self.manifest["recipe"], origin="the package's recipe")

    def run(self, model: CogVideoXModel) -> None:
        """Load its code, and have a model run it.

        Raises:
            ArtifactError: (a ValueError) the model is of another configuration or has other weights.
        """
        _refuse_weights(self.path, self.manifest, model)
        sizes = SizeRange(tokens=tuple(self.manifest["sizes"]["tokens"]), batch=self.manifest["sizes"]["batch"])
        codes = {name.removesuffix(".pt2"): _open(data, model.device) for name, data in self.members.items()}
        model.requires_grad_(False)
        computes = [
            PackagedBlock(block, codes[self.manifest["blocks"][str(index)]], sizes, model.dtype, model.device)
            for index, block in enumerate(model.transformer_blocks)
        ]
        model.runner = PackagedRunner(computes, f"the package {self.path}", model.runner.slots)


class PackagedRunner(Runner):
    """Runs a model whose blocks are computed by a package's code.

    Args:
        computes: for each layer what computes its block.
        package: where they come from, in words.
        slots: how all else is done.
    """

    def __init__(self, computes: Sequence[PackagedBlock], package: str, slots: Slots) -> None:
        super().__init__(replace(slots, call_block=CallWith(computes)))
        self.package = package

    def follow_attached(self, model: nn.Module) -> None:
        """See that nothing is attached inside the blocks: their code is compiled already and calls nothing of it.

        Raises:
            AttachedError: (a ValueError) there is something.
        """
        refuse_inside_package(model)

    def for_copy(self) -> NoReturn:
        """Compiled code is not copied."""
        raise ValueError(
            "a model that runs a package cannot be copied or pickled: call load_package once more, in each process"
        )


class PackagedBlock:
    """A block's computation as compiled code: what the code takes for granted is checked at every call.

    Args:
        block: whose weights are read at every call, so that they may be changed or replaced.
        runner: the compiled code.
        sizes: what it is for.
        dtype: of the stream.
        device: where the code runs; the weights are there when it is called.
    """

    def __init__(
        self, block: nn.Module, runner: Any, sizes: SizeRange, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._weights = Weights(block)
        self._runner = runner
        self._sizes = sizes
        self._dtype = dtype
        self._expected = [(leaf.shape, leaf.dtype, device) for leaf in self._weights.read()]

    def __call__(
        self,
        block: nn.Module,
        x_BSD: Tensor,
        mod_B12D: Tensor,
        is_text_S1: Tensor,
        rotary: Rotary | None,
        mask: Mask | LayerBlocks,
    ) -> Tensor:
        """As ``Block.compute``.

        Raises:
            ValueError: inputs or weights that the code was not compiled for.
        """
        weights = self._weights.read()
        self._check(x_BSD, mask, weights)
        inputs = [*weights, x_BSD, mod_B12D, is_text_S1, *(rotary or ())]
        with _current(x_BSD.device):  # it runs on the current device's stream
            output: Tensor = self._runner.run([tensor.contiguous() for tensor in inputs])[0]
        return output

    def _check(self, x_BSD: Tensor, mask: Mask | LayerBlocks, weights: Sequence[Tensor]) -> None:
        batch, tokens = x_BSD.shape[:2]
        fewest, most = self._sizes.tokens
        if not fewest <= tokens <= most or batch > self._sizes.batch:
            raise ValueError(
                f"a call with {batch} videos of {tokens} tokens (text and video), but the package is for up to "
                f"{self._sizes.batch} of {fewest} to {most}: export one with other --sizes or --batch"
            )
        found = [(leaf.shape, leaf.dtype, leaf.device) for leaf in weights]
        if found != self._expected:
            raise ValueError(OTHER_WEIGHTS.format("their shape, dtype or device"))
        if x_BSD.device != weights[0].device or x_BSD.dtype != self._dtype:
            raise ValueError(
                f"inputs are {x_BSD.dtype} on {x_BSD.device}, but the package is for {self._dtype} on "
                f"{weights[0].device}: convert them"
            )
        if mask is not None and not isinstance(mask, BlockMask):  # a block mask here is the one that hides nothing
            raise ValueError(
                "an attention mask or plan is given, which packages do not take: use load(..., compile=True)"
            )
        if torch.is_grad_enabled() and x_BSD.requires_grad:
            raise ValueError("gradients are asked for, which packages do not have: use load(...) to train")


def _open(data: bytes, device: torch.device) -> Any:
    """Load compiled code: from here on it runs."""
    directory = tempfile.mkdtemp(prefix="cogx-fast-")
    try:
        file = Path(directory, "block.pt2")
        file.write_bytes(data)
        index = device.index if device.type == "cuda" else -1
        with _current(device):  # and again what it was: the loader makes its device the current one, and leaves it so
            return torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, index)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """With that GPU as the current one; elsewhere nothing changes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse_other(path: object, manifest: Mapping[str, Any], device: torch.device) -> None:
    """Refuse a package of other versions or for another device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{path}: is for CUDA, which is not there: export a package for this machine")
    here, there = describe_device(device), dict(manifest["device"])
    missing = set(there.get("instructions", "").split()) - set(here.get("instructions", "").split())
    here.pop("name", None)
    here.pop("instructions", None)
    wrong = list(differences(manifest, {"versions": describe_versions(), "device": here}))
    if missing:
        wrong.append(f"device.instructions: needs {' '.join(sorted(missing))}, which this CPU does not have")
    if manifest["int8_products"] and device.type == "cpu" and not has_int8_products():
        wrong.append(
            "int8_products: the package multiplies int8 matrices, which torch does here by plain loops or with sums "
            "that saturate (AVX512-VNNI is not there, or ONEDNN_MAX_CPU_ISA keeps it from being used)"
        )
    if wrong:
        raise ArtifactError(f"{path}: was made for something else ({'; '.join(wrong)}): export one here")


def _refuse_weights(path: object, manifest: Mapping[str, Any], model: CogVideoXModel) -> None:
    """Refuse weights that a package is not for."""
    if hash_config(model.config) != manifest["config_hash"]:
        wrong = "; ".join(differences(manifest["config"], model.config.to_dict()))
        raise ArtifactError(f"{path}: was made for another configuration than that of the weights ({wrong})")
    blocks = {str(index): hash_block(block) for index, block in enumerate(model.transformer_blocks)}
    wrong_blocks = [index for index, key in blocks.items() if manifest["blocks"].get(index) != key]
    if wrong_blocks:
        raise ArtifactError(
            f"{path}: was made for other weights (shapes, dtypes or quantization of blocks {', '.join(wrong_blocks)})"
        )


__all__ = ["KIND", "Package", "PackagedBlock", "PackagedRunner", "SizeRange"]
