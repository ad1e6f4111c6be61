"""Packages: a model's blocks compiled ahead of time, in one file, without its weights.

``export_package`` compiles the block with AOTInductor, once for each kind of block (a quantized one and a plain one are
two kinds), for a range of sizes. Weights are inputs of the compiled code, so a package runs any checkpoint of its
configuration. ``load_package`` uses neither Dynamo nor Inductor, nor a compiler. Embedding and head run as they are, as
in block-scope compilation.

A package is code: ``load_package`` runs the library that it holds.

Suffixes: B batch, S joint tokens, D model width, K head width.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from cogx_fast.attention.attend import Mask, Rotary
from cogx_fast.attention.masks import LayerBlocks, full_block_mask
from cogx_fast.model.cpu import has_int8_products
from cogx_fast.model.products import is_int8_dynamic
from cogx_fast.runtime.attached import refuse_inside_package
from cogx_fast.runtime.candidates import candidates
from cogx_fast.runtime.code_file import (
    ArtifactError,
    describe_device,
    describe_versions,
    differences,
    hash_config,
    read_artifact,
    write_artifact,
)
from cogx_fast.runtime.runner import CallWith, Runner, Slots
from cogx_fast.runtime.tensors import OTHER_WEIGHTS, Weights, hash_block, leaves, named_weights, unflatten
from cogx_fast.runtime.toolkit import build_tools
from cogx_fast.runtime.upstream import model_class

if TYPE_CHECKING:
    from torch.export import ExportedProgram

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


def export_package(
    model: CogVideoXModel,
    path: str | os.PathLike[str],
    sizes: SizeRange,
    *,
    on_kind: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compile a model's blocks ahead of time into one file, which ``load_package`` runs with any such weights.

    Args:
        model: with the dtype, device, quantization and attention backend that the package is to have; not changed.
        path: the file; replaced if it is there.
        sizes: what it is for.
        on_kind: told before each kind of block how many are done, and of how many.

    Returns:
        The manifest.

    Raises:
        ValueError: there is no C++ compiler or, on CUDA, no headers or driver to build with (nothing is compiled then);
            or the model cannot be exported.
        OSError: the file cannot be written.
    """
    from quant import recipe_of

    recipe = recipe_of(model)
    kinds: dict[str, list[int]] = {}
    for index, block in enumerate(model.transformer_blocks):
        kinds.setdefault(hash_block(block), []).append(index)
    members: dict[str, bytes] = {}
    with build_tools(model.device), tempfile.TemporaryDirectory() as directory:
        for number, (key, indices) in enumerate(kinds.items()):
            on_kind(number, len(kinds))
            target = Path(directory, f"{number}.pt2")
            _compile_block(model, model.transformer_blocks[indices[0]], sizes, target)
            members[f"{key}.pt2"] = target.read_bytes()
    manifest = {
        "versions": describe_versions(),
        "device": describe_device(model.device),
        "config": model.config.to_dict(),
        "config_hash": hash_config(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": next(iter(model.attention_backends)),
        "recipe": None if recipe is None else recipe.to_toml(),
        "sizes": dataclasses.asdict(sizes),
        "int8_products": _takes_int8_products(model),
        "blocks": {str(index): key for key, indices in kinds.items() for index in indices},
    }
    write_artifact(path, KIND, manifest, members)
    return manifest


def load_package(
    path: str | os.PathLike[str],
    weights: str | os.PathLike[str] | nn.Module,
    *,
    device: torch.device | str | int | None = None,
    for_pipelines: bool | None = None,
) -> CogVideoXModel:
    """A model that runs a package's compiled code, with weights of your choice and no compiler.

    This runs the library that the file holds: take packages only from where you would take a program from. Its
    checksums are against damage, not malice. Everything is checked before any of its code is loaded.

    Args:
        path: what ``cogx-fast export`` or ``export_package`` wrote.
        weights: a checkpoint of the package's configuration, or a live model; anything that ``load`` takes. They are
            quantized with the package's recipe, if it has one.
        device: the device to run on; None is the first of the package's kind.
        for_pipelines: build the class that diffusers' ``from_pretrained`` takes, which imports diffusers; None: if
            diffusers has been imported already. Otherwise it is a plain module, called the same way.

    Returns:
        The model, for inference, called as always. Calls outside the package's sizes raise ``ValueError``.

    Raises:
        ArtifactError: (a ValueError) the file is damaged, or made for another version, device or configuration.
        CheckpointError: (a ValueError) the weights cannot be loaded.
    """
    from cogx_fast.loading import load_weights

    manifest, members = read_artifact(path, KIND)
    missing = [field for field in _FIELDS if field not in manifest]
    if missing:
        raise ArtifactError(f"{path}: its manifest has no {', '.join(missing)}: make it again with this cogx_fast")
    place = torch.device(device) if device is not None else torch.device(manifest["device"]["type"])
    _refuse_other(path, manifest, place)
    model = load_weights(
        weights,
        model_class(for_pipelines),
        attention=manifest["attention"],
        compiled=True,
        dtype=manifest["dtype"],
        device=place,
        quant=_read_recipe(manifest["recipe"]),
    )
    _refuse_weights(path, manifest, model)
    sizes = SizeRange(tokens=tuple(manifest["sizes"]["tokens"]), batch=manifest["sizes"]["batch"])
    codes = {name.removesuffix(".pt2"): _open(data, model.device) for name, data in members.items()}
    model.requires_grad_(False)
    computes = [
        PackagedBlock(block, codes[manifest["blocks"][str(index)]], sizes, model.dtype)
        for index, block in enumerate(model.transformer_blocks)
    ]
    model.runner = PackagedRunner(computes, f"the package {path}")
    return model


def _read_recipe(text: str | None) -> Recipe | None:
    if text is None:
        return None
    from quant.recipe import parse_recipe

    return parse_recipe(text, origin="the package's recipe")


class PackagedRunner(Runner):
    """Runs a model whose blocks are computed by a package's code.

    Args:
        computes: for each layer what computes its block.
        package: where they come from, in words.
    """

    def __init__(self, computes: Sequence[PackagedBlock], package: str) -> None:
        super().__init__(Slots(call_block=CallWith(computes)))
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
    """

    def __init__(self, block: nn.Module, runner: Any, sizes: SizeRange, dtype: torch.dtype) -> None:
        self._weights = Weights(block)
        self._runner = runner
        self._sizes = sizes
        self._dtype = dtype
        self._expected = [(leaf.shape, leaf.dtype, leaf.device) for leaf in self._weights.read()]

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


class _Functional(nn.Module):
    """A block as a function of its plain weights and its inputs."""

    def __init__(self, block: nn.Module, mask: Mask) -> None:
        super().__init__()
        self.hidden = (block, mask)  # in a tuple: its weights are inputs, not parameters of what is exported

    def forward(
        self, weights: list[Tensor], x_BSD: Tensor, mod_B12D: Tensor, is_text_S1: Tensor, rotary: Rotary | None
    ) -> Tensor:
        block, mask = self.hidden
        values = iter(weights)
        tensors = {name: unflatten(tensor, values) for name, tensor in named_weights(block)}
        output: Tensor = torch.func.functional_call(block, tensors, (x_BSD, mod_B12D, is_text_S1, rotary, mask))
        return output


def _compile_block(model: CogVideoXModel, block: nn.Module, sizes: SizeRange, target: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    from cogx_fast.runtime.compile import CompileConfig, _inductor_options

    int8 = any(map(is_int8_dynamic, block.modules()))
    options = _inductor_options(CompileConfig(), model.device, int8=int8)
    program = export_block(model, block, sizes)
    with torch.no_grad(), candidates(model.device, options):
        aoti_compile_and_package(
            program, package_path=str(target), inductor_configs={**options, "aot_inductor.embed_kernel_binary": True}
        )


def export_block(model: CogVideoXModel, block: nn.Module, sizes: SizeRange) -> ExportedProgram:
    """One block as a graph of its plain weights and its inputs, for a range of sizes."""
    from torch.export import Dim, export

    config, device, dtype = model.config, model.device, model.dtype
    tokens, dim = sizes.tokens[1], config.inner_dim
    x_BSD = torch.zeros(2, tokens, dim, device=device, dtype=dtype)
    table_SK = torch.zeros(tokens, config.attention_head_dim, device=device)
    rotary = (table_SK, table_SK.clone()) if config.use_rotary_positional_embeddings else None
    is_text_S1 = torch.ones(tokens, 1, device=device, dtype=torch.bool)
    weights = [leaf.detach() for leaf in leaves(block)]
    batch_range = Dim("batch", min=1, max=sizes.batch)
    tokens_range = Dim("tokens", min=sizes.tokens[0], max=sizes.tokens[1])
    per_token = {0: tokens_range}
    shapes = (
        [None] * len(weights), {0: batch_range, 1: tokens_range}, {0: batch_range}, per_token,
        None if rotary is None else (per_token, per_token),
    )  # fmt: skip
    mask = full_block_mask(device) if "flex" in model.attention_backends else None
    arguments = (weights, x_BSD, torch.zeros(2, 12, dim, device=device, dtype=dtype), is_text_S1, rotary)
    with torch.no_grad():
        return export(_Functional(block, mask), arguments, dynamic_shapes=shapes, strict=False)


def _takes_int8_products(model: CogVideoXModel) -> bool:
    """Whether its code for a CPU multiplies int8 matrices, rather than their values in fp32 (``model.products``)."""
    return model.device.type == "cpu" and any(map(is_int8_dynamic, model.modules())) and has_int8_products()


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


__all__ = ["PackagedBlock", "SizeRange", "export_package", "load_package"]
