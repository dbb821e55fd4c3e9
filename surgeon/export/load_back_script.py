"""Loads a checkpoint as anyone would, in a process of its own, and writes down its logits.

Run as `python -I load_back_script.py REQUEST`, where REQUEST is a JSON file with the directory, the dtype, whether its
own code may run, and the paths of the tokens and of the result. It imports nothing of Surgeon.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def logits_of(
    directory: str, tokens: dict[str, torch.Tensor], dtype: str, trust_remote_code: bool
) -> dict[str, torch.Tensor]:
    """Logits of padded sequences, in one go and in two steps with the key/value cache.

    Args:
        directory: of the checkpoint.
        tokens: `input_ids` and `attention_mask`, `[n_sequences, length]` int64.
        dtype: to load with.
        trust_remote_code: whether the Python files in the directory may run.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=trust_remote_code
    )
    model.eval()
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    first = 2 * ids.shape[1] // 3
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        start = model(ids[:, :first], attention_mask=mask[:, :first], use_cache=True)
        cache = start.past_key_values
        rest = model(ids[:, first:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    stepwise = torch.cat([start.logits, rest], dim=1)
    return {"whole": whole.float().contiguous(), "stepwise": stepwise.float().contiguous()}


def main(path: str) -> None:
    """Does what a request file says."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(request["threads"])
    tokens = load_file(request["tokens"])
    logits = logits_of(request["directory"], tokens, request["dtype"], request["trust_remote_code"])
    save_file(logits, request["result"])


if __name__ == "__main__":
    main(sys.argv[1])
