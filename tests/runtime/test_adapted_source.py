"""diffusers' models with PEFT's adapters on them: merged ones are taken with the weights, others refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cogx_fast
from tests.cases import for_each
from tests.model.pairs import call
from tests.runtime.attached import CONFIG, mine, refused
from tests.support import predict, relative_error, upstream


def adapted(**options: Any) -> Any:
    from peft import LoraConfig

    source = upstream(CONFIG)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
    source.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets, **options), "style"
    )
    return source


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_adapters_are_taken_with_the_weights(options: dict[str, Any]) -> None:
    source = adapted(**options)
    arguments = call(CONFIG)
    source.fuse_lora()
    expected = predict(source, arguments)
    assert relative_error(predict(upstream(CONFIG), arguments), expected) > 1e-2
    model = cogx_fast.load(source)
    assert relative_error(predict(model, arguments), expected) <= 1e-5
    assert torch.equal(predict(source, arguments), expected), "the source keeps working"
    name = "transformer_blocks.0.attn1.to_out.0"
    theirs = source.get_submodule(name).base_layer.weight
    assert model.get_submodule(name).weight.data_ptr() == theirs.data_ptr(), "shared"


def merged_and_disabled(source: Any) -> None:
    source.fuse_lora()
    source.disable_lora()


def one_of_two(source: Any) -> None:
    from peft import LoraConfig

    source.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "other")
    source.fuse_lora(adapter_names=["style"])


UNMERGED = {
    "not merged": (lambda s: None, "style"),
    "disabled": (lambda s: s.disable_lora(), "style"),
    "merged and disabled": (merged_and_disabled, "style"),
    "one of two": (one_of_two, "other"),
}


@for_each("make, name", UNMERGED.values(), ids=UNMERGED)
def test_adapters_that_are_not_merged_are_refused_by_name(make: Callable[[Any], Any], name: str) -> None:
    source = adapted()
    make(source)
    with pytest.raises(ValueError, match=rf"adapters that are not merged.*{name}.*fuse_lora.*unload_lora_weights"):
        cogx_fast.load(source)


def test_hooks_under_an_adapter_are_seen() -> None:
    source = adapted()
    source.fuse_lora()
    source.transformer_blocks[0].attn1.to_q.base_layer.register_forward_hook(mine)
    refused(source, r"forward hook .*mine on transformer_blocks\.0\.attn1\.to_q")
