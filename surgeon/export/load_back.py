"""Whether an export gives the logits of the pruned model when another process loads it.

The pruned model is run block by block. The export is loaded by a fresh Python process that knows torch and transformers
and nothing of Surgeon, as its users will. An export that is large beside the memory there is stays in its files, and
each block is read when it runs. The texts have different lengths, so padding, attention mask and the
key/value cache are looked at too.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgeon.errors import ExportError
from surgeon.memory import loads_by_block
from surgeon.passes.blockwise import BlockwiseModel

SCRIPT = Path(__file__).with_name("load_back_script.py")
LIMITS = {torch.float32: 1e-4}
HALF_LIMIT = 5e-2


@dataclass(frozen=True)
class Probe:
    """Two or more sequences padded on the left.

    Attributes:
        input_ids: `[n_sequences, length]` int64.
        attention_mask: the same shape, 0 where a token is padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Probe":
        """Pads sequences on the left with token 0."""
        length = max(len(sequence) for sequence in sequences)
        padding = [length - len(sequence) for sequence in sequences]
        ids = [[0] * n + list(sequence) for n, sequence in zip(padding, sequences, strict=True)]
        mask = [[0] * n + [1] * len(sequence) for n, sequence in zip(padding, sequences, strict=True)]
        return cls(torch.tensor(ids), torch.tensor(mask))


def expected_logits(model: BlockwiseModel, probe: Probe) -> Tensor:
    """Logits of the probe `[n_sequences, length, n_vocabulary]`, float32 on the CPU, holding one block at a time."""

    def masked(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": probe.attention_mask.to(model.device)}

    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.model.register_forward_pre_hook(masked, with_kwargs=True).remove)
        embedded = model.embed(probe.input_ids)
        hidden = embedded.hidden
        for index in range(model.n_blocks):
            with model.loaded(range(index, index + 1)):
                hidden = model.run_block(index, hidden, embedded.calls[index])
        return model.head(probe.input_ids, hidden).float().cpu()


def require_loads_back(
    directory: Path, probe: Probe, expected: Tensor, dtype: torch.dtype, trust_remote_code: bool = False
) -> float:
    """Loads an exported checkpoint in a fresh process and compares logits, without and with the key/value cache.

    Args:
        directory: the export.
        probe: what it is run on.
        expected: logits of the pruned model, `[n_sequences, length, n_vocabulary]`.
        dtype: to load with: the one ``expected`` was computed in.
        trust_remote_code: whether model code that comes with the checkpoint may run.

    Returns:
        Largest difference of a logit, relative to the largest logit.

    Raises:
        ExportError: if it does not load, or they differ by more than rounding.
    """
    logits = fresh_logits(directory, probe, dtype, trust_remote_code)
    return require_same_logits(directory, logits, probe, expected, dtype)


def require_same_logits(
    directory: Path, logits: Mapping[str, Tensor], probe: Probe, expected: Tensor, dtype: torch.dtype
) -> float:
    """Compares logits of an export, `whole` and `stepwise`, with those of the pruned model.

    Returns:
        Largest difference of a logit, relative to the largest logit.

    Raises:
        ExportError: if they differ by more than rounding.
    """
    real = probe.attention_mask.bool()
    wanted = expected[real]
    limit = LIMITS.get(dtype, HALF_LIMIT)
    differences = {
        how: float((found[real] - wanted).abs().max() / wanted.abs().max())
        if found.shape == expected.shape
        else torch.inf
        for how, found in logits.items()
    }
    for how, difference in differences.items():
        if not difference <= limit:
            with_cache = " with the key/value cache" if how == "stepwise" else ""
            raise ExportError(
                f"{directory} loads in transformers but gives other logits{with_cache} than the pruned model in "
                f"memory: relative difference {difference:.2e}, allowed {limit:g}. Nothing should rely on this export; "
                "please report it."
            )
    return max(differences.values())


def fresh_logits(directory: Path, probe: Probe, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, Tensor]:
    """Logits of an export in a process of its own: in one go (`whole`), and in two steps with a cache (`stepwise`)."""
    with tempfile.TemporaryDirectory(prefix="surgeon-load-back-") as folder:
        work = Path(folder)
        save_file(
            {"input_ids": probe.input_ids.contiguous(), "attention_mask": probe.attention_mask.contiguous()},
            work / "tokens.safetensors",
        )
        request = {
            "directory": str(directory.absolute()),
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
            "by_block": loads_by_block(sum(file.stat().st_size for file in directory.glob("*.safetensors"))),
            "threads": torch.get_num_threads(),
            "tokens": str(work / "tokens.safetensors"),
            "result": str(work / "logits.safetensors"),
        }
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # The modelling file is imported from a copy, which must be neither an old one nor stay.
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
        done = subprocess.run(
            [sys.executable, "-I", str(SCRIPT), str(work / "request.json")],
            env={**os.environ, **offline, "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-3:]
            raise ExportError(
                f"{directory} does not load in a fresh Python process (status {done.returncode}): {' / '.join(last)}. "
                "Nothing should rely on this export; please report it."
            )
        logits: dict[str, Tensor] = load_file(work / "logits.safetensors")
        return logits
