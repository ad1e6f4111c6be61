"""Files of compiled code are whole, unchanged and what they say they are, or they are refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest

from cogx_fast.runtime.code_file import ArtifactError, differences, read_artifact, write_artifact
from tests.cases import for_each

MEMBERS = {"a.bin": bytes(range(256)) * 4, "b/c.so": b"\x7fELF" + b"x" * 300}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "file", "thing", {"versions": {"torch": "1"}}, MEMBERS)
    return tmp_path / "file"


def test_what_was_written_is_read(path: Path) -> None:
    manifest, members = read_artifact(path, "thing")
    assert members == MEMBERS
    assert manifest["versions"] == {"torch": "1"}
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_another_kind_or_format_is_refused(path: Path) -> None:
    with pytest.raises(ArtifactError, match="kind is 'thing', expected 'other'"):
        read_artifact(path, "other")
    rewrite(path, lambda manifest: manifest | {"format": 99})
    with pytest.raises(ArtifactError, match="format 99"):
        read_artifact(path, "thing")


def test_every_truncation_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read_artifact(path, "thing")


def test_a_flipped_bit_is_refused_or_changes_nothing(path: Path) -> None:
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            manifest, members = read_artifact(path, "thing")
        except ArtifactError:
            refused += 1
        else:  # dates and attributes of the zip, which nobody reads
            assert members == MEMBERS
            assert manifest["versions"] == {"torch": "1"}
    assert refused > len(whole) / 2


def test_contents_that_the_manifest_does_not_know_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("more.so", b"code")
    with pytest.raises(ArtifactError, match=r"not those of its manifest \(more\.so\)"):
        read_artifact(path, "thing")


def test_contents_that_were_exchanged_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        manifest = file.read("manifest.json")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("manifest.json", manifest)
        for name in MEMBERS:
            file.writestr(name, b"other code")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_artifact(path, "thing")


@for_each("content", [b"", b"PK", b"hello", pickle.dumps({"kind": "thing"}), b'{"kind": "thing"}'])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged, or not a thing"):
        read_artifact(tmp_path / "file", "thing")


def test_a_zip_of_someone_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as file:
        file.writestr("data.pkl", b"")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_artifact(tmp_path / "file", "thing")


def test_a_failed_write_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_artifact(path, "thing", {}, MEMBERS)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_differences_name_the_field() -> None:
    found = {"versions": {"torch": "2.12", "more": 1}, "config": "a"}
    assert list(differences(found, {"versions": {"torch": "2.13"}, "config": "a", "dtype": "bf16"})) == [
        "versions.torch: got '2.12', expected '2.13'",
        "dtype: got None, expected 'bf16'",
    ]
    assert list(differences(found, {"config": "a"})) == []


def rewrite(path: Path, change: object) -> None:
    """The same file with another manifest."""
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    contents["manifest.json"] = json.dumps(change(json.loads(contents["manifest.json"]))).encode()  # type: ignore[operator]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in contents.items():
            file.writestr(name, data)
