"""Keeps lm-eval and the libraries below it silent, shows their progress as ours, and gives random generators back."""

import contextlib
import importlib
import io
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import tqdm

Progress = Callable[[int, int], None]
_BARS = ("lm_eval.models.huggingface", "lm_eval.api.model", "lm_eval.api.task")
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "transformers", "evaluate")
_ONE_PROCESS = "DISABLE_MULTIPROC"
_REQUESTS = "Running"
"""How the descriptions of those bars begin that count what the model is asked."""


@contextlib.contextmanager
def quiet_harness(progress: Progress = lambda _done, _total: None) -> Iterator[None]:
    """Silences lm-eval inside a `with` block; nothing that it changes stays changed.

    Args:
        progress: told how many of the requests to the model are done.
    """

    def bar(items: Iterable[Any] | None = None, *_more: Any, **options: Any) -> "_Bar":
        counts = str(options.get("desc") or "").startswith(_REQUESTS)
        return _Bar(items, options.get("total"), progress if counts else None)

    import datasets

    modules = [importlib.import_module(name) for name in _BARS]  # before anything is replaced that they would import
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.dict(os.environ, {_ONE_PROCESS: "1"}))
        for module in modules:
            stack.enter_context(mock.patch.object(module, "tqdm", bar))
        stack.enter_context(mock.patch.object(tqdm, "tqdm", _SilentBar))  # functions of lm-eval import it themselves
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that tasks may draw from inside a `with` block; afterwards they are as before.

    Tasks of lm-eval may use the generators of the process; that is why they are seeded here, and nowhere else.
    """
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _SilentBar(tqdm.tqdm):  # type: ignore[misc]
    """A bar of tqdm that shows nothing."""

    def __init__(self, *items: Any, **options: Any) -> None:
        super().__init__(*items, **{**options, "disable": True})


class _Bar:
    """Stands in for a bar of tqdm."""

    def __init__(self, items: Iterable[Any] | None, total: int | None, progress: Progress | None) -> None:
        self._items, self._total, self._progress = items, total, progress
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items if self._items is not None else ())

    def update(self, n: int = 1) -> None:
        """Counts requests that are done."""
        self._done += n
        if self._progress is not None and self._total:
            self._progress(min(self._done, self._total), self._total)

    def close(self) -> None:
        """Does nothing."""
