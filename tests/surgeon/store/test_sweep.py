"""What is in a store and how large it is, and its removal, also when killed half-way."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from surgeon.errors import StoreError
from surgeon.store import Size, Store, build_view, digest_text, size_of, survey, sweep

ROOT = Path(__file__).parents[3]
KEYS = [digest_text(f"object {n}") for n in range(12)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for n, key in enumerate(KEYS):
        store.commit(key, "costs" if n % 2 else "update", {"a": np.full(50, float(n))}, {"n": n})
    return store


def test_survey_says_kind_age_and_size(store: Store, tmp_path: Path) -> None:
    build_view(store, {"shot/a": KEYS[0]}, tmp_path / "run.zarr")
    entries = {entry.key: entry for entry in survey(store)}
    assert set(entries) == set(KEYS)
    assert [entries[key].kind for key in KEYS[:2]] == ["update", "costs"]
    assert datetime.now(UTC) - entries[KEYS[0]].created < timedelta(minutes=5)
    for key in KEYS:
        assert entries[key].size.n_bytes == store.size_bytes(key) > 400
    assert entries[KEYS[1]].size.alone_bytes == entries[KEYS[1]].size.n_bytes
    # All but the record has a second name in the view.
    assert entries[KEYS[0]].size.alone_bytes == (store.path(KEYS[0]) / "record.json").stat().st_size


def test_a_damaged_object_is_seen(store: Store) -> None:
    (store.path(KEYS[3]) / "zarr.json").write_text("{")
    (store.path(KEYS[3]) / "record.json").unlink()
    entries = {entry.key: entry for entry in survey(store)}
    assert entries[KEYS[3]].kind == "damaged"
    assert datetime.now(UTC) - entries[KEYS[3]].created < timedelta(minutes=5)
    sweep(store, [KEYS[3]])
    assert KEYS[3] not in set(store.all_keys())


def test_sweep_removes_these_and_no_others(store: Store) -> None:
    sweep(store, KEYS[:5])
    assert sorted(store.all_keys()) == sorted(KEYS[5:])
    assert list((store.root / "tmp").iterdir()) == list((store.root / "locks").iterdir()) == []
    for key in KEYS[5:]:
        store.verify(key)
    with pytest.raises(StoreError, match="has no object"):
        store.delete(KEYS[0])
    assert size_of(store.path(KEYS[0])) == Size()


def test_killed_half_way_the_store_is_valid(store: Store) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import surgeon.store.moves as module
from surgeon.store import Store, sweep
root, *keys = sys.argv[1:]
remove_tree, n = module.remove_tree, 0
def remove(path):
    global n
    n += 1
    if n == 4:  # half of the fourth object is gone
        next(Path(path).rglob("c/*")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    remove_tree(path)
module.remove_tree = remove
sweep(Store(Path(root)), keys)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, store.root, *KEYS], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(store.all_keys()) == sorted(KEYS[4:])
    for key in KEYS[4:]:
        store.verify(key)
    assert len(store.clear_stale_tmp()) == 1
    sweep(store, KEYS[4:])
    assert list(store.all_keys()) == list((store.root / "tmp").iterdir()) == []
    assert store.lookup(KEYS[0]) is None
