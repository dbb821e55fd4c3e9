import pytest
from transformers import dynamic_module_utils


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The matrices are tiny."""


@pytest.fixture(autouse=True)
def _modules_elsewhere(tmp_path_factory, monkeypatch):
    """Modelling files are imported from a copy, which is not to be left in the user's cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
