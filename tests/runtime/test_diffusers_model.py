"""Our model as a diffusers model: its configuration, copies in other processes, diffusers' own functions on it."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

import cogx_fast
from cogx_fast.config import ConfigError, TransformerConfig
from tests.cases import for_each
from tests.pipes import KINDS, generate, make_pipe
from tests.support import RELEASED, inputs, small, upstream

CONFIG = small("5b")


@pytest.fixture
def model() -> Any:
    return cogx_fast.load(upstream(CONFIG))


def predict(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model.config), return_dict=False)[0]


# -- the configuration -------------------------------------------------------------------------------------------------


def test_config_is_a_frozen_dict_as_upstreams(model: Any) -> None:
    theirs = upstream(CONFIG).config
    assert isinstance(model.config, dict)
    assert isinstance(model.config, TransformerConfig)
    public = {key: value for key, value in theirs.items() if not key.startswith("_")}
    assert {**model.config} == dict(model.config) == public
    assert json.loads(json.dumps(model.config)) == public
    assert model.config.get("num_layers") == model.config["num_layers"] == model.config.num_layers == CONFIG.num_layers
    assert model.config.get("nothing", 3) == 3
    for change in (
        lambda config: config.pop("num_layers"),
        lambda config: config.update(num_layers=1),
        lambda config: config.setdefault("a", 1),
        lambda config: config.__delitem__("num_layers"),
    ):
        for config in (model.config, theirs):
            with pytest.raises(Exception):  # noqa: B017, PT011  # upstream raises no other
                change(config)
    with pytest.raises(TypeError, match="register_to_config"):
        model.config["num_layers"] = 1
    with pytest.raises(AttributeError):
        model.config.num_layers = 1


def test_from_config_builds_either_model_without_the_network(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", None)
    theirs = diffusers.CogVideoXTransformer3DModel.from_config(model.config)
    assert theirs.config["num_layers"] == CONFIG.num_layers
    ours, unused = type(model).from_config(theirs.config, num_layers=1, note="x", return_unused_kwargs=True)
    assert type(ours) is type(model)
    assert ours.config.num_layers == 1
    assert unused["note"] == "x"
    assert type(model)(**model.config).config == model.config
    with pytest.raises(ConfigError, match="another model"):
        type(model).from_config({"_class_name": "UNet2DModel"})


def test_save_config_reads_back_as_the_same_model(model: Any, tmp_path: Path) -> None:
    import diffusers

    model.register_to_config(sample_height=16, note="mine")
    model.save_config(tmp_path)
    assert type(model).from_config(type(model).load_config(tmp_path)).config == model.config
    theirs = diffusers.CogVideoXTransformer3DModel
    read = theirs.from_config(theirs.load_config(tmp_path)).config
    assert {key: read[key] for key in model.config} == dict(model.config)
    model.to_json_file(tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == (tmp_path / "config.json").read_text() == model.to_json_string()
    with pytest.raises(ValueError, match="upload_folder"):
        model.save_config(tmp_path / "hub", push_to_hub=True)


def test_what_is_registered_is_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    before = predict(model)
    model.register_to_config(sample_height=16, note="mine")
    model.save_pretrained(tmp_path)
    again = cogx_fast.load(tmp_path)
    assert (again.config.sample_height, again.config.note) == (16, "mine")
    torch.testing.assert_close(predict(model)[..., :1, :1], predict(again)[..., :1, :1])
    assert before.shape != predict(again).shape  # the test's inputs follow the config


def test_a_config_cannot_say_what_the_model_is_not(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_layers=7.*built with num_layers=2"):
        model.register_to_config(num_layers=7)
    learned = cogx_fast.load(upstream(small("5b-i2v")))
    with pytest.raises(ConfigError, match="sample_height=16"):
        learned.register_to_config(sample_height=16)


def test_registering_another_size_changes_no_added_positions() -> None:
    model = cogx_fast.load(upstream(small("2b")))
    call = inputs(model.config)
    before = model(**call, return_dict=False)[0]
    model.register_to_config(max_text_seq_length=2)
    torch.testing.assert_close(model(**call, return_dict=False)[0], before)


# -- averages ----------------------------------------------------------------------------------------------------------


@for_each("name", ["2b", "5b-i2v", "1.5-5b"], "saved_as", ["diffusers' class", "ours"])
def test_averages_are_saved_and_read_as_upstreams(name: str, saved_as: str, tmp_path: Path) -> None:
    import diffusers
    from diffusers.training_utils import EMAModel

    source = upstream(small(name))
    model = cogx_fast.load(copy.deepcopy(source))
    kind = diffusers.CogVideoXTransformer3DModel if saved_as == "diffusers' class" else type(model)
    averages = {
        owner: EMAModel(owner.parameters(), decay=0.5, model_cls=cls, model_config=owner.config)
        for owner, cls in ((source, diffusers.CogVideoXTransformer3DModel), (model, kind))
    }
    for number in range(3):
        with torch.no_grad():
            for owner in averages:
                for parameter in owner.parameters():
                    parameter.mul_(1.5)
        for owner, average in averages.items():
            average.step(owner.parameters())
            average.save_pretrained(tmp_path / f"{type(owner).__module__}{number}")
    want, got = (
        diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / f"{type(owner).__module__}2")
        for owner in averages
    )
    for (key, theirs), ours in zip(want.state_dict().items(), got.state_dict().values(), strict=True):
        tolerance = 1e-5 if key == "patch_embed.pos_embedding" else 0  # made anew by each, not averaged
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance, msg=key)
    assert got.config["decay"] == 0.5
    resumed = EMAModel.from_pretrained(tmp_path / f"{type(model).__module__}2", kind)
    assert resumed.optimization_step == 3
    resumed.step(model.parameters())
    resumed.copy_to(model.parameters())
    assert cogx_fast.load(tmp_path / f"{type(model).__module__}2").config.decay == 0.5


# -- exact types, other processes --------------------------------------------------------------------------------------


@for_each("kind", [kind for kind in KINDS if kind != "CogVideoXPipeline"])
def test_from_pipe_hands_our_model_over(kind: str) -> None:
    import diffusers

    preset = KINDS[kind][0]
    pipe = cogx_fast.accelerate(make_pipe(kind, preset))
    again = getattr(diffusers, kind).from_pipe(diffusers.CogVideoXPipeline.from_pipe(pipe))
    assert again.transformer is pipe.transformer
    again.set_progress_bar_config(disable=True)
    assert (generate(again) == generate(pipe)).all()


def test_equal_to_upstreams_class_and_to_no_other(model: Any) -> None:
    import diffusers

    assert type(model) == diffusers.CogVideoXTransformer3DModel  # noqa: E721
    assert type(model) != diffusers.AutoencoderKLCogVideoX  # noqa: E721
    assert type(model) is not diffusers.CogVideoXTransformer3DModel


def reloaded(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=False)


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": reloaded, "deepcopy": copy.deepcopy}  # noqa: S301


@for_each("how", COPIES, "name, compiled", [*((name, False) for name in RELEASED), ("5b", True)])
def test_copies_compute_the_same_on_weights_of_their_own(how: str, name: str, compiled: bool) -> None:
    from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model

    model = cogx_fast.load(upstream(small(name)))
    model.register_to_config(note="mine")
    if compiled:
        compile_model(model, CompileConfig(backend="eager"))
    want = predict(model)
    copied = COPIES[how](model)
    assert (copied.runner.compilation is not None) == compiled
    assert copied.config == model.config
    assert torch.equal(predict(copied), want)
    with torch.no_grad():
        copied.transformer_blocks[0].attn1.to_qkv.weight.zero_()
    assert torch.equal(predict(model), want)
    assert not torch.equal(predict(copied), want)


def _work(model: Any, want: torch.Tensor) -> None:
    assert torch.equal(predict(model), want)


def test_a_spawned_process_takes_the_model(model: Any) -> None:
    process = torch.multiprocessing.get_context("spawn").Process(target=_work, args=(model, predict(model)))
    process.start()
    process.join()
    assert process.exitcode == 0


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_checkpointing_function_of_the_callers_own_is_used(model: Any) -> None:
    seen: list[Any] = []

    def run(block: Any, *arguments: Any) -> Any:
        seen.append(block)
        return torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)

    model.enable_gradient_checkpointing(run)
    model(**inputs(model.config), return_dict=False)[0].sum().backward()
    assert seen == list(model.transformer_blocks)
    model.enable_gradient_checkpointing()
    model(**inputs(model.config), return_dict=False)
    assert len(seen) == len(model.transformer_blocks)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_inputs_of_another_dtype_are_converted_with_one_warning(model: Any) -> None:
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"dtype='float32'.*torch_dtype=torch\.bfloat16") as told:
        first, _ = predict(model), predict(model)
    assert len(told) == 1
    assert first.dtype == torch.float32
    own = model(**inputs(model.config, dtype=torch.bfloat16), return_dict=False)[0]
    torch.testing.assert_close(first, own.float(), rtol=0.05, atol=0.05)


def test_inputs_that_are_no_floating_point_are_refused(model: Any) -> None:
    call = inputs(model.config)
    call["hidden_states"] = call["hidden_states"].int()
    with pytest.raises(ValueError, match=r"hidden_states is torch\.int32"):
        model(**call)
