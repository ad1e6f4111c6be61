"""Making packages: a model's blocks compiled ahead of time with AOTInductor, for a range of sizes.

One block of each kind (a quantized one and a plain one are two kinds) is compiled; its weights are inputs.

Suffixes: B batch, S joint tokens, D model width, K head width.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogx_fast.attention.attend import Mask, Rotary
from cogx_fast.attention.masks import full_block_mask
from cogx_fast.attention.plan import hash_config
from cogx_fast.model.cpu import has_int8_products
from cogx_fast.model.products import is_int8_dynamic
from cogx_fast.runtime.code_file import (
    describe_device,
    describe_versions,
    write_artifact,
)
from cogx_fast.runtime.compiling.candidates import candidates
from cogx_fast.runtime.distributed.sharded import refuse_sharded
from cogx_fast.runtime.packages.package import KIND, SizeRange
from cogx_fast.runtime.packages.toolkit import build_tools
from cogx_fast.runtime.tensors import hash_block, leaves, named_weights, unflatten

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from cogx_fast.runtime.module import CogVideoXModel


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
        ShardError: (a ValueError) the model's weights are sharded.
        ValueError: there is no C++ compiler or, on CUDA, no headers or driver to build with (nothing is compiled then);
            or the model cannot be exported.
        OSError: the file cannot be written.
    """
    from quant import recipe_of

    refuse_sharded(model, "export_package", "export from a model that is loaded without shard_weights")
    recipe = recipe_of(model)
    kinds: dict[str, list[int]] = {}
    for index, block in enumerate(model.transformer_blocks):
        kinds.setdefault(hash_block(block), []).append(index)
    members: dict[str, bytes] = {}
    with build_tools(model.device), tempfile.TemporaryDirectory() as directory:
        for number, (key, indices) in enumerate(kinds.items()):
            on_kind(number, len(kinds))
            target = Path(directory, f"{number}.pt2")
            compile_block(model, model.transformer_blocks[indices[0]], sizes, target)
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


def compile_block(model: CogVideoXModel, block: nn.Module, sizes: SizeRange, target: Path) -> None:
    """Compile one block ahead of time into a file, while no other process on this machine does."""
    from filelock import FileLock  # torch's own dependency
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from cogx_fast.runtime.compiling.compile import CompileConfig, inductor_options

    int8 = any(map(is_int8_dynamic, block.modules()))
    options = inductor_options(CompileConfig(), model.device, int8=int8)
    program = export_block(model, block, sizes)
    # Of two packages at once, one is compiled: torch writes the objects that they share over each other in its cache.
    alone = FileLock(Path(cache_dir(), "cogx_fast-package.lock"))
    # torch writes what the code is for into its own flag for the package's metadata, and leaves it there.
    kept = config.patch({"aot_inductor.metadata": dict(config.aot_inductor.metadata)})
    with alone, kept, torch.no_grad(), candidates(model.device, options):
        aoti_compile_and_package(
            program, package_path=str(target), inductor_configs={**options, "aot_inductor.embed_kernel_binary": True}
        )


def _takes_int8_products(model: CogVideoXModel) -> bool:
    """Whether its code for a CPU multiplies int8 matrices, rather than their values in fp32 (``model.products``)."""
    return model.device.type == "cpu" and any(map(is_int8_dynamic, model.modules())) and has_int8_products()


__all__ = ["compile_block", "export_block", "export_package"]
