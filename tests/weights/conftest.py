"""What tests of quantized checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.weights.quantized import quantized


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An int8 model and where it is saved. Not to be changed."""
    model, directory = quantized("int8-weight-only"), tmp_path_factory.mktemp("int8")
    model.save_pretrained(directory)
    return model, directory
