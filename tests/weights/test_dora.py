"""DoRA and rsLoRA, trained by PEFT, give the weights that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cogx_fast
from tests.support import relative_error, upstream
from tests.weights.lora_files import ALPHA, CONFIG, EVERYWHERE, FINETRAINERS, RANK, as_diffusers, by_their_names, halves


def with_adapters(model: Any) -> Any:
    """diffusers' model with PEFT's adapters of several kinds on it, as if they had been trained."""
    from peft import LoraConfig

    kinds: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True, "lora_alpha": ALPHA},
        "both": {"use_dora": True, "use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 1}},
        "plain": {},
    }
    for seed, (name, options) in enumerate(kinds.items()):
        model.add_adapter(LoraConfig(r=RANK, target_modules=list(EVERYWHERE), **options), name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            elif f"magnitude_vector.{name}" in key:
                parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_dora_and_rslora_give_the_weights_that_peft_merges(tmp_path: Path) -> None:
    """Alone, scaled, and several in either order: the later one's magnitudes are applied to the earlier ones, too."""
    trained = with_adapters(upstream(CONFIG))
    for name in ("dora", "both", "plain"):
        trained.save_lora_adapter(tmp_path / name, adapter_name=name)
    files = {name: next((tmp_path / name).glob("*.safetensors")) for name in ("dora", "both", "plain")}
    ours = cogx_fast.load(upstream(CONFIG))
    base = by_their_names(ours)
    for chosen in (
        {"dora": 1.0}, {"dora": 0.4}, {"both": 1.0}, {"dora": 0.7, "both": -0.5, "plain": 1.0},
        {"plain": 0.5, "both": 1.0, "dora": 1.3},
    ):  # fmt: skip
        theirs = with_adapters(upstream(CONFIG))
        theirs.set_adapters(list(chosen), list(chosen.values()))
        theirs.fuse_lora(adapter_names=list(chosen))
        wanted = {name.replace(".base_layer", ""): tensor for name, tensor in theirs.state_dict().items()}
        ours.set_loras([(files[name], weight) for name, weight in chosen.items()])
        for name, found in by_their_names(ours).items():
            assert relative_error(found, wanted[name]) <= 1e-6, (chosen, name)
            is_target = name.removesuffix(".weight").endswith(EVERYWHERE) and name.endswith(".weight")
            assert (relative_error(found, base[name]) > 1e-2) == is_target, (chosen, name)
    ours.set_loras([])
    assert all(torch.equal(tensor, base[name]) for name, tensor in by_their_names(ours).items())


def test_a_row_of_zeros_stays_one_under_dora(tmp_path: Path) -> None:
    tensors = as_diffusers("")
    tensors |= {f"{name}.lora_magnitude_vector": torch.ones(len(up)) for name, (_, up) in halves().items()}
    first, source = "transformer_blocks.0.attn1.to_q", upstream(CONFIG)
    with torch.no_grad():
        source.get_submodule(first).weight[3] = 0
        tensors[f"{first}.lora_B.weight"][3] = 0
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_config": FINETRAINERS})
    model = cogx_fast.load(source, loras=[tmp_path / "lora.safetensors"])
    norms = by_their_names(model)[f"{first}.weight"].norm(dim=1)
    assert norms[3] == 0
    torch.testing.assert_close(norms[4:], torch.ones_like(norms[4:]))
