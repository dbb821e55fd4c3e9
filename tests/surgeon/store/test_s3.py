"""A store in a bucket, on a real S3 server on loopback and with real processes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from surgeon.errors import BucketError, CorruptObjectError, StoreError
from surgeon.store import Store, StorePlace, digest_text, remote_address
from surgeon.store.remote_bucket import connected, open_bucket
from surgeon.store.remote_lease import LeaseTimes, lease
from tests.surgeon.store.buckets import BUCKET, client, files, s3_server, variables

KEY = digest_text("one object")
COMMIT = """
import sys
from pathlib import Path
import numpy as np
from surgeon.store import StorePlace
store = StorePlace(Path(sys.argv[1]), sys.argv[2]).open()
arrays = {f"a{i:02}": np.full(int(sys.argv[5]), float(sys.argv[4]) + i) for i in range(40)}
print("ready", flush=True)
sys.stdin.readline()
print(store.commit(sys.argv[3], "test", arrays, {}).digest)
"""
HOLD = """
import sys, time
from surgeon.store.remote_bucket import connected
from surgeon.store.remote_lease import LeaseTimes, lease
with lease(connected(sys.argv[1]), "locks/x.json", times=LeaseTimes(0.1, 2.0, 0.05)):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of its own for every test."""
    return digest_text(request.node.name)[:12]


@pytest.fixture
def url(server: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in (*remote_address._ENDPOINTS, *remote_address._REGIONS, *remote_address._KEYS, *remote_address._ROLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/deep/{prefix}"


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def go(*processes: subprocess.Popen[str]) -> None:
    """Lets processes that are ready begin at the same time."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_what_lies_in_the_bucket(url: str, server: str, prefix: str, tmp_path: Path) -> None:
    """As the documentation says; seen by another library."""
    store = StorePlace(tmp_path / "a", url).open()
    reference = store.commit(KEY, "test", {"x/y": np.arange(5000.0)}, {"n": 1}, label="l")
    names = {name.removeprefix(f"deep/{prefix}/") for name in files(server, f"deep/{prefix}")}
    place = f"objects/{KEY[:2]}/{KEY}/{reference.digest[:16]}"
    assert names == {
        "format.json",
        f"refs/{KEY[:2]}/{KEY}.json",
        *(f"{place}/{name}" for name in ("zarr.json", "x/zarr.json", "x/y/zarr.json", "x/y/c/0")),
    }
    other = StorePlace(tmp_path / "b", url).open()
    np.testing.assert_array_equal(other.open(KEY)["x/y"], np.arange(5000.0))
    other.evict(KEY)
    names = {name.removeprefix(f"deep/{prefix}/") for name in files(server, f"deep/{prefix}")}
    assert names == {"format.json", f"refs/{KEY[:2]}/{KEY}.json"}, "the lease is gone too"


def test_two_processes_race(url: str, tmp_path: Path) -> None:
    """Of equal results one is committed, and both say so; of results that differ, one is refused and named."""
    pair = [start(COMMIT, tmp_path / name, url, KEY, 1, 9) for name in ("a", "b")]
    go(*pair)
    digests = {process.communicate()[0] for process in pair}
    assert [process.returncode for process in pair] == [0, 0]
    assert len(digests) == 1
    key = digest_text("another")
    pair = [start(COMMIT, tmp_path / f"c{value}", url, key, value, 9) for value in (1, 2)]
    go(*pair)
    said = [process.communicate() for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1], said
    (refused,) = [err for _, err in said if err]
    assert "NondeterminismError: test (kind test" in refused
    store = StorePlace(tmp_path / "d", url).open()
    store.verify(key)
    (committed,) = [out.strip() for out, _ in said if out.strip()]
    assert store.open(key).reference.digest == committed


def test_killed_in_the_middle_of_an_upload(url: str, server: str, prefix: str, tmp_path: Path) -> None:
    process = start(COMMIT, tmp_path / "a", url, KEY, 1, 200_000)
    go(process)
    while len(files_named(server, f"deep/{prefix}/objects")) < 12:
        assert process.poll() is None, process.communicate()
    process.kill()
    process.wait()
    n_left = len(files_named(server, f"deep/{prefix}/objects"))
    assert 12 <= n_left < 80, "it was killed too late"
    store = StorePlace(tmp_path / "b", url).open()
    assert store.lookup(KEY) is None
    with pytest.raises(StoreError, match=rf"The store s3://{BUCKET}/deep/{prefix} has no object"):
        store.open(KEY)
    again = start(COMMIT, tmp_path / "a", url, KEY, 1, 200_000)
    go(again)
    digest = again.communicate()[0].strip()
    assert store.open(KEY).reference.digest == digest
    store.verify(KEY)
    expected = Store(tmp_path / "alone").commit(KEY, "test", dict(_arrays()), {})
    assert digest == expected.digest


def _arrays() -> Iterator[tuple[str, np.ndarray]]:
    for number in range(40):
        yield f"a{number:02}", np.full(200_000, 1.0 + number)


def files_named(server: str, prefix: str) -> list[str]:
    found = client(server).list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for item in found.get("Contents", [])]


def test_a_flipped_byte(url: str, server: str, prefix: str, tmp_path: Path) -> None:
    first, second = (StorePlace(tmp_path / name, url).open() for name in ("a", "b"))
    reference = first.commit(KEY, "test", {"x": np.arange(5000.0)}, {}, label="shot-01/x")
    (chunk,) = [name for name in files_named(server, f"deep/{prefix}/objects") if name.endswith("x/c/0")]
    content = bytearray(files(server, chunk)[chunk])
    content[777] ^= 4
    client(server).put_object(Bucket=BUCKET, Key=chunk, Body=bytes(content))
    problem = rf"'x' of shot-01/x \(kind test, key {KEY}\).* It was moved to s3://{BUCKET}/deep/{prefix}/corrupt/{KEY}-"
    with pytest.raises(CorruptObjectError, match=problem):
        second.open(KEY)
    assert second.lookup(KEY, label="") is None or not second.has_payload(KEY)
    assert second.commit(KEY, "test", {"x": np.arange(5000.0)}, {}).digest == reference.digest
    second.verify(KEY)
    assert [name for name in files_named(server, f"deep/{prefix}/corrupt") if name.endswith("x/c/0")]


def test_the_lease_of_a_killed_process(url: str) -> None:
    """Of this machine: at once. Of another, which cannot be asked: after it has shown no sign of life for a while."""
    fast = LeaseTimes(renewed_s=0.1, lost_s=2.0, asked_s=0.05)
    bucket = connected(url)
    for host, at_least, at_most in (("here", 0.0, 1.9), ("elsewhere", 1.9, 30.0)):
        code = HOLD if host == "here" else f"import platform; platform.node = lambda: 'elsewhere'\n{HOLD}"
        holder = start(code, url)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n", holder.communicate()
        with pytest.raises(StoreError, match="was not free"), lease(bucket, "locks/x.json", timeout_s=3, times=fast):
            pass
        holder.kill()
        holder.wait()
        begun = time.monotonic()
        with lease(bucket, "locks/x.json", timeout_s=60, times=fast):
            waited = time.monotonic() - begun
        assert at_least <= waited <= at_most, host
        holder.communicate()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            r"run\.store: .*AWS_ENDPOINT_URL is http://127\.0\.0\.1:9, AWS",
        ),
        ({"AWS_ENDPOINT_URL": "http://u:pw@no.invalid:9"}, r"AWS_ENDPOINT_URL is http://no\.invalid:9"),
        ({"AWS_ACCESS_KEY_ID": ""}, r"needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"),
    ],
)
def test_a_bucket_that_cannot_be_used(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], problem: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with pytest.raises(StoreError, match=problem) as raised:
        StorePlace(tmp_path, url).open()
    assert time.monotonic() - begun < 20
    assert "secret" not in str(raised.value).replace("AWS_SECRET_ACCESS_KEY", "")
    assert "pw" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_bucket(url: str, tmp_path: Path) -> None:
    with pytest.raises(BucketError, match=r"in s3://nowhere/x failed: NoSuchBucket .*Is there this bucket"):
        StorePlace(tmp_path, "s3://nowhere/x").open()


def test_a_prefix_of_something_else(url: str, server: str, prefix: str) -> None:
    client(server).put_object(Bucket=BUCKET, Key=f"deep/{prefix}/cat.png", Body=b"x")
    with pytest.raises(StoreError, match=rf"s3://{BUCKET}/deep/{prefix} is not empty and is no store: .*cat\.png"):
        open_bucket(url)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gs://bucket/x", "a store is a directory or s3://bucket/prefix"),
        ("s3://", "whose bucket '' is no name of a bucket"),
        ("s3://Bucket/x", "whose bucket 'Bucket' is no name"),
        ("s3://bucket/a//b", "whose prefix has the part ''"),
        ("s3://bucket/../b", r"whose prefix has the part '\.\.'"),
        ("s3://bucket/a?b", r"whose prefix has the part 'a\?b'"),
    ],
)
def test_what_is_no_address(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        StorePlace(tmp_path, text).open()


def test_without_the_library(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r'obstore, which is not installed; install the extra s3: pip install "surg'):
        StorePlace(tmp_path, url).open()


def test_a_cache_of_this_machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StorePlace(tmp_path / "driver", url)
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "worker"))
    assert place.open().root == tmp_path / "worker"
    assert StorePlace(tmp_path / "driver").root == tmp_path / "driver"
    assert list(tmp_path.iterdir()) == [tmp_path / "worker"]
