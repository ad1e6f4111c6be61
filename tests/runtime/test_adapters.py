"""diffusers' methods for adapters, on a pipeline with our transformer and on one with its own: the same predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cogx_fast
from tests.cases import for_each
from tests.pipes import make_pipe
from tests.support import inputs, relative_error
from tests.weights.lora_files import EVERYWHERE, TARGETS, halves

KIND, PRESET = "CogVideoXPipeline", "5b"


def files(folder: Path, config: Any) -> dict[str, Path]:
    """LoRAs as diffusers writes them: three with and without alpha in their metadata, and two of DoRA."""
    import json

    found = {}
    for seed, (name, targets, alpha) in enumerate(
        (
            ("one", TARGETS, None), ("two", EVERYWHERE, 8), ("three", TARGETS, 2),
            ("dora", EVERYWHERE, 6), ("dora without metadata", TARGETS, None),
        )
    ):  # fmt: skip
        pairs = halves(targets, seed=seed, config=config)
        tensors = {
            f"transformer.{module}.lora_{half}.weight": tensor.contiguous()
            for module, pair in pairs.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
        is_dora = name.startswith("dora")
        if is_dora:
            drawn = torch.Generator().manual_seed(seed)
            tensors |= {
                f"transformer.{module}.lora_magnitude_vector": 0.5 + torch.rand(len(up), generator=drawn)
                for module, (_, up) in pairs.items()
            }
        said = {"transformer.r": 4, "transformer.lora_alpha": alpha, "transformer.target_modules": list(targets)}
        said |= {"transformer.use_dora": True, "transformer.use_rslora": True} if is_dora else {}
        metadata = None if alpha is None else {"lora_adapter_metadata": json.dumps(said), "format": "pt"}
        found[name] = folder / f"{name}.safetensors"
        save_file(tensors, found[name], metadata)
    return found


class Both:
    """The same pipeline with diffusers' transformer and with ours; every call goes to both."""

    def __init__(self, folder: Path) -> None:
        self.theirs = make_pipe(KIND, PRESET)
        self.ours = type(self.theirs)(**self.theirs.components)
        self.ours.transformer = copy.deepcopy(self.theirs.transformer)
        cogx_fast.accelerate(self.ours)
        self.config = self.ours.transformer.config
        self.files = files(folder, self.config)
        self.arguments = inputs(self.config)
        self.arguments["image_rotary_emb"] = self.theirs._prepare_rotary_positional_embeddings(
            8 * self.arguments["hidden_states"].shape[3], 8 * self.arguments["hidden_states"].shape[4],
            self.arguments["hidden_states"].shape[1], torch.device("cpu"),
        )  # fmt: skip

    def do(self, action: Callable[[Any], Any]) -> None:
        answers = [action(pipe) for pipe in (self.theirs, self.ours)]
        assert answers[0] == answers[1]

    def predictions(self, **extra: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            theirs, ours = (
                pipe.transformer(**self.arguments, **extra, return_dict=False)[0] for pipe in (self.theirs, self.ours)
            )
        return theirs, ours

    def check(self, **extra: Any) -> Tensor:
        theirs, ours = self.predictions(**extra)
        assert relative_error(ours, theirs) < 2e-5
        return theirs


ACTIONS: dict[str, Callable[[Both, Any], Any]] = {
    "load one": lambda both, pipe: pipe.load_lora_weights(both.files["one"], adapter_name="one"),
    "load two": lambda both, pipe: pipe.load_lora_weights(both.files["two"], adapter_name="two"),
    "load three": lambda both, pipe: pipe.load_lora_weights(both.files["three"], adapter_name="three"),
    "load dora": lambda both, pipe: pipe.load_lora_weights(both.files["dora"], adapter_name="dora"),
    "load bare dora": lambda both, pipe: pipe.load_lora_weights(
        both.files["dora without metadata"], adapter_name="bare dora"
    ),
    "doras": lambda both, pipe: pipe.set_adapters(["dora", "two", "bare dora"], [0.7, -0.4, 0.9]),
    "doras reversed": lambda both, pipe: pipe.set_adapters(["bare dora", "two", "dora"], [0.9, 0.4, 0.0]),
    "dora": lambda both, pipe: pipe.set_adapters("dora", 0.5),
    "both": lambda both, pipe: pipe.set_adapters(["one", "two"], [0.7, -0.4]),
    "one": lambda both, pipe: pipe.set_adapters("one"),
    "one by part": lambda both, pipe: pipe.set_adapters("one", {"transformer": {"transformer_blocks.0.attn1": 0.3}}),
    "disable": lambda both, pipe: pipe.disable_lora(),
    "enable": lambda both, pipe: pipe.enable_lora(),
    "fuse": lambda both, pipe: pipe.fuse_lora(components=["transformer"]),
    "fuse scaled": lambda both, pipe: pipe.fuse_lora(components=["transformer"], lora_scale=0.6),
    "fuse two": lambda both, pipe: pipe.fuse_lora(components=["transformer"], adapter_names=["two"]),
    "unfuse": lambda both, pipe: pipe.unfuse_lora(components=["transformer"]),
    "delete one": lambda both, pipe: pipe.delete_adapters("one"),
    "delete two": lambda both, pipe: pipe.delete_adapters(["two"]),
    "unload": lambda both, pipe: pipe.unload_lora_weights(),
    "listed": lambda both, pipe: (pipe.get_list_adapters(), pipe.get_active_adapters(), sorted(pipe.fused_loras)),
}
SEQUENCES = [
    "load one, load two, both, one, one by part, both, disable, enable, delete two, unload",
    "load one, load two, load three, listed, delete one, listed, both of two and three",
    "load two, fuse, listed, unfuse, fuse scaled, unfuse, unload",
    "load one, load two, both, fuse two, one, unfuse, both, fuse, unload, load three, listed, unload",
    "load dora, load two, load bare dora, doras, doras reversed, disable, enable, fuse, unfuse, dora, listed, unload",
    "load dora, load bare dora, dora, fuse, unload, load bare dora, fuse scaled, unload, load dora, dora, unload",
]


@pytest.mark.filterwarnings("ignore")
@for_each("sequence", SEQUENCES)
def test_each_step_predicts_what_diffusers_does(sequence: str, tmp_path: Path) -> None:
    both = Both(tmp_path)
    last = both.check()
    for step in sequence.split(", "):
        if step == "both of two and three":
            both.do(lambda pipe: pipe.set_adapters(["two", "three"], [0.5, 0.5]))
        else:
            both.do(lambda pipe, step=step: ACTIONS[step](both, pipe))  # type: ignore[misc]
        theirs = both.check()
        assert not step.startswith("load") or (theirs - last).abs().max() > 1e-3, step
        last = theirs
    if "fuse, unload" not in sequence and sequence.endswith("unload"):
        fresh = cogx_fast.load(make_pipe(KIND, PRESET).transformer)
        assert torch.equal(both.predictions()[1], fresh(**both.arguments).sample)


@pytest.mark.filterwarnings("ignore")
def test_a_call_scales_active_adapters(tmp_path: Path) -> None:
    both = Both(tmp_path)
    both.do(lambda pipe: ACTIONS["load two"](both, pipe))
    plain = both.check()
    scaled = both.check(attention_kwargs={"scale": 0.3})
    assert relative_error(scaled, plain) > 1e-3
    assert torch.equal(both.check(), plain)
    both.do(lambda pipe: ACTIONS["load dora"](both, pipe))
    assert relative_error(both.check(attention_kwargs={"scale": 0.3}), both.check()) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_would_not_see_is_loaded_and_what_is_wrong_is_refused(tmp_path: Path) -> None:
    """CogKit's files have no prefix: diffusers warns, and loads nothing."""
    both = Both(tmp_path)
    pipe, plain = both.ours, both.predictions()[1]
    tensors = {
        f"{module}.lora_{half}.weight": tensor.contiguous()
        for module, pair in halves(config=both.config).items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    pipe.load_lora_weights(dict(tensors), adapter_name="bare")
    changed = both.predictions()[1]
    assert relative_error(changed, plain) > 1e-3
    with pytest.raises(ValueError, match="'bare' is there already: choose another adapter_name"):
        pipe.load_lora_weights(dict(tensors), adapter_name="bare")
    wrong = {name.replace("attn1", "attn7"): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"have no place in this model: transformer_blocks\.0\.attn7"):
        pipe.load_lora_weights(wrong, adapter_name="wrong")
    assert torch.equal(both.predictions()[1], changed)
    assert pipe.get_list_adapters() == {"transformer": ["bare"]}
    half = {name: 2 * tensor for name, tensor in tensors.items()}
    pipe.load_lora_weights(half, adapter_name="bare", hotswap=True)
    assert relative_error(both.predictions()[1], changed) > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(both.predictions()[1], plain)


@pytest.mark.filterwarnings("ignore")
def test_they_work_compiled_quantized_and_copied_without_compiling_again(tmp_path: Path) -> None:
    from cogx_fast.runtime.compiling.compile import watch_compilation

    pipe = make_pipe(KIND, PRESET)
    pipe.transformer.bfloat16().save_pretrained(tmp_path / "model")
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    cogx_fast.accelerate(pipe, quant="int8-weight-only", compile=True)
    model = pipe.transformer
    arguments = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs(model.config).items()
    }
    with torch.no_grad():
        plain = model(**arguments).sample
        with watch_compilation() as seen:
            pipe.load_lora_weights(files(tmp_path, model.config)["two"], adapter_name="two")
            changed = model(**arguments).sample
            other = copy.deepcopy(model)
            pipe.disable_lora()
            assert torch.equal(model(**arguments).sample, plain)
        assert seen.graphs == 0
        assert relative_error(changed, plain) > 1e-2
        assert torch.equal(other(**arguments).sample, changed)
        other.disable_lora()
        assert torch.equal(other(**arguments).sample, plain)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trains_as_on_diffusers_model_and_diffusers_loads_what_is_saved(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    both = Both(tmp_path)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
    losses: list[float] = []
    begin: dict[str, Tensor] = {}
    for pipe in (both.theirs, both.ours):
        model = pipe.transformer.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian"))
        begin = begin or {name: each.clone() for name, each in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, begin)
        model.enable_gradient_checkpointing()
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            loss = model(**both.arguments).sample.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    assert losses[2] < losses[0]
    trained_by = [get_peft_model_state_dict(pipe.transformer) for pipe in (both.theirs, both.ours)]
    assert trained_by[0].keys() == trained_by[1].keys()
    both.ours.save_lora_weights(tmp_path / "lora", trained_by[1])
    expected = both.predictions()[1]
    pipe = make_pipe(KIND, PRESET)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.set_adapters("default_0", 6 / 2)  # the file says no alpha
    with torch.no_grad():
        assert relative_error(pipe.transformer(**both.arguments).sample, expected) < 2e-5
    both.ours.transformer.unload_lora()
    both.ours.load_lora_weights(tmp_path / "lora", adapter_name="trained")
    both.ours.set_adapters("trained", 6 / 2)
    assert relative_error(both.predictions()[1], expected) < 2e-5
    both.ours.unload_lora_weights()
    fresh = cogx_fast.load(make_pipe(KIND, PRESET).transformer)
    assert both.ours.transformer.state_dict().keys() == fresh.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(both.ours.transformer(**both.arguments).sample, fresh(**both.arguments).sample)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_methods_work_on_adapters_to_train_as_on_its_own_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    both = Both(tmp_path)
    plain = both.check()

    def add(pipe: Any, name: str, rank: int, **options: Any) -> None:
        model = pipe.transformer
        targets = ["to_q", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=rank, target_modules=targets, init_lora_weights="gaussian", **options), name)
        held = get_peft_model_state_dict(model, adapter_name=name)
        drawn = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            values = {key: torch.randn(held[key].shape, generator=drawn) * 0.3 for key in sorted(held)}
        set_peft_model_state_dict(model, values, adapter_name=name)

    steps: list[Callable[[Any], Any]] = [
        lambda pipe: add(pipe, "a", 2),
        lambda pipe: add(pipe, "b", 3, use_dora=True, use_rslora=True),
        lambda pipe: pipe.set_adapters(["a", "b"], [0.7, -0.4]),
        lambda pipe: (pipe.get_list_adapters(), pipe.get_active_adapters()),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(components=["transformer"], lora_scale=0.5),
        lambda pipe: pipe.unfuse_lora(components=["transformer"]),
        lambda pipe: pipe.load_lora_weights(both.files["one"], adapter_name="one"),
        lambda pipe: pipe.set_adapters(["a", "one"]),
        lambda pipe: pipe.delete_adapters("a"),
    ]
    for step in steps:
        both.do(step)
        both.check(attention_kwargs={"scale": 0.3})
        both.check()
    with pytest.raises(ValueError, match="wrong"):
        both.ours.set_adapters("wrong")
    with pytest.raises(ValueError, match=r"call unload_lora\(\) first"):
        both.ours.transformer.set_loras([both.files["two"]])
    both.do(lambda pipe: pipe.set_adapters("b"))
    for pipe, folder in ((both.theirs, "theirs"), (both.ours, "ours")):
        pipe.transformer.save_lora_adapter(tmp_path / folder, adapter_name="b")
    saved = [load_file(tmp_path / folder / "pytorch_lora_weights.safetensors") for folder in ("theirs", "ours")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    expected = both.check()
    both.do(lambda pipe: pipe.delete_adapters(["b", "one"]))
    assert relative_error(both.check(), plain) < 1e-5
    assert not both.ours.transformer.transformer_blocks[0].attn1.is_split
    both.ours.transformer.load_lora_adapter(tmp_path / "theirs", prefix=None, adapter_name="b")  # merged now
    assert relative_error(both.predictions()[1], expected) < 2e-5
    with pytest.raises(ValueError, match="their files are there already"):
        both.ours.transformer.save_lora_adapter(tmp_path / "again")


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_trained_is_refused_and_the_model_is_as_before(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = cogx_fast.load(make_pipe(KIND, PRESET).transformer)
    arguments = inputs(model.config)
    plain = model(**arguments).sample
    for targets, message in (
        (["to_q", "norm1.linear"], r"target_modules norm1\.linear are not apart"),
        (["to_q", "add_k_proj"], "add_k_proj are not apart"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter(LoraConfig(r=2, target_modules=targets))
        assert torch.equal(model(**arguments).sample, plain)
    with pytest.raises(ValueError, match=r"to train one, model\.add_adapter\(config\)"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["to_out.0"]))
    assert torch.equal(model(**arguments).sample, plain)
    files_ = files(tmp_path, model.config)
    model.load_lora_adapter(files_["one"])
    with pytest.raises(ValueError, match=r"call unload_lora\(\) before one is trained"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model.unload_lora()
    assert torch.equal(model(**arguments).sample, plain)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model.unload_lora()
    assert torch.equal(cogx_fast.load(model)(**arguments).sample, plain)  # nothing of either is left on it
    quantized = cogx_fast.load(make_pipe(KIND, PRESET).transformer, quant="int8-weight-only")
    with pytest.raises(ValueError, match="is quantized: load it without quant"):
        quantized.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
