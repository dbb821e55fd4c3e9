"""Objects of a view go back into a store: checked, and without a second copy."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from surgeon.errors import CorruptObjectError, EvictedError, NondeterminismError
from surgeon.store import Reference, Store, SymmetricMatrix, build_view, digest_text, take_in

FACTORS, COSTS, OLD = (digest_text(name) for name in ("factors", "costs", "old"))
ENTRIES = {"shot-01/block-07": COSTS, "shot-01/block-07/factors": FACTORS, "shot-00/factors": OLD}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    matrix = SymmetricMatrix.from_full(np.arange(9, dtype=np.float32).reshape(3, 3))
    store.commit(FACTORS, "factors", {"A": matrix, "sub/mask": np.array([True, False])}, {"n_tokens": 5})
    store.commit(COSTS, "costs", {"rows": np.arange(4.0)}, {"sum": 6.0})
    store.commit(OLD, "factors", {"A": np.ones((2, 2))}, {"n_tokens": 7})
    store.evict(OLD)
    build_view(store, ENTRIES, tmp_path / "run.zarr")
    return store


def references(store: Store) -> dict[str, Reference]:
    return {name: ref for name, key in ENTRIES.items() if (ref := store.lookup(key, label=name)) is not None}


def contents(store: Store, key: str) -> dict[str, tuple[bytes, int]]:
    files = [path for path in store.path(key).rglob("*") if path.is_file() and path.name != "record.json"]
    return {path.relative_to(store.path(key)).as_posix(): (path.read_bytes(), path.stat().st_ino) for path in files}


def test_a_whole_view_comes_back_as_the_same_files(store: Store, tmp_path: Path) -> None:
    found = references(store)
    before = {key: contents(store, key) for key in (FACTORS, COSTS)}
    other = Store(tmp_path / "other")
    assert [take_in(other, ref, tmp_path / "run.zarr" / name) for name, ref in found.items()] == [True] * 3
    assert references(other) == found
    for key, files in before.items():
        assert contents(other, key) == files
        other.verify(key)
        assert other.record(key)["taken_in"]
    assert not other.has_payload(OLD)
    with pytest.raises(EvictedError):
        other.open(OLD)
    assert [take_in(other, ref, tmp_path / "run.zarr" / name) for name, ref in found.items()] == [False] * 3
    assert list((other.root / "tmp").iterdir()) == []


def test_links_into_a_cache_on_another_disk(store: Store, tmp_path: Path) -> None:
    view, cache = tmp_path / "run.zarr", tmp_path / "cache"
    shutil.copytree(view, cache)
    for path in view.rglob("*"):
        if path.is_file():
            path.unlink()
            path.symlink_to(cache / path.relative_to(view))
    other = Store(tmp_path / "other")
    for name, reference in references(store).items():
        assert take_in(other, reference, view / name)
    other.verify(FACTORS)
    assert not any(path.is_symlink() for path in other.root.rglob("*"))


def test_an_evicted_object_gets_its_arrays(store: Store, tmp_path: Path) -> None:
    store.evict(COSTS)
    name = "shot-01/block-07"
    assert take_in(store, references(store)[name], tmp_path / "run.zarr" / name)
    store.verify(COSTS)


@pytest.mark.parametrize("damage", ["flip", "missing chunk", "other attributes", "no array", "other key", "no group"])
def test_damage_is_refused(store: Store, tmp_path: Path, damage: str) -> None:
    name = "shot-01/block-07"
    reference, group = references(store)[name], tmp_path / "run.zarr" / name
    for path in list(group.rglob("*")):
        if path.is_file():  # a copy, for the store has the same file
            text = path.read_bytes()
            path.unlink()
            path.write_bytes(text)
    chunk, metadata = group / "rows" / "c" / "0", group / "zarr.json"
    if damage == "flip":
        content = bytearray(chunk.read_bytes())
        content[3] ^= 1
        chunk.write_bytes(content)
    elif damage == "missing chunk":
        chunk.unlink()
    elif damage == "other attributes":
        metadata.write_text(metadata.read_text().replace("6.0", "7.0"))
    elif damage == "no array":
        (group / "rows" / "zarr.json").unlink()
    elif damage == "other key":
        metadata.write_text(re.sub(COSTS, FACTORS, metadata.read_text()))
    else:
        metadata.unlink()
    other = Store(tmp_path / "other")
    with pytest.raises(CorruptObjectError):
        take_in(other, reference, group)
    assert list(other.all_keys()) == list((other.root / "tmp").iterdir()) == []


def test_content_with_a_valid_checksum_but_another_digest_is_refused(store: Store, tmp_path: Path) -> None:
    forged = Store(tmp_path / "forged")
    forged.commit(COSTS, "costs", {"rows": np.arange(4.0) + 1}, {"sum": 6.0})
    group = tmp_path / "run.zarr" / "shot-01/block-07"
    chunk = group / "rows" / "c" / "0"
    chunk.unlink()
    shutil.copyfile(forged.path(COSTS) / "rows" / "c" / "0", chunk)
    other = Store(tmp_path / "other")
    with pytest.raises(CorruptObjectError, match=r"in the view has the digest \w+, but \w+ was committed"):
        take_in(other, references(store)["shot-01/block-07"], group)
    assert list(other.all_keys()) == []


def test_a_reference_alone_gives_way_to_what_is_computed_here(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    take_in(other, references(store)["shot-00/factors"], tmp_path / "run.zarr" / "shot-00/factors")
    computed = {"A": np.full((2, 2), np.nextafter(1.0, 2.0))}
    made = other.commit(OLD, "factors", computed, {"n_tokens": 7})
    assert other.lookup(OLD, label="") == made
    other.verify(OLD)
    # Once computed here, it counts like any other; and one that was evicted here always does.
    for one in (other, store):
        with pytest.raises(NondeterminismError):
            one.commit(OLD, "factors", {"A": np.full((2, 2), 5.0)}, {"n_tokens": 7})
    assert list((other.root / "tmp").iterdir()) == []
