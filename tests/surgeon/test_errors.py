"""Errors come back whole from worker processes."""

import inspect
import pickle

import pytest

from surgeon import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.SurgeonError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_the_way_between_processes(kind: type[errors.SurgeonError]) -> None:
    more = ["ab" * 32] if kind is errors.CorruptObjectError else []
    error = kind("what, where", *more)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == "what, where"
    assert vars(back) == vars(error)
