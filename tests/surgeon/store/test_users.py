"""Processes that work with a store keep others from cleaning it, and workspaces say that they need it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgeon.errors import StoreError
from surgeon.store import Presence, Store, alone, forget, live_users, register, registered

ROOT = Path(__file__).parents[3]
_ENTER = """
import sys, time
from pathlib import Path
from surgeon.store import Presence
presence = Presence(Path(sys.argv[1]), "surgeon run -S seed=7", lambda line: print(line, flush=True))
print("in", flush=True)
time.sleep(60)
"""
_ALONE = """
import sys, time
from pathlib import Path
from surgeon.store import alone
with alone(Path(sys.argv[1])):
    print("alone", flush=True)
    time.sleep(60)
"""


def started(code: str, root: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, root], env=environment, stdout=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Store(tmp_path / "store").root


def test_a_live_process_keeps_a_clean_out_until_it_is_killed(root: Path) -> None:
    process = started(_ENTER, root)
    try:
        assert line(process) == "in"
        message = rf"in use by process {process.pid} on .* \(surgeon run -S seed=7\), since"
        with pytest.raises(StoreError, match=message), alone(root):
            pass
        assert [user["pid"] for user in live_users(root)] == [process.pid]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with alone(root):
        assert live_users(root) == []
    assert list((root / "users").iterdir()) == []


def test_who_begins_during_a_clean_waits(root: Path) -> None:
    cleaner = started(_ALONE, root)
    assert line(cleaner) == "alone"
    process = started(_ENTER, root)
    try:
        assert line(process) == f"waiting for a process that cleans {root}"
        time.sleep(0.3)
        assert live_users(root) == []
        cleaner.kill()
        assert line(process) == "in"
        assert len(live_users(root)) == 1
    finally:
        process.kill()
        cleaner.wait()
        process.wait()


def test_several_may_work_at_once(root: Path) -> None:
    one, two = Presence(root, "one"), Presence(root, "two")
    assert {user["command"] for user in live_users(root)} == {"one", "two"}
    one.leave()
    one.leave()
    assert [user["command"] for user in live_users(root)] == ["two"]
    del two
    assert live_users(root) == []


def test_workspaces_are_registered_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for _ in range(2):
        register(root, tmp_path / "other")
        register(root, tmp_path)
    assert set(registered(root)) == {tmp_path, tmp_path / "other"}
    assert len(list((root / "roots").iterdir())) == 2
    forget(root, tmp_path / "other")
    assert set(registered(root)) == {tmp_path}
    with pytest.raises(StoreError, match=rf"other is not a workspace of the store .*; those are: {tmp_path}\."):
        forget(root, tmp_path / "other")


def test_a_workspace_around_its_store_may_be_moved(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "data" / "store")
    register(store.root, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert set(registered(tmp_path / "b" / "data" / "store")) == {tmp_path / "b"}


def test_a_damaged_registration_is_an_error(root: Path, tmp_path: Path) -> None:
    register(root, tmp_path)
    (file,) = (root / "roots").iterdir()
    file.write_text("{")
    with pytest.raises(StoreError, match=rf"{file} should name a workspace .* Remove that file"):
        registered(root)
