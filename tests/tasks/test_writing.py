"""Results are written while the next are made: bounded, in order, with no error lost."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from surgeon.store import Reference, Store, StorePlace
from tasks import writing
from tasks.context import Context
from tasks.stage import Product, Request, Stage, produce_all
from tasks.writing import current_backlog, write_all, writing_behind

STAGE = Stage("evaluation", 1, ())


def reference(name: int) -> Reference:
    return Reference(f"{name:064x}", "test", "")


class Slow:
    """Commits wait until they are let go; counts products that are made and not committed."""

    def __init__(self, fails: int | None = None) -> None:
        self.go = threading.Event()
        self.made: list[int] = []
        self.committed: list[int] = []
        self.most = 0
        self._fails = fails

    def make(self, name: int) -> Callable[[], Reference]:
        self.made.append(name)
        self.most = max(self.most, len(self.made) - len(self.committed))
        return partial(self.commit, name)

    def commit(self, name: int) -> Reference:
        assert self.go.wait(30)
        if name == self._fails:
            raise OSError(f"disk of {name}")
        self.committed.append(name)
        return reference(name)


@pytest.mark.parametrize("n_writers", [0, 1, 3])
def test_all_are_written_and_few_are_held(n_writers: int) -> None:
    slow = Slow()
    timer = threading.Timer(0.2, slow.go.set)
    timer.start()
    found = write_all([(name, partial(slow.make, name)) for name in range(8)], n_writers)
    assert found == {name: reference(name) for name in range(8)}
    assert slow.made == list(range(8))
    assert sorted(slow.committed) == list(range(8))
    assert slow.most <= n_writers + 1


def test_an_error_of_writing_is_raised_after_the_others_have_ended() -> None:
    slow = Slow(fails=1)
    slow.go.set()
    with pytest.raises(OSError, match="disk of 1"):
        write_all([(name, partial(slow.make, name)) for name in range(6)], 3)
    assert set(slow.committed) == set(slow.made) - {1}


@pytest.fixture
def two_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU computed."""
    monkeypatch.setattr(writing, "writers_for", lambda _device: 2)
    monkeypatch.setattr("tasks.stage.writers_for", lambda _device: 2)


def context_in(folder: Path) -> Context:
    place = StorePlace(folder / "store")
    return SimpleNamespace(store=place, device="cpu", arithmetic="cpu", dtype="float32")  # type: ignore[return-value]


def computation(context: Context, number: int, ran: list[int], fails: bool = False) -> list[Reference]:
    """Two results, the first of which is urgent."""
    requests = {part: Request(STAGE, {"n": number, "part": part}, {}, f"{number}/{part}") for part in ("up", "rest")}

    def product(part: str) -> Product:
        if fails and part == "rest":
            return Product({"bad name/..": np.zeros(3)})
        return Product({part: np.full(3, number)})

    def compute(missing: object) -> dict[str, Callable[[], Product]]:
        ran.append(number)
        return {part: partial(product, part) for part in requests}

    return produce_all(context, requests, requests["up"].key(context), compute, urgent=["up"]).value


@pytest.mark.usefixtures("two_writers")
def test_what_nothing_waits_for_is_written_behind(tmp_path: Path) -> None:
    context, ran = context_in(tmp_path), []
    store = context.store.open()
    with writing_behind("cuda"):
        for number in range(3):
            found = computation(context, number, ran)
            assert [r.label for r in found] == [f"{number}/up"], "the other is not waited for"
        assert current_backlog() is not None
    assert current_backlog() is None
    assert {r.label for r in store.entries()} == {f"{n}/{part}" for n in range(3) for part in ("up", "rest")}
    assert len(computation(context, 2, ran)) == 2
    assert ran == [0, 1, 2], "found, not computed again"


@pytest.mark.usefixtures("two_writers")
def test_whoever_wants_the_same_waits_until_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a computation is held until the last of its results is there."""
    context, ran, go = context_in(tmp_path), [], threading.Event()
    commit = Store.commit

    def late(store: Store, key: str, *args: object, **more: object) -> Reference:
        if more["label"] == "0/rest":
            assert go.wait(30)
        return commit(store, key, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", late)
    others: list[list[Reference]] = []
    with writing_behind("cuda"):
        computation(context, 0, ran)
        other = threading.Thread(target=lambda: others.append(computation(context, 0, ran)))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        go.set()
    other.join(30)
    assert [r.label for r in others[0]] == ["0/up", "0/rest"]
    assert ran == [0]


@pytest.mark.usefixtures("two_writers")
def test_errors_of_writing_behind_are_not_lost(tmp_path: Path) -> None:
    context, ran = context_in(tmp_path), []
    with pytest.raises(ValueError, match="cannot name an array"), writing_behind("cuda"):
        computation(context, 0, ran, fails=True)
    with pytest.raises(ValueError, match="cannot name an array"), writing_behind("cuda"):
        computation(context, 1, ran, fails=True)
        computation(context, 2, ran)
        raise AssertionError("the next computation finds out")
    with pytest.raises(KeyError), writing_behind("cuda"):
        computation(context, 3, ran)
        raise KeyError
    assert len(computation(context, 3, ran)) == 2, "locks are free, and what was being written is there"
    assert ran == [0, 1, 2, 3]


def test_a_cpu_writes_at_once(tmp_path: Path) -> None:
    with writing_behind("cpu"):
        assert current_backlog() is None
        assert len(computation(context_in(tmp_path), 0, [])) == 2
