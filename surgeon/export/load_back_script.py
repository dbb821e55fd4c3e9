"""Loads a checkpoint as anyone would, in a process of its own, and writes down its logits.

Run as `python -I load_back_script.py REQUEST`, where REQUEST is a JSON file with the directory, the dtype, whether its
own code may run, whether blocks stay on the disk until they run, and the paths of the tokens and of the result. It
imports nothing of Surgeon.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging


def logits_of(
    directory: str, tokens: dict[str, torch.Tensor], dtype: str, trust_remote_code: bool, by_block: bool = False
) -> dict[str, torch.Tensor]:
    """Logits of padded sequences, in one go and in two steps with the key/value cache.

    Args:
        directory: of the checkpoint.
        tokens: `input_ids` and `attention_mask`, `[n_sequences, length]` int64.
        dtype: to load with.
        trust_remote_code: whether the Python files in the directory may run.
        by_block: whether each block is read from the files whenever it runs, so that one is held at a time.
    """
    offload = _blocks_on_disk(directory, trust_remote_code) if by_block else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=trust_remote_code, **offload
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


def _blocks_on_disk(directory: str, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments by which transformers (with accelerate) leaves the blocks in the files; all else is on the CPU."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
    n_blocks = config.get_text_config(decoder=True).num_hidden_layers
    lists = (name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    blocks = next(name for name in lists if len(model.get_submodule(name)) == n_blocks)
    places = {f"{blocks}.{index}": "disk" for index in range(n_blocks)}
    parts = blocks.split(".")
    for depth, part in enumerate(parts):
        outer = ".".join(parts[:depth])
        for name, _ in model.get_submodule(outer).named_children():
            if name != part:
                places[f"{outer}.{name}" if outer else name] = "cpu"
    # The files are read as they are: the folder is only asked for and stays empty.
    return {"device_map": places, "offload_folder": tempfile.mkdtemp(prefix="surgeon-offload-")}


def main(path: str) -> None:
    """Does what a request file says."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(request["threads"])
    tokens = load_file(request["tokens"])
    logits = logits_of(
        request["directory"], tokens, request["dtype"], request["trust_remote_code"], request["by_block"]
    )
    save_file(logits, request["result"])


if __name__ == "__main__":
    main(sys.argv[1])
