"""A store in a bucket, on a bucket in memory: what two machines see of each other's results."""

import json
import threading
from dataclasses import replace

import numpy as np
import obstore
import pytest
from obstore.store import MemoryStore

from surgeon.errors import CorruptObjectError, EvictedError, NondeterminismError, StoreError
from surgeon.store import PlannedStore, Store, SymmetricMatrix, build_view, digest_text
from surgeon.store.remote_bucket import Bucket
from surgeon.store.remote_lease import LeaseTimes, lease
from surgeon.store.remote_store import RemoteStore

KEY = digest_text("one object")
FACTS = {"n": 1}


def arrays(seed=0):
    draw = np.random.default_rng(seed)
    half = draw.standard_normal((40, 40), dtype=np.float32)
    return {"a b/ü%": draw.standard_normal((3000, 20)), "g/S": SymmetricMatrix.from_full(half + half.T)}


@pytest.fixture
def client():
    return MemoryStore()


@pytest.fixture
def bucket(client):
    return Bucket(client, "memory://bucket")


@pytest.fixture
def machines(bucket, tmp_path):
    """Two machines with a cache each."""
    return RemoteStore(tmp_path / "a", bucket), RemoteStore(tmp_path / "b", bucket)


def commit(store, seed=0, key=KEY, label="shot-01/x"):
    return store.commit(key, "test", arrays(seed), FACTS, label=label, parameters={"p": 1}, seconds=2.5)


def paths(bucket, prefix=""):
    return list(bucket.sizes(prefix))


def flip(client, path):
    content = bytearray(obstore.get(client, path).bytes())
    content[len(content) // 2] ^= 1
    obstore.put(client, path, bytes(content))


def test_another_machine_has_what_one_committed(machines):
    first, second = machines
    reference = commit(first)
    assert second.lookup(KEY) == reference
    assert second.has_payload(KEY)
    assert not any(second.path(KEY).rglob("c/*")), "a look fetches no arrays"
    stored = second.open(KEY)
    np.testing.assert_array_equal(stored["a b/ü%"], arrays()["a b/ü%"])
    np.testing.assert_array_equal(stored["g/S"], arrays()["g/S"].to_full())
    assert second.parameters(KEY) == {"p": 1}
    assert second.record(KEY)["seconds"] == 2.5
    assert second.size_bytes(KEY) == pytest.approx(first.size_bytes(KEY), abs=20)
    assert list(second.all_keys()) == [KEY]
    Store(second.root).verify(KEY)


def test_facts_without_arrays_come_with_the_reference(machines, bucket):
    first, second = machines
    reference = first.commit(KEY, "test", {}, FACTS)
    assert second.lookup(KEY, label="") == reference
    assert second.has_payload(KEY)
    assert second.open(KEY).attributes == FACTS


def test_the_bucket_can_be_browsed_as_zarr(machines, client):
    import zarr
    from zarr.storage import ObjectStore

    commit(machines[0])
    (place,) = {path.split("/zarr.json")[0] for path in Bucket(client, "").sizes("objects") if path.count("/") == 4}
    group = zarr.open_group(ObjectStore(client, read_only=True), path=place, mode="r")
    np.testing.assert_array_equal(group["a b/ü%"][...], arrays()["a b/ü%"])
    assert group.attrs["reference"]["key"] == KEY


def test_the_same_again_is_found_and_another_result_is_refused(machines, bucket):
    first, second = machines
    reference = commit(first)
    assert commit(second) == reference
    before = paths(bucket)
    with pytest.raises(NondeterminismError, match="computed twice with different results"):
        commit(second, seed=1)
    assert paths(bucket) == before


def test_of_two_that_commit_at_once_one_wins(machines, bucket):
    """The second looked before the first committed, and finds out when it writes the marker."""
    first, second = machines
    upload = second._remote.upload

    def overtaken(*given, **more):
        second._remote.upload = upload
        commit(first)
        return upload(*given, **more)

    second._remote.upload = overtaken
    with pytest.raises(NondeterminismError, match=r"memory://bucket has the digest \w+, this machine has"):
        commit(second, seed=1)
    assert not second.path(KEY).exists()
    first.verify(KEY)
    assert len({path.split("/")[3] for path in paths(bucket, "objects")}) == 1, "nothing is left of the loser"
    second._remote.upload = overtaken
    first.delete(KEY)
    assert commit(second).digest == first.lookup(KEY).digest


@pytest.mark.parametrize("n_requests", range(10))
def test_killed_after_any_request(machines, bucket, monkeypatch, n_requests):
    """The other machine sees all or nothing, and computing again ends as if nothing had happened."""
    first, second = machines
    left = [n_requests]

    class KilledError(BaseException):
        pass

    def counted(method):
        def call(*given):
            if not left[0]:
                raise KilledError
            left[0] -= 1
            return method(*given)

        return call

    for name in ("put", "create", "replace"):
        monkeypatch.setattr(bucket, name, counted(getattr(bucket, name)))
    try:
        commit(first)
        assert n_requests == 9
    except KilledError:
        assert n_requests < 9, "seven files of arrays and groups, the marker, and the group itself"
    left[0] = 1000
    if second.has_payload(KEY):
        second.verify(KEY)
        second.open(KEY)
    else:
        with pytest.raises((StoreError, EvictedError), match=r"has no object|were dropped"):
            second.open(KEY)
    reference = commit(second)
    assert commit(first) == reference
    first.verify(KEY)
    second.verify(KEY)


def test_eviction(machines, bucket):
    first, second = machines
    reference = commit(first)
    first.evict(KEY)
    assert not first.has_payload(KEY)
    assert not second.has_payload(KEY)
    assert second.lookup(KEY) == reference
    with pytest.raises(EvictedError, match="were dropped"):
        second.open(KEY)
    assert paths(bucket, "objects") == []
    assert commit(second) == reference
    assert first.has_payload(KEY)
    first.open(KEY)
    with pytest.raises(NondeterminismError):
        commit(first, seed=1)


def test_arrays_that_only_a_cache_has_go_up_again(machines):
    """Another machine dropped them; whoever is given the reference must be able to read."""
    first, second = machines
    commit(first)
    second.open(KEY)
    first.evict(KEY)
    assert second.has_payload(KEY)
    first.open(KEY)


def test_an_eviction_spares_what_is_computed_again(machines):
    first, second = machines
    commit(first)
    with second.lock(KEY):
        first.evict(KEY)
        assert second.has_payload(KEY)
    first.evict(KEY)
    assert not second.has_payload(KEY)


def test_a_local_store_that_gets_a_bucket(machines, bucket, tmp_path):
    """What was computed before is put into the bucket when it is used, and what is only looked at is not."""
    local = Store(tmp_path / "a")
    whole, dropped = commit(local), commit(local, key=digest_text("two"))
    local.evict(dropped.key)
    first, second = machines
    planned = PlannedStore(first)
    assert planned.lookup(KEY) == whole
    assert planned.has_payload(KEY)
    assert paths(bucket, "refs") == []
    assert first.has_payload(KEY)
    assert not first.has_payload(dropped.key)
    second.open(KEY)
    assert second.lookup(dropped.key) == dropped
    commit(second, key=dropped.key)
    first.open(dropped.key)


def test_an_emptied_bucket_is_filled_again(machines, client, tmp_path):
    first, _ = machines
    commit(first)
    obstore.delete(client, [str(item["path"]) for page in obstore.list(client) for item in page])
    anew = Bucket(client, "memory://bucket")
    assert RemoteStore(first.root, anew).lookup(KEY) is not None
    RemoteStore(tmp_path / "c", anew).open(KEY)


@pytest.mark.parametrize("name", ["c/1/0", "ü%/zarr.json"])
def test_a_flipped_byte_in_the_bucket(machines, client, bucket, name):
    first, second = machines
    reference = commit(first)
    (path,) = [path for path in paths(bucket, "objects") if path.endswith(name)]
    flip(client, path)
    with pytest.raises(CorruptObjectError, match=r"shot-01/x .*It was moved to memory://bucket/corrupt/"):
        second.open(KEY)
    assert paths(bucket, "refs") == []
    assert any(path.startswith(f"corrupt/{KEY}-") and path.endswith(name) for path in paths(bucket))
    assert not second.has_payload(KEY)
    assert commit(second) == reference
    second.verify(KEY)
    assert first.has_payload(KEY)


def test_verify_reads_the_bucket_too(machines, client, bucket):
    first, second = machines
    commit(first)
    (path,) = [path for path in paths(bucket, "objects") if path.endswith("c/1/0")]
    flip(client, path)
    with pytest.raises(CorruptObjectError, match="moved to memory://bucket/corrupt/"):
        first.verify(KEY)
    assert first.has_payload(KEY), "what is here is whole, and goes up again"
    second.open(KEY)


def test_a_missing_file_is_no_zeros(machines, client, bucket):
    first, second = machines
    commit(first)
    (path,) = [path for path in paths(bucket, "objects") if path.endswith("c/0/0")]
    obstore.delete(client, path)
    with pytest.raises(CorruptObjectError, match=r"The file a b/ü%/c/0/0 of shot-01/x .* is missing"):
        second.open(KEY)


@pytest.mark.parametrize("content", [b"{", b'{"schema": 0}', b"[]"])
def test_a_damaged_marker(machines, client, bucket, content):
    first, second = machines
    commit(first)
    (path,) = paths(bucket, "refs")
    obstore.put(client, path, content)
    with pytest.raises(CorruptObjectError, match=r"cannot be read: .* It was moved to memory://bucket/corrupt/"):
        second.lookup(KEY)
    assert second.lookup(KEY) is None
    commit(second)
    first.open(KEY)


def test_a_marker_with_another_digest(machines, client, bucket):
    first, second = machines
    first.commit(KEY, "test", {}, FACTS)
    (path,) = paths(bucket, "refs")
    marker = json.loads(bucket.get(path))
    obstore.put(client, path, json.dumps(marker | {"digest": "0" * 64}).encode())
    with pytest.raises(CorruptObjectError, match="names another digest"):
        second.lookup(KEY)


def test_damage_here_is_mended_from_the_bucket(machines):
    first, _ = machines
    commit(first)
    chunk = next(path for path in first.path(KEY).rglob("c/*/*") if path.is_file())
    chunk.write_bytes(b"x" * chunk.stat().st_size)
    with pytest.raises(CorruptObjectError):
        _ = first.open(KEY)["a b/ü%"]
    np.testing.assert_array_equal(first.open(KEY)["a b/ü%"], arrays()["a b/ü%"])


def test_quarantine_and_delete(machines, bucket):
    first, second = machines
    commit(first)
    first.quarantine(KEY)
    assert second.lookup(KEY) is None
    commit(second, seed=1)
    second.delete(KEY)
    assert first.lookup(KEY) is None
    assert not [path for path in paths(bucket) if path.startswith(("objects", "refs"))]


def test_a_view_fetches_what_it_shows(machines, tmp_path):
    first, second = machines
    commit(first)
    build_view(second, {"here/x": KEY}, tmp_path / "run.zarr")
    assert len(list((tmp_path / "run.zarr/here/x").rglob("c/*/*"))) == 2


def test_what_is_no_store_is_refused(client):
    obstore.put(client, "photos/cat.png", b"x")
    with pytest.raises(StoreError, match=r"memory://x is not empty and is no store: .*photos/cat\.png"):
        Bucket(client, "memory://x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{", "says that this is no store"),
        (b'{"format": "surgeon-store"}', "says that this is no store"),
        (
            b'{"format": "surgeon-bucket", "identity": "a", "schema": 0}',
            "has schema 0, but this version .* reads schema",
        ),
    ],
)
def test_another_format(client, text, problem):
    obstore.put(client, "format.json", text)
    with pytest.raises(StoreError, match=problem):
        Bucket(client, "memory://x")


FAST = LeaseTimes(renewed_s=0.05, lost_s=0.6, asked_s=0.02)


def test_a_lease_is_held_by_one(bucket):
    late = lease(bucket, "locks/x.json", timeout_s=1.5, times=FAST)
    problem = r"locks/x.json in memory://bucket was not free within 1.5 s"
    with lease(bucket, "locks/x.json", times=FAST), pytest.raises(StoreError, match=problem), late:
        pass
    assert paths(bucket, "locks") == []
    with lease(bucket, "locks/x.json", timeout_s=0, times=FAST):
        pass


def test_a_lease_without_signs_of_life_is_taken_over(bucket):
    silent = replace(FAST, renewed_s=1000.0)
    order = []

    def hold():
        with lease(bucket, "locks/x.json", times=silent):
            order.append("first")
            entered.set()
            ended.wait(10)
        order.append("left")

    entered, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with lease(bucket, "locks/x.json", timeout_s=10, times=FAST):
        order.append("second")
        ended.set()
        thread.join()
        assert paths(bucket, "locks") == ["locks/x.json"], "the first leaves what is no longer its own"
    assert order == ["first", "second", "left"]
    assert paths(bucket, "locks") == []
