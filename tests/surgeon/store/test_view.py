import errno
import os
import warnings

import numpy as np
import pytest
import zarr

from surgeon.errors import StoreError
from surgeon.store import Store, SymmetricMatrix, build_view, digest_text

FACTORS, COSTS, OLD = (digest_text(name) for name in ("factors", "costs", "old"))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    matrix = SymmetricMatrix.from_full(np.arange(9, dtype=np.float32).reshape(3, 3))
    store.commit(FACTORS, "factors", {"A": matrix, "sub/mask": np.array([True, False])}, {"n_tokens": 5})
    store.commit(COSTS, "costs", {"rows": np.arange(4.0)}, {})
    store.commit(OLD, "factors", {"A": np.ones((2, 2))}, {"n_tokens": 7})
    store.evict(OLD)
    return store


ENTRIES = {
    "shot-03/block-07/self_attn.q_proj": FACTORS,
    "shot-03/block-07": COSTS,
    "shot-02/block-07/self_attn.q_proj": OLD,
    "shot-04/again": FACTORS,
}


def test_view_can_be_walked_with_plain_zarr(store, tmp_path):
    destination = tmp_path / "data/run.zarr"
    build_view(store, ENTRIES, destination)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(destination, mode="r")
        members = dict(group.members(max_depth=None))
    arrays = {name for name, member in members.items() if isinstance(member, zarr.Array)}
    assert arrays == {
        "shot-03/block-07/rows",
        "shot-03/block-07/self_attn.q_proj/A",
        "shot-03/block-07/self_attn.q_proj/sub/mask",
        "shot-04/again/A",
        "shot-04/again/sub/mask",
    }
    assert {"shot-03", "shot-02/block-07/self_attn.q_proj"} < set(members) - arrays
    np.testing.assert_array_equal(members["shot-03/block-07/rows"][...], np.arange(4.0))
    packed = members["shot-04/again/A"]
    np.testing.assert_array_equal(packed[...], [0, 3, 4, 6, 7, 8])
    assert dict(packed.attrs) == {"layout": "lower-triangle", "n": 3}
    evicted = members["shot-02/block-07/self_attn.q_proj"]
    assert evicted.attrs["reference"]["attributes"] == {"n_tokens": 7}
    assert list(evicted.members()) == []
    assert [item.name for item in destination.parent.iterdir()] == ["run.zarr"]


def test_files_are_hard_links(store, tmp_path):
    build_view(store, ENTRIES, tmp_path / "run.zarr")

    linked = tmp_path / "run.zarr/shot-03/block-07/self_attn.q_proj/A/c/0"
    assert linked.stat().st_nlink == 3
    assert linked.samefile(store.path(FACTORS) / "A/c/0")


def test_view_outlives_eviction(store, tmp_path):
    build_view(store, ENTRIES, tmp_path / "run.zarr")
    store.evict(COSTS)

    np.testing.assert_array_equal(zarr.open_group(tmp_path / "run.zarr", mode="r")["shot-03/block-07/rows"], range(4))


def test_copies_where_links_are_impossible(store, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    build_view(store, ENTRIES, tmp_path / "run.zarr")
    monkeypatch.undo()

    assert (tmp_path / "run.zarr/shot-04/again/A/c/0").stat().st_nlink == 1
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "run.zarr", mode="r")["shot-03/block-07/rows"], range(4))


def test_second_view_replaces_the_first(store, tmp_path):
    destination = tmp_path / "run.zarr"
    build_view(store, ENTRIES, destination)
    build_view(store, {"only": COSTS}, destination)

    assert [name for name, _ in zarr.open_group(destination, mode="r").members()] == ["only"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run.zarr", "store"]


def test_the_same_view_is_left_alone(store, tmp_path):
    destination = tmp_path / "run.zarr"
    build_view(store, ENTRIES, destination)
    before = destination.stat().st_ino
    build_view(store, ENTRIES, destination)
    assert destination.stat().st_ino == before

    store.evict(COSTS)
    build_view(store, ENTRIES, destination)
    assert destination.stat().st_ino != before
    assert list(zarr.open_group(destination, mode="r")["shot-03/block-07"].members()) != []
    assert "rows" not in zarr.open_group(destination, mode="r")["shot-03/block-07"]


def test_an_object_made_again_is_linked_again(store, tmp_path):
    """It was damaged, and so is the file that the view has of it."""
    destination = tmp_path / "run.zarr"
    build_view(store, {"only": COSTS}, destination)
    store.quarantine(COSTS)
    store.commit(COSTS, "costs", {"rows": np.arange(4.0)}, {})
    build_view(store, {"only": COSTS}, destination)
    assert (destination / "only/rows/c/0").samefile(store.path(COSTS) / "rows/c/0")


def test_failure_keeps_the_earlier_view(store, tmp_path):
    destination = tmp_path / "run.zarr"
    build_view(store, {"only": COSTS}, destination)

    with pytest.raises(StoreError, match="entry 'new' names the object"):
        build_view(store, {"new": digest_text("nothing")}, destination)
    assert [name for name, _ in zarr.open_group(destination, mode="r").members()] == ["only"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run.zarr", "store"]


def test_conflicts(store, tmp_path):
    with pytest.raises(StoreError, match=r"'a/sub' claims a/sub/zarr\.json, where another entry lies"):
        build_view(store, {"a": FACTORS, "a/sub": COSTS}, tmp_path / "run.zarr")
    with pytest.raises(StoreError, match="'a/A/deep' claims a/A, where another entry lies"):
        build_view(store, {"a": FACTORS, "a/A/deep": COSTS}, tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="cannot name an array or a group"):
        build_view(store, {"../a": FACTORS}, tmp_path / "run.zarr")


def test_what_is_no_view_is_not_replaced(store, tmp_path):
    (tmp_path / "precious").mkdir()
    with pytest.raises(StoreError, match="exists and is no view"):
        build_view(store, ENTRIES, tmp_path / "precious")
    with pytest.raises(StoreError, match="exists and is no view"):
        build_view(store, ENTRIES, store.path(COSTS))
