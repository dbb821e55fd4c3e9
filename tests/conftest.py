"""Options, skips with reasons, and the real model, fetched once for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from surgeon.errors import ModelError
from surgeon.models import resolve_model

BUILTIN = "smollm2-135m"
MODELS_VARIABLE = "SURGEON_MODELS"
TEXT_VARIABLE = "SURGEON_TEXT_DIR"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that a quick run leaves out, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="left out of a quick run; run with --slow")
    if not os.environ.get(TEXT_VARIABLE):
        skips["text"] = pytest.mark.skip(reason=f"{TEXT_VARIABLE} does not name a folder with WikiText-2")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def models_directory(request: pytest.FixtureRequest) -> Path:
    """Where the converted real model is: `SURGEON_MODELS`, or pytest's cache, so that it is fetched once.

    Skips the test if the model cannot be fetched.
    """
    chosen = os.environ.get(MODELS_VARIABLE)
    directory = Path(chosen) if chosen else request.config.cache.mkdir("surgeon-models")
    try:
        resolve_model(BUILTIN, directory)
    except ModelError as error:
        pytest.skip(f"the real model cannot be had: {error}")
    return directory


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny matrices, where threads would only get into each other's way."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True)
def _real_model_or_skip(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("real"):
        request.getfixturevalue("models_directory")
