"""Files that are there whole, or as they were."""

import pytest

from cogx_fast.whole_file import whole_file, write_whole


def test_what_raises_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.toml"
    write_whole(path, "first")

    def fail() -> None:
        with whole_file(path) as hidden:
            hidden.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.toml", "first")]


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "a.toml"
    for text in ("first", "zweite Fassung, länger"):
        write_whole(path, text)
        assert [(each.name, each.read_text(encoding="utf-8")) for each in tmp_path.iterdir()] == [("a.toml", text)]


def test_a_name_keeps_its_suffix_while_it_is_written(tmp_path):
    with whole_file(tmp_path / "a.npz") as hidden:
        assert (hidden.suffix, hidden.parent) == (".npz", tmp_path)
        hidden.write_bytes(b"")
