"""A store that only notes what a run would do to it."""

import numpy as np

from surgeon.store import PlannedStore, Store, is_promised, stage_key


def key_of(name):
    return stage_key("kind", 1, {"name": name}, {}, "cpu", "float32")


def files(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_promises_and_drops_are_seen_and_nothing_is_written(tmp_path):
    store = Store(tmp_path / "store")
    real = store.commit(key_of("real"), "kind", {"a": np.ones(3)}, {"n": 1}, label="real")
    before = files(tmp_path)
    planned = PlannedStore(store)
    assert planned.lookup(key_of("new")) is None
    with planned.lock(key_of("new")):
        promised = planned.commit(key_of("new"), "kind", {"a": np.ones(3)}, {"n": 2}, label="new")
    assert planned.lookup(key_of("new")) == promised
    assert is_promised(promised.digest)
    assert not is_promised(real.digest)
    assert planned.has_payload(key_of("new"))
    planned.evict(real.key)
    assert planned.lookup(real.key) == real
    assert not planned.has_payload(real.key)
    assert planned.promise(real.key, "kind", {}) == real, "its content is known, only its arrays were missing"
    assert planned.has_payload(real.key)
    assert [(c.label, c.is_written) for c in planned.changes] == [("new", True), ("real", False), ("", True)]
    assert files(tmp_path) == before
    assert store.has_payload(real.key)
    assert store.lookup(key_of("new")) is None


def test_what_is_made_from_a_promise_has_a_key_of_its_own(tmp_path):
    planned = PlannedStore(Store(tmp_path))
    digests = {planned.promise(key_of(name), "kind", {}).digest for name in ("a", "b")}
    assert len(digests) == 2
    assert len({stage_key("next", 1, {}, {"input": digest}, "cpu", "float32") for digest in digests}) == 2
