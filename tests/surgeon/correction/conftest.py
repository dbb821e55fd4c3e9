from collections.abc import Iterator

import pytest
import torch
from tiny import make_tiny

from surgeon.models import resolve_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: threads would only get into each other's way."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Family → checkpoint of its tiny model, made once for all tests: they only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    made = {}

    def get(family):
        if family not in made:
            made[family] = resolve_model(str(make_tiny(family, folder / family)), folder / "cache")
        return made[family]

    return get
