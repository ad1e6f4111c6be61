from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cogx_fast.assets import tiny_pipeline_dir
from cogx_fast.cli.info import describe
from cogx_fast.config import PRESETS
from cogx_fast.pipelines.locate import Model, ModelNotFoundError, locate, locate_pipeline, read_stored_weights
from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir(), tmp_path / "pipeline"))


def test_every_way_to_name_a_model(pipeline: Path) -> None:
    kinds = {
        "tiny": "preset",
        str(pipeline): "pipeline",
        str(pipeline / "model_index.json"): "pipeline",
        str(pipeline / "transformer"): "transformer",
        str(pipeline / "transformer" / "config.json"): "configuration",
        str(pipeline / "transformer" / WEIGHTS): "transformer",
    }
    models = {name: locate(name) for name in kinds}
    assert {name: model.kind for name, model in models.items()} == kinds
    assert all(model.config == PRESETS["tiny"] for model in models.values())
    assert models[str(pipeline)].pipeline_class == "CogVideoXPipeline"


def test_a_pipeline_by_its_short_name() -> None:
    model = locate_pipeline("tiny")
    assert (model.kind, model.location, model.spatial_factor) == ("pipeline", str(tiny_pipeline_dir()), 8)


def test_the_vae_says_how_large_a_latent_pixel_is(pipeline: Path) -> None:
    path = pipeline / "vae" / "config.json"
    config = json.loads(path.read_text())
    config["block_out_channels"] = [16, 32, 64]
    path.write_text(json.dumps(config))
    model = locate(str(pipeline))
    assert model.spatial_factor == 4
    facts = describe(model, frames=None, height=None, width=None, batch=2)
    assert (facts["video"]["height"], facts["tokens"]["grid"]) == (32, [5, 4, 4])


def test_what_the_headers_say(pipeline: Path) -> None:
    stored = read_stored_weights(locate(str(pipeline)))
    assert stored is not None
    assert (stored.files, stored.parameters, dict(stored.dtypes)) == (1, 4_570_528, {"BF16": 4_570_528})
    assert stored.bytes == (pipeline / "transformer" / WEIGHTS).stat().st_size


def test_without_weights_there_is_still_a_configuration(pipeline: Path) -> None:
    (pipeline / "transformer" / WEIGHTS).unlink()
    model = locate(str(pipeline))
    assert read_stored_weights(model) is None
    assert describe(model, frames=None, height=None, width=None, batch=2)["stored"] is None


def test_weights_of_another_model_are_seen(pipeline: Path) -> None:
    tensors = load_file(pipeline / "transformer" / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, pipeline / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match=r"hold 4,570,496 parameters, its config\.json describes 4,570,528"):
        describe(locate(str(pipeline)), frames=None, height=None, width=None, batch=2)


def test_damaged_weights_are_seen(pipeline: Path) -> None:
    path = pipeline / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_stored_weights(locate(str(pipeline)))


def test_damaged_pipelines(pipeline: Path, tmp_path: Path) -> None:
    def refused(name: Path) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            locate(str(name))
        return str(caught.value)

    (tmp_path / "notes.txt").touch()
    assert "expected .safetensors or config.json" in refused(tmp_path / "notes.txt")
    shutil.copy(pipeline / "transformer" / WEIGHTS, tmp_path / WEIGHTS)
    assert "has no config.json beside it" in refused(tmp_path / WEIGHTS)
    assert "_class_name is 'AutoencoderKLCogVideoX'" in refused(pipeline / "vae")
    (pipeline / "vae" / "config.json").unlink()
    assert "has no vae/config.json" in refused(pipeline)
    (pipeline / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": []}')
    assert "is a FluxPipeline, expected a CogVideoX pipeline" in refused(pipeline)
    (pipeline / "model_index.json").write_text("[]")
    assert "got a JSON list" in refused(pipeline)
    (pipeline / "model_index.json").write_text("{")
    assert "not valid JSON" in refused(pipeline)


def test_a_hub_id_goes_to_the_hub(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(hub_id: str, patterns: list[str]) -> Path:
        asked.append((hub_id, patterns))
        return pipeline

    monkeypatch.setattr("cogx_fast.weights.hub.download", download)
    model: Model = locate_pipeline("owner/video")
    assert (model.location, model.name) == ("owner/video", "owner/video")
    assert locate_pipeline("5b").location == "THUDM/CogVideoX-5b"
    assert [hub_id for hub_id, _ in asked] == ["owner/video", "THUDM/CogVideoX-5b"]
    assert not any("safetensors" in pattern for _, patterns in asked for pattern in patterns)  # no weights


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, patterns: list[str]) -> Path:
        raise CheckpointNotFoundError(f"{hub_id}: cannot be reached")

    monkeypatch.setattr("cogx_fast.weights.hub.download", download)
    with pytest.raises(CheckpointNotFoundError, match=r"cannot be reached \('cogx-fast info 2b' needs no files\)"):
        locate("THUDM/CogVideoX-2b")
    with pytest.raises(ModelNotFoundError, match="no hub id"):
        locate("not/a/hub/id")
