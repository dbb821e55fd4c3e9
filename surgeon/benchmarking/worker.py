"""The process that holds one of two compared models: reads requests and answers them, one JSON line each.

Started as ``python -m surgeon.benchmarking.worker``. Requests come on standard input, and the process ends with it.
Answers go to what standard output was at the start; whatever else prints goes to standard error.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from surgeon.benchmarking.timing import Shape, keeps_last_logits, random_tokens, time_once
from surgeon.loading import load_checkpoint
from surgeon.peak import peak_gib, reset_peak

_GIB = 2**30
_PAGE_NUMBERS = 1024


class Worker:
    """Answers requests; keeps the model."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._idle = _resident_gib()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what is asked for."""
        return self._load(request) if request["do"] == "load" else self._time(request)

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        dtype = getattr(torch, request["dtype"])
        model = load_checkpoint(
            Path(request["directory"]), dtype, request["device"], trust_remote_code=request["trust_remote_code"]
        )
        self._model = model
        _touch(model)
        reset_peak()
        config = model.config.get_text_config(decoder=True)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary": config.vocab_size,
            "positions": getattr(config, "max_position_embeddings", None),
            "last_logits_only": keeps_last_logits(model),
            "idle_gib": self._idle,
            "loaded_gib": _resident_gib(),
            "device_loaded_gib": torch.cuda.memory_allocated() / _GIB if request["device"] == "cuda" else None,
        }

    def _time(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._model is not None
        shape = Shape(request["batch_size"], request["prompt"], request["new_tokens"])
        tokens = random_tokens(shape, request["vocabulary"], request["seed"]).to(self._model.device)
        if request["first"]:
            reset_peak()
            if tokens.is_cuda:
                torch.cuda.reset_peak_memory_stats()
        begun = time.monotonic()
        seconds = time_once(self._model, tokens, shape)
        return {
            "prefill_s": seconds.prefill,
            "decode_s": seconds.decode,
            "cache_bytes_per_token": seconds.cache_bytes_per_token,
            "span": [begun, time.monotonic()],
            "peak_gib": peak_gib(),
            "device_peak_gib": torch.cuda.max_memory_allocated() / _GIB if tokens.is_cuda else None,
        }


def _touch(model: PreTrainedModel) -> None:
    """Reads a number of every page of the weights: they may be mapped files, which take memory only once read."""
    for parameter in model.parameters():
        parameter.detach().reshape(-1)[::_PAGE_NUMBERS].sum().item()


def _resident_gib() -> float:
    return float(psutil.Process().memory_info().rss) / _GIB


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"answer": worker.answer(json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "out_of_memory": _is_out_of_memory(error)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
