import hashlib
from enum import IntEnum, StrEnum
from pathlib import Path

import numpy as np
import pytest

from surgeon.store import BFloat16Array, SymmetricMatrix, canonical_json, digest_arrays, digest_file, stage_key
from surgeon.store.keys import digest_sorted


class Colour(StrEnum):
    RED = "red"


class Number(IntEnum):
    ONE = 1


def test_canonical_json_sorts_and_converts():
    value = {"b": (1, 2.5, None), "a": [True, Colour.RED, Path("x/y")], "é": {"z": 1e-30, "y": -0.0}}

    assert canonical_json(value) == '{"a":[true,"red","x/y"],"b":[1,2.5,null],"\\u00e9":{"y":-0.0,"z":1e-30}}'


def test_canonical_json_keeps_int_and_float_apart():
    assert canonical_json(1) != canonical_json(1.0)
    assert canonical_json(True) != canonical_json(1)


@pytest.mark.parametrize("value", [{1}, b"x", np.float32(1), object(), Number.ONE, np.zeros(1)])
def test_canonical_json_names_the_path_of_a_wrong_type(value):
    with pytest.raises(TypeError, match=r"\$\.outer\[1\]\.inner has the type"):
        canonical_json({"outer": [0, {"inner": value}]})


def test_canonical_json_refuses_names_which_are_no_text():
    with pytest.raises(TypeError, match=r"\$\.a has the key 1"):
        canonical_json({"a": {1: 2}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("-inf")])
def test_canonical_json_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match=r"\$\.a is (nan|inf|-inf)"):
        canonical_json({"a": value})


def _key(**changes):
    arguments = {
        "kind": "factors",
        "version": 1,
        "parameters": {"damping": 0.01, "kind": Colour.RED},
        "inputs": {"model": "ab", "texts": ("cd", "ef")},
        "device": "cpu",
        "dtype": "float32",
    }
    return stage_key(**(arguments | changes))


def test_stage_key_never_changes():
    assert _key() == "df45485e43557f3c8f358eed6e7105e6544370688cc676ceb9377e19f16a0601"
    assert _key(inputs={"texts": ["cd", "ef"], "model": "ab"}) == _key()


def test_everything_a_result_depends_on_changes_the_key():
    changed = [
        _key(kind="masks"),
        _key(version=2),
        _key(parameters={"damping": 0.02, "kind": "red"}),
        _key(parameters={"damping": 0.01, "kind": "red", "more": None}),
        _key(inputs={"model": "ab", "texts": ["ef", "cd"]}),
        _key(device="cuda"),
        _key(dtype="float64"),
    ]

    assert len({_key(), *changed}) == len(changed) + 1


def test_digest_never_changes():
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([True, False])}

    assert digest_arrays(arrays, {"loss": 0.5}) == "4d91971d7deae18309b5df7dadceae21ad22bbd4ee47f65533475be384395e18"


def test_digest_sees_name_dtype_shape_bytes_and_attributes():
    array = np.arange(6, dtype=np.int32)
    digests = [
        digest_arrays({"a": array}, {}),
        digest_arrays({"b": array}, {}),
        digest_arrays({"a": array.view(np.uint32)}, {}),
        digest_arrays({"a": array.reshape(2, 3)}, {}),
        digest_arrays({"a": array[::-1]}, {}),
        digest_arrays({"a": array}, {"x": 1}),
        digest_arrays({"a": array[:3], "b": array[3:]}, {}),
        digest_arrays({"a": array[:0]}, {}),
        digest_arrays({"a": array[0]}, {}),
        digest_arrays({}, {}),
    ]

    assert len(set(digests)) == len(digests)


def test_digest_does_not_depend_on_strides_or_order():
    matrix = np.arange(12, dtype=np.float64).reshape(3, 4)

    assert digest_arrays({"a": matrix.T, "b": matrix}, {}) == digest_arrays({"b": matrix, "a": matrix.T.copy()}, {})


def test_digest_tells_layouts_apart():
    vector = np.arange(6, dtype=np.float32)
    bits = np.arange(6, dtype=np.uint16)

    assert digest_arrays({"a": SymmetricMatrix(vector)}, {}) != digest_arrays({"a": vector}, {})
    assert digest_arrays({"a": BFloat16Array(bits)}, {}) != digest_arrays({"a": bits}, {})


def test_digest_sorted_refuses_another_order():
    array = np.zeros(1)

    with pytest.raises(ValueError, match="'a' came after 'b'"):
        digest_sorted([("b", array), ("a", array)], {})


def test_digest_file(tmp_path):
    content = bytes(range(256)) * 20000
    path = tmp_path / "file"
    path.write_bytes(content)

    assert digest_file(path) == hashlib.sha256(content).hexdigest()
