"""A store on file systems that cannot rename directories, give files second names, or lock files."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from surgeon.errors import EvictedError, NondeterminismError, StoreError
from surgeon.store import Presence, Store, alone, build_view, digest_text, moves
from surgeon.store.abilities import _mount_renames, locks_work

KEY = digest_text("one object")
CODE = """
import errno, os, signal, sys
from pathlib import Path
import numpy as np
rename = os.rename
def refused(source, target, **given):
    if Path(source).is_dir():
        raise OSError(errno.EXDEV, "Invalid cross-device link")
    rename(source, target, **given)
os.rename = refused
from surgeon.store import Store, moves
left, action = int(sys.argv[3]), sys.argv[4]
store = Store(Path(sys.argv[1]))
def counted(method):
    def call(*given, **more):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(*given, **more)
    return call
moves.shutil.copyfile = counted(moves.shutil.copyfile)
moves.write_file = counted(moves.write_file)
moves.sync = counted(moves.sync)
moves.sync_tree = counted(moves.sync_tree)
moves.remove_tree = counted(moves.remove_tree)
if action == "commit":
    store.commit(sys.argv[2], "test", {"x": np.arange(5000.0), "g/y": np.ones(3)}, {"n": 1})
else:
    getattr(store, action)(sys.argv[2])
print("whole")
"""


def arrays(seed=0.0):
    return {"x": np.arange(5000.0) + seed, "g/y": np.ones(3)}


def commit(store, seed=0.0):
    return store.commit(KEY, "test", arrays(seed), {"n": 1})


@pytest.fixture(params=[errno.EXDEV, errno.EPERM, errno.ENOTSUP, "s3fs"])
def no_renames(request, monkeypatch):
    """Renaming a directory fails, or succeeds on a file system that is known to do so file by file."""
    _mount_renames.cache_clear()
    if request.param == "s3fs":
        mount = psutil.disk_partitions(all=True)[0]._replace(mountpoint="/", fstype="fuse.s3fs")
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: [mount])
    rename = os.rename

    def refused(source, target, **given):
        if Path(source).is_dir():
            assert request.param != "s3fs", "it was renamed"
            raise OSError(request.param, os.strerror(request.param))
        rename(source, target, **given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        yield
    _mount_renames.cache_clear()


@pytest.fixture
def no_links(monkeypatch):
    def refused(*_given, **_more):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)


@pytest.fixture
def no_locks(monkeypatch):
    def refused(*_given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    locks_work.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refused)
    yield
    locks_work.cache_clear()


def test_an_ordinary_file_system_has_no_limits(tmp_path):
    assert Store(tmp_path).limits() == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_all_of_it_without_renames(no_renames, tmp_path):
    store = Store(tmp_path / "store")
    reference = commit(store)
    assert not (store.path(KEY) / "partial").exists()
    store.verify(KEY)
    assert commit(store) == reference
    with pytest.raises(NondeterminismError):
        commit(store, 1.0)
    build_view(store, {"shown": KEY}, tmp_path / "run.zarr")
    store.evict(KEY)
    build_view(store, {"shown": KEY}, tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr" / "shown" / "x").exists()
    with pytest.raises(EvictedError):
        store.open(KEY)
    commit(store)
    store.verify(KEY)
    place = store.quarantine(KEY)
    assert (place / "x" / "c" / "0").is_file()
    assert store.lookup(KEY) is None
    commit(store)
    store.delete(KEY)
    assert list(store.all_keys()) == []
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("action", ["commit", "evict", "delete", "quarantine"])
def test_killed_anywhere_without_renames(tmp_path, action):
    """The object is whole, evicted or not there; and what was asked for can be done again."""
    moments = 0
    while True:
        store = Store(tmp_path / str(moments))
        if action != "commit":
            expected = commit(store)
        done = subprocess.run(
            [sys.executable, "-c", CODE, store.root, KEY, str(moments), action],
            capture_output=True,
            text=True,
            check=False,
        )
        reference = store.lookup(KEY, label="")
        if reference is not None and store.has_payload(KEY):
            store.verify(KEY)
        expected = commit(store)
        assert reference is None or reference.digest == expected.digest
        store.verify(KEY)
        assert not (store.path(KEY) / "partial").exists()
        if done.stdout == "whole\n":
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        moments += 1
    assert moments > 1
    assert (reference is None) == (action in ("delete", "quarantine"))


def test_what_is_said_of_limits(no_links, no_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(moves, "renames_at_once", lambda _directory: False)
    monkeypatch.setattr("surgeon.store.abilities.renames_at_once", lambda _directory: False)
    lines = Store(tmp_path).limits()
    assert len(lines) == 3
    assert all(line.startswith(f"the file system of {tmp_path / 'tmp'} ") for line in lines)
    assert "cannot rename directories at once, so results are copied in place" in lines[0]
    assert "has no hard links, so views are copies" in lines[1]
    assert "has no file locks" in lines[2]


def test_a_view_without_links_is_a_copy(no_links, tmp_path):
    store = Store(tmp_path / "store")
    commit(store)
    build_view(store, {"shown": KEY}, tmp_path / "run.zarr")
    shown = tmp_path / "run.zarr" / "shown" / "x" / "c" / "0"
    stored = store.path(KEY) / "x" / "c" / "0"
    assert shown.read_bytes() == stored.read_bytes()
    assert not shown.samefile(stored)


def test_without_locks_leases_stand_for_them(no_locks, tmp_path):
    store = Store(tmp_path / "store")
    with store.lock(KEY):
        with pytest.raises(StoreError, match=r"was not free within 0\.1 s"), store.lock(KEY, timeout_s=0.1):
            pass
        commit(store)
    store.verify(KEY)
    store.evict(KEY)
    with store.lock(KEY, timeout_s=0.0):
        pass
    assert list((store.root / "locks").iterdir()) == []
    presence = Presence(store.root, "test")
    with (
        pytest.raises(StoreError, match="has no file locks, so it cannot be told whether a process works with it"),
        alone(store.root),
    ):
        pass
    presence.leave()
    assert not list((store.root / "users").iterdir())


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system at /dev/shm")
def test_store_and_view_on_two_real_file_systems(tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert Path(folder).stat().st_dev != tmp_path.stat().st_dev
        store = Store(Path(folder) / "store")
        reference = commit(store)
        assert store.limits() == []
        build_view(store, {"shown": KEY}, tmp_path / "run.zarr")
        assert (tmp_path / "run.zarr/shown/x/c/0").read_bytes() == (store.path(KEY) / "x/c/0").read_bytes()
        moves.move_tree(store.path(KEY), tmp_path / "moved")
        assert store.lookup(KEY) is None
        assert (tmp_path / "moved" / "zarr.json").is_file()
        assert commit(store) == reference
