"""What a model was called with is kept as it was, and read back or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quant import QuantError
from quant.calibration import load_calibration, recording, save_calibration


class Model(nn.Module):
    def forward(self, *, hidden_states: Tensor, timestep: float, ofs: Tensor | None = None) -> Tensor:
        return hidden_states.mul_(timestep)


def record(every: int = 1) -> list[dict[str, Tensor]]:
    model = Model()
    with recording(model, every=every) as samples:
        for step in range(5):
            model(hidden_states=torch.full((1, 2), float(step), dtype=torch.bfloat16), timestep=2.0)
    model(hidden_states=torch.zeros(1, 2), timestep=1.0)  # no longer looked at
    return samples


def test_calls_are_kept_as_they_were_before_the_model_changed_them() -> None:
    samples = record()
    assert [sample["hidden_states"].tolist() for sample in samples] == [[[float(i)] * 2] for i in range(5)]
    assert samples[0]["hidden_states"].dtype == torch.bfloat16
    assert all(set(sample) == {"hidden_states", "timestep"} for sample in samples)
    assert [sample["hidden_states"][0, 0].item() for sample in record(every=2)] == [0, 2, 4]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path, samples = tmp_path / "c.safetensors", record()
    save_calibration(path, samples, {"prompts": ["ä"], "steps": 5})
    save_calibration(path, samples, {"prompts": ["ä"], "steps": 5})
    read, about = load_calibration(path)
    assert about == {"prompts": ["ä"], "steps": 5}
    for before, after in zip(samples, read, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in after)
    assert [each.name for each in tmp_path.iterdir()] == ["c.safetensors"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match="there are no calibration inputs"):
        load_calibration(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(QuantError, match=r"c\.safetensors: holds no calibration inputs, or is damaged"):
        load_calibration(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(QuantError, match="holds no calibration inputs"):
        load_calibration(path)
    save_file({"0.x": torch.zeros(1)}, path, metadata={"samples": "2", "about": "{}"})
    with pytest.raises(QuantError, match="some of its 2 calibration inputs are empty"):
        load_calibration(path)
    with pytest.raises(QuantError, match="no calibration inputs to save"):
        save_calibration(path, [], {})
    with pytest.raises(QuantError, match="every is 0"), recording(Model(), every=0):
        pass
