import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import surgeon.store.payload
import surgeon.store.writing
from surgeon.errors import CorruptObjectError, EvictedError, NondeterminismError, StoreError
from surgeon.store import BFloat16Array, Layout, Reference, Store, SymmetricMatrix, digest_text
from surgeon.store.arrays import DTYPES, chunk_shape

WITH_CONTENT = (
    "zarr.json",
    "weight/c/0/0",
    "weight/c/1/0",
    "self_attn.q_proj/A/c/0",
    "self_attn.q_proj/mask/c/0",
    "zeros/c/0/0",
    "hidden/c/0/0",
)
KEY = digest_text("key")
OTHER = digest_text("other")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def _arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.standard_normal((2304, 30)).astype(np.float32),
        "self_attn.q_proj/A": SymmetricMatrix.from_full(rng.standard_normal((70, 70)).astype(np.float32)),
        "self_attn.q_proj/mask": rng.random(70) < 0.5,
        "zeros": np.zeros((3, 5), dtype=np.float64),
        "hidden": BFloat16Array(rng.integers(0, 2**16, (4, 6)).astype(np.uint16)),
    }


def _commit(store, seed=0, key=KEY, label="shot-03/factors", **options):
    return store.commit(key, "factors", _arrays(seed), {"perplexity": 12.5, "blocks": (1, 2)}, label=label, **options)


def _files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "record.json"
    }


def _rewrite(path, change):
    """Changes the text of a file; removes it where there is no change."""
    path.write_text(change(path.read_text())) if change else path.unlink()


def _is_left(store):
    return list((store.root / "tmp").iterdir())


def _python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    @pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (2049, 3), (2, 3, 4)])
    def test_dtypes_and_shapes(self, store, dtype, shape):
        size = int(np.prod(shape))
        itemsize = np.dtype(dtype).itemsize
        raw = np.random.default_rng(1).integers(0, 256, size * itemsize, dtype=np.uint8)
        raw = raw % 2 if dtype == "bool" else raw
        array = raw.view(dtype).reshape(shape)

        store.commit(KEY, "test", {"a": array}, {})
        read = store.open(KEY).array("a")

        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()
        store.verify(KEY)

    def test_layouts(self, store):
        arrays = _arrays()
        reference = _commit(store)
        opened = store.open(KEY)

        assert opened.names() == sorted(arrays)
        np.testing.assert_array_equal(opened["weight"], arrays["weight"])
        np.testing.assert_array_equal(opened["self_attn.q_proj/mask"], arrays["self_attn.q_proj/mask"])
        full = opened.array("self_attn.q_proj/A")
        np.testing.assert_array_equal(full, full.T)
        np.testing.assert_array_equal(full, arrays["self_attn.q_proj/A"].to_full())
        assert isinstance(opened["hidden"], BFloat16Array)
        np.testing.assert_array_equal(opened["hidden"].bits, arrays["hidden"].bits)
        assert opened.attributes == {"perplexity": 12.5, "blocks": [1, 2]} == reference.attributes
        assert reference.arrays == {
            "hidden": "bfloat16[4,6]",
            "self_attn.q_proj/A": "float32[70,70] symmetric",
            "self_attn.q_proj/mask": "bool[70]",
            "weight": "float32[2304,30]",
            "zeros": "float64[3,5]",
        }
        info = opened.array_info("self_attn.q_proj/A")
        assert (info.dtype, info.shape, info.layout) == ("float32", (70, 70), Layout.LOWER_TRIANGLE)
        assert opened.array_info("weight").n_chunks == 2
        store.verify(KEY)

    def test_big_endian_strided_and_non_finite(self, store):
        array = np.array([[1.5, np.nan, -np.inf], [-0.0, 2.0, 3.0]], dtype=">f4").T

        store.commit(KEY, "test", {"a": array}, {})

        np.testing.assert_array_equal(store.open(KEY)["a"], array)
        assert store.open(KEY).array("a").dtype == np.float32
        store.verify(KEY)

    def test_object_without_arrays(self, store):
        store.commit(KEY, "scores", {}, {"perplexity": 3.0})

        assert store.has_payload(KEY)
        assert store.open(KEY).names() == []
        store.verify(KEY)

    def test_wrong_arrays_and_names_are_refused(self, store):
        array = np.zeros(2)
        with pytest.raises(TypeError, match=r"'a' has the dtype <U1, which cannot be stored; allowed: \['bool'"):
            store.commit(KEY, "test", {"a": np.array(["x"])}, {})
        with pytest.raises(TypeError, match="'a' is a list"):
            store.commit(KEY, "test", {"a": [1, 2]}, {})
        with pytest.raises(TypeError, match="the dtype is float32"):
            BFloat16Array(np.zeros(2, dtype=np.float32))
        for name in ["", "/a", "a//b", "../a", "a/.", "__a", "a\\b", "record.json", "evicted", "a/zarr.json", "a\n"]:
            with pytest.raises(ValueError, match="cannot name an array"):
                store.commit(KEY, "test", {name: array}, {})
        with pytest.raises(ValueError, match="'a/b' would lie within the array 'a'"):
            store.commit(KEY, "test", {"a": array, "a/b": array}, {})
        with pytest.raises(ValueError, match=r"\$\.loss is nan"):
            store.commit(KEY, "test", {}, {"loss": float("nan")})
        assert store.lookup(KEY) is None and _is_left(store) == []

    def test_unknown_array(self, store):
        _commit(store)
        opened = store.open(KEY)
        with pytest.raises(KeyError, match="has no array 'nope'; it has"):
            opened["nope"]
        with pytest.raises(TypeError, match="is bfloat16"):
            opened.array("hidden")


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((), ()),
        ((0, 5), (1, 5)),
        ((5_000_000,), (2_500_000,)),
        ((8192, 8192), (2048, 2048)),
        ((2304, 576), (1152, 576)),
        ((128, 2048, 4096), (1, 2048, 2048)),
        ((64, 128, 576), (32, 128, 576)),
    ],
)
def test_chunk_shape(shape, chunks):
    assert chunk_shape(shape) == chunks


class TestReference:
    def test_json_and_pickle(self, store):
        reference = _commit(store)

        assert Reference.from_json(json.loads(json.dumps(reference.to_json()))) == reference
        assert pickle.loads(pickle.dumps(reference)) == reference
        assert pickle.loads(pickle.dumps(store)).lookup(KEY) == reference

    def test_wrong_json(self, store):
        value = _commit(store).to_json()
        with pytest.raises(ValueError, match="has the fields"):
            Reference.from_json({**value, "extra": 1})
        with pytest.raises(ValueError, match="'arrays' of a reference must be a dict, but got a list"):
            Reference.from_json({**value, "arrays": []})

    def test_lookup_gives_what_commit_gave(self, store):
        assert store.lookup(KEY) is None
        assert not store.has_payload(KEY)
        reference = _commit(store)

        assert store.lookup(KEY) == reference == store.open(KEY).reference
        assert store.lookup(KEY, label="shot-09").label == "shot-09"
        assert store.lookup(OTHER) is None

    def test_record_parameters_and_size(self, store):
        _commit(store, seconds=1.5, parameters={"damping": 0.01})

        record = store.record(KEY)
        assert record["seconds"] == 1.5 and record["label"] == "shot-03/factors"
        assert {"created", "host", "surgeon"} < set(record)
        group = zarr.open_group(store.path(KEY), mode="r")
        assert group.attrs["reference"]["parameters"] == {"damping": 0.01} == store.parameters(KEY)
        _commit(store, key=OTHER)
        assert store.parameters(OTHER) == {}
        with pytest.raises(StoreError, match="has no object"):
            store.parameters("0" * 64)
        assert store.size_bytes(KEY) == sum(
            path.stat().st_size for path in store.path(KEY).rglob("*") if path.is_file()
        )

    def test_entries(self, store):
        references = {key: _commit(store, key=key) for key in (KEY, OTHER)}
        store.evict(OTHER)

        assert list(store.entries()) == [references[key] for key in sorted(references)]

    def test_wrong_keys(self, store):
        for key in ("", "../x", KEY.upper(), KEY[:-1]):
            with pytest.raises(StoreError, match="is no key of a store"):
                store.lookup(key)
        for action in (store.open, store.verify, store.evict, store.quarantine, store.record, store.size_bytes):
            with pytest.raises(StoreError, match=f"has no object {KEY}"):
                action(KEY)


def test_same_content_gives_same_bytes(tmp_path):
    first, second = Store(tmp_path / "a"), Store(tmp_path / "b")
    _commit(first, label="shot-01", seconds=1.0, parameters={"x": 1, "y": 2})
    reversed_arrays = dict(reversed(_arrays().items()))
    second.commit(
        KEY,
        "factors",
        reversed_arrays,
        {"blocks": [1, 2], "perplexity": 12.5},
        label="shot-02",
        seconds=2.0,
        parameters={"y": 2, "x": 1},
    )

    files = _files(first.path(KEY))
    assert len(files) == 13
    assert files == _files(second.path(KEY))
    assert _is_left(first) == []


class TestDamage:
    def test_missing_chunk(self, store):
        _commit(store)
        (store.path(KEY) / "weight/c/1/0").unlink()

        expected = r"'weight' of shot-03/factors .*2 chunk files, but 1 were found \(missing: \['c/1/0'\]"
        with pytest.raises(CorruptObjectError, match=expected):
            store.open(KEY)

    def test_moved_aside_and_made_again(self, store):
        """What is damaged is missing afterwards, can be looked at below `corrupt`, and comes back the same."""
        first = _commit(store)
        before = _files(store.path(KEY))
        (store.path(KEY) / "weight/c/1/0").unlink()

        with pytest.raises(CorruptObjectError, match=f"It was moved to {store.root}/corrupt/{KEY}-") as caught:
            store.open(KEY)
        assert caught.value.key == KEY
        assert store.lookup(KEY) is None
        (aside,) = (store.root / "corrupt").iterdir()
        assert set(before) - set(_files(aside)) == {"weight/c/1/0"}
        assert _commit(store) == first
        assert _files(store.path(KEY)) == before
        store.verify(KEY)

    def test_one_that_was_made_again_meanwhile_is_left_alone(self, store):
        """Another process has found the same damage and has computed the object again."""
        _commit(store)
        (store.path(KEY) / "weight/c/0/0").write_bytes(b"x" * (1152 * 30 * 4 + 4))
        opened = store.open(KEY)
        with pytest.raises(CorruptObjectError, match="cannot be decoded"):
            store.open(KEY)["weight"]
        _commit(store)

        with pytest.raises(EvictedError, match="Open it again"):
            opened["weight"]
        store.verify(KEY)

    def test_that_cannot_be_moved(self, store, monkeypatch):
        def refused(*arguments):
            raise PermissionError(errno.EACCES, "Permission denied")

        _commit(store)
        (store.path(KEY) / "weight/c/1/0").unlink()
        monkeypatch.setattr(Path, "rename", refused)
        with pytest.raises(CorruptObjectError, match=r"cannot be moved aside \(.*denied\); move .* away"):
            store.open(KEY)

    def test_commit_takes_the_place_of_a_damaged_one(self, store):
        first = _commit(store)
        (store.path(KEY) / "zarr.json").write_text("{")
        with pytest.raises(CorruptObjectError, match="cannot be read"):
            _commit(store)
        assert _commit(store) == first

    def test_chunk_which_disappears_after_opening(self, store):
        _commit(store)
        opened = store.open(KEY)
        (store.path(KEY) / "weight/c/0/0").unlink()

        with pytest.raises(CorruptObjectError, match="2 chunk files, but 1 were found"):
            opened["weight"]

    def test_surplus_chunk(self, store):
        _commit(store)
        (store.path(KEY) / "weight/c/2").mkdir()
        (store.path(KEY) / "weight/c/2/0").write_bytes(b"x")

        with pytest.raises(CorruptObjectError, match=r"but 3 were found .*unknown: \['c/2/0'\]"):
            store.open(KEY)

    @pytest.mark.parametrize("position", [0, 1000, -1])
    def test_flipped_bit(self, store, position):
        _commit(store)
        chunk = store.path(KEY) / "weight/c/0/0"
        content = bytearray(chunk.read_bytes())
        content[position] ^= 1
        chunk.write_bytes(content)

        opened = store.open(KEY)
        opened["zeros"]
        with pytest.raises(CorruptObjectError, match=r"'weight' of shot-03/factors .*cannot be decoded: .*checksum"):
            opened["weight"]
        assert store.lookup(KEY) is None

    @pytest.mark.parametrize("keep", [0, 3, 100])
    def test_truncated_chunk(self, store, keep):
        _commit(store)
        os.truncate(store.path(KEY) / "weight/c/0/0", keep)

        with pytest.raises(CorruptObjectError, match=f"c/0/0 of {keep} bytes instead of {1152 * 30 * 4 + 4}"):
            store.open(KEY)

    def test_exchanged_chunks_change_the_digest(self, store):
        _commit(store)
        folder = store.path(KEY) / "weight/c"
        for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
            (folder / old).rename(folder / new)

        store.open(KEY)["weight"]
        with pytest.raises(CorruptObjectError, match="has the digest"):
            store.verify(KEY)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda text: text.replace("float64", "int64").replace("0.0", "0"),
                r"should be float64\[3,5\], but its metadata say int64\[3,5\]",
            ),
            (lambda text: text[:-20], r"'zeros' .*metadata that cannot be read"),
            (None, r"'zeros' .*metadata that cannot be read"),
        ],
        ids=["other", "cut", "missing"],
    )
    def test_array_metadata(self, store, change, message):
        _commit(store)
        _rewrite(store.path(KEY) / "zeros/zarr.json", change)
        with pytest.raises(CorruptObjectError, match=message):
            store.open(KEY)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text.replace(KEY, OTHER), f"should hold key {KEY} of schema 2, but holds {OTHER}"),
            (lambda text: text[: len(text) // 2], r"cannot be read: .*It was moved to "),
            (lambda text: text.replace("12.5", "12.6"), "is not what was written there"),
            (None, r"has no zarr\.json"),
        ],
        ids=["other key", "cut", "other attribute", "missing"],
    )
    def test_reference(self, store, change, message):
        _commit(store)
        _rewrite(store.path(KEY) / "zarr.json", change)
        with pytest.raises(CorruptObjectError, match=message):
            store.lookup(KEY)
        assert store.lookup(KEY) is None

    def test_record_is_worth_no_error(self, store):
        """Only how long it took and for whom is lost."""
        reference = _commit(store)
        (store.path(KEY) / "record.json").write_text("{")
        assert store.record(KEY) == {}
        assert store.lookup(KEY) == replace(reference, label="")
        store.verify(KEY)

    @pytest.mark.parametrize("name", WITH_CONTENT)
    def test_any_flipped_byte_is_found(self, store, name):
        """Of every file with content: the reference, and all chunks."""
        _commit(store)
        path = store.path(KEY) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(CorruptObjectError):
            store.verify(KEY)

    def test_quarantine_makes_room(self, store):
        _commit(store)
        (store.path(KEY) / "zarr.json").write_text("{")

        aside = store.quarantine(KEY)

        assert aside.parent == store.root / "corrupt" and aside.name.startswith(KEY)
        assert (aside / "weight/c/0/0").exists()
        assert store.lookup(KEY) is None
        _commit(store)
        store.verify(KEY)


class TestRaces:
    def test_second_commit_of_equal_content(self, store):
        first = _commit(store, seconds=1.0)
        second = _commit(store, label="shot-04", seconds=2.0)

        assert second.label == "shot-04" and second.digest == first.digest
        assert store.record(KEY)["seconds"] == 1.0

    def test_second_commit_of_other_content(self, store):
        first = _commit(store)
        before = _files(store.path(KEY))

        with pytest.raises(NondeterminismError, match=rf"shot-04 .*{KEY}.*{first.digest}.*raise the version"):
            _commit(store, seed=1, label="shot-04")
        assert _files(store.path(KEY)) == before and _is_left(store) == []

    @pytest.mark.parametrize("seed", [0, 1])
    def test_race_lost_while_writing(self, store, monkeypatch, seed):
        write = surgeon.store.writing.write_object

        def overtaken(*arguments):
            monkeypatch.undo()
            _commit(store, label="winner")
            return write(*arguments)

        monkeypatch.setattr("surgeon.store.store.write_object", overtaken)
        if seed:
            with pytest.raises(NondeterminismError, match=rf"late .*{KEY}"):
                _commit(store, seed=seed, label="late")
        else:
            assert _commit(store, label="late").label == "late"
        assert store.record(KEY)["label"] == "winner"
        assert _is_left(store) == []
        store.verify(KEY)

    def test_full_disk(self, store, monkeypatch):
        def full(directory):
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))

        monkeypatch.setattr("surgeon.store.writing.sync_tree", full)
        with pytest.raises(StoreError, match=r"No space left for shot-03/factors .*Free some space"):
            _commit(store)
        assert store.lookup(KEY) is None and _is_left(store) == []


class TestEviction:
    def test_evict_keeps_the_reference(self, store):
        reference = _commit(store)
        opened = store.open(KEY)
        store.evict(KEY)

        assert store.lookup(KEY) == reference
        assert not store.has_payload(KEY)
        assert sorted(item.name for item in store.path(KEY).iterdir()) == ["evicted", "record.json", "zarr.json"]
        assert _is_left(store) == []
        for action in (store.open, store.verify, lambda _: opened["weight"]):
            with pytest.raises(EvictedError, match=r"shot-03/factors .*retention policy"):
                action(KEY)
        store.evict(KEY)

    def test_restore(self, store):
        reference = _commit(store, seconds=1.0)
        before = _files(store.path(KEY))
        opened = store.open(KEY)
        store.evict(KEY)

        with pytest.raises(NondeterminismError):
            _commit(store, seed=1)
        assert not store.has_payload(KEY)
        assert _commit(store, seconds=2.0) == reference
        assert store.has_payload(KEY) and _is_left(store) == []
        assert _files(store.path(KEY)) == before
        assert store.record(KEY)["seconds"] == 2.0
        store.verify(KEY)
        with pytest.raises(EvictedError, match="evicted and restored while it was read"):
            opened["weight"]

    @pytest.mark.parametrize("n_done", [0, 1, 2])
    def test_interrupted_eviction_and_restoration(self, store, monkeypatch, n_done):
        reference = _commit(store)
        with monkeypatch.context() as patch:
            _fail_after(patch, "rename", n_done)
            with pytest.raises(KeyboardInterrupt):
                store.evict(KEY)
        assert store.lookup(KEY) == reference and not store.has_payload(KEY)
        with monkeypatch.context() as patch:
            _fail_after(patch, "rename", n_done)
            with pytest.raises(KeyboardInterrupt):
                _commit(store)
        assert store.lookup(KEY) == reference and not store.has_payload(KEY)
        with pytest.raises(EvictedError):
            store.open(KEY)

        _commit(store)
        store.verify(KEY)
        store.evict(KEY)
        assert not (store.path(KEY) / "weight").exists()


def _fail_after(patch, name, n_done):
    """Lets the process fail after some moves of arrays into or out of an object."""
    original = getattr(Path, name)
    calls = []

    def move(self, target):
        if self.name in {"weight", "self_attn.q_proj", "zeros", "hidden"}:
            calls.append(target)
            if len(calls) > n_done:
                raise KeyboardInterrupt
        return original(self, target)

    patch.setattr(Path, name, move)


class TestProcesses:
    def test_killed_commit_leaves_nothing_visible(self, store):
        code = (
            "import sys; from pathlib import Path; import numpy as np; from surgeon.store import Store\n"
            "array = np.ones((2048, 2048), dtype=np.float32)\n"
            "Store(Path(sys.argv[1])).commit(sys.argv[2], 'test', {f'a{i:02}': array for i in range(40)}, {})"
        )
        process = _python(code, store.root, KEY)
        deadline = time.monotonic() + 60
        while not list(store.root.glob("tmp/*/a03/c/0/0")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        assert store.clear_stale_tmp() == []
        process.kill()
        assert process.wait() == -signal.SIGKILL

        assert store.lookup(KEY) is None and list(store.entries()) == []
        assert len(_is_left(store)) == 1
        assert len(store.clear_stale_tmp()) == 1
        assert _is_left(store) == []

    def test_foreign_tmp_is_left_alone(self, store):
        foreign = store.root / "tmp" / f"{KEY}-999999999-0123456789abcdef"
        foreign.mkdir()

        assert store.clear_stale_tmp() == []
        assert foreign.exists()

    def test_lock_excludes_other_processes(self, store, tmp_path):
        (tmp_path / "count").write_text("0")
        code = (
            "import sys; from pathlib import Path; from surgeon.store import Store\n"
            "count = Path(sys.argv[3]); store = Store(Path(sys.argv[1]))\n"
            "for _ in range(50):\n"
            "    with store.lock(sys.argv[2]):\n"
            "        value = int(count.read_text()); count.write_text(str(value + 1))"
        )
        processes = [_python(code, store.root, KEY, tmp_path / "count") for _ in range(2)]

        assert [process.wait(timeout=60) for process in processes] == [0, 0]
        assert (tmp_path / "count").read_text() == "100"
        assert list((store.root / "locks").iterdir()) == []

    def test_lock_of_a_killed_process_is_free(self, store):
        code = (
            "import sys, time; from pathlib import Path; from surgeon.store import Store\n"
            "with Store(Path(sys.argv[1])).lock(sys.argv[2]):\n"
            "    print('held', flush=True); time.sleep(600)"
        )
        process = _python(code, store.root, KEY)
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=r"was not free within 0\.1 s"), store.lock(KEY, timeout_s=0.1):
            pass
        with store.lock(OTHER, timeout_s=1):
            pass
        process.kill()
        process.wait()

        with store.lock(KEY, timeout_s=10):
            _commit(store)
        assert store.has_payload(KEY)

    def test_processes_may_create_a_store_together(self, tmp_path):
        code = "import sys; from pathlib import Path; from surgeon.store import Store; Store(Path(sys.argv[1]))"
        processes = [_python(code, tmp_path / "new/store") for _ in range(3)]

        assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]


class TestRoot:
    def test_format_file(self, store):
        assert json.loads((store.root / "format.json").read_text()) == {"format": "surgeon-store", "schema": 2}
        Store(store.root)

    def test_other_schema(self, store):
        (store.root / "format.json").write_text('{"format": "surgeon-store", "schema": 3}')
        with pytest.raises(
            StoreError, match=r"has schema 3, but this version of Surgeon reads schema 2\. Move the store"
        ):
            Store(store.root)

    def test_other_format(self, store):
        (store.root / "format.json").write_text('{"format": "other"}')
        with pytest.raises(StoreError, match="is no surgeon-store"):
            Store(store.root)
        (store.root / "format.json").write_text("{")
        with pytest.raises(StoreError, match="cannot be read as JSON"):
            Store(store.root)

    def test_directory_with_other_files(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(StoreError, match=r"not empty and is no store.*thesis\.tex.*move these files aside"):
            Store(tmp_path)
        assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]

    def test_file_in_the_way(self, tmp_path):
        (tmp_path / "store").write_text("x")
        with pytest.raises(StoreError, match="a file is in the way"):
            Store(tmp_path / "store")

    def test_a_draft_of_the_format_file_does_not_hinder(self, tmp_path):
        (tmp_path / ".format-0123").write_text("")
        Store(tmp_path)

    def test_a_moved_store_still_works(self, store, tmp_path):
        _commit(store)
        shutil.move(store.root, tmp_path / "elsewhere")
        Store(tmp_path / "elsewhere").verify(KEY)
