"""Peak memory with one block at a time against all blocks at once: a random Llama of 24 blocks and width 1024.

Usage: python -m benchmarks.memory [--directory DIR]

Each side is a process of its own that computes the curvature of all blocks and stores it, as the first shot of a run
does; the factors must be the same to the bit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = """
import hashlib, json, resource, sys
from pathlib import Path
from flows.engine import InlineEngine
from flows.params import load_params
from flows.session import Session
from flows.statistics import BlockStatistics
from flows.workspace import Workspace

project, model, blocks = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
params = load_params(None, [
    f"model.source={model}", "run.engine=inline", f"run.blocks_per_group={blocks}", "run.keep=all",
    "calibrate.sequences=8", "calibrate.length=64", "evaluate.windows=4", "evaluate.length=64", "run.batch_size=4",
])
session = Session(params, Workspace(project), InlineEngine())
statistics = BlockStatistics(session, session.dense, session.calibration(), "shot-01", session.recipe.curvature)
statistics.ensure(set(range(session.model.n_blocks)))
digests = [ref.digest for b in range(session.model.n_blocks) for ref in statistics.references(b).values()]
digest = hashlib.sha256("".join(digests).encode()).hexdigest()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"peak_gib": peak, "digest": digest}))
"""


def make_model(directory: Path, blocks: int, width: int) -> Path:
    """Saves a random Llama with the byte-level tokenizer of the tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import byte_tokenizer

    if not (directory / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=1024,
            max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    return directory


def main() -> None:
    """Runs both sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="where the model and the results go")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        model = make_model(directory / "model", arguments.blocks, arguments.width)
        results = {}
        for blocks_per_group in (arguments.blocks, 1):
            command = [sys.executable, "-c", _CHILD, str(directory / str(blocks_per_group)), str(model)]
            found = subprocess.run([*command, str(blocks_per_group)], capture_output=True, text=True, check=True)
            results[blocks_per_group] = json.loads(found.stdout.splitlines()[-1])
    print("| blocks per group | peak resident memory, GiB | digest of the factors |\n|---|---|---|")
    for blocks_per_group, result in results.items():
        print(f"| {blocks_per_group} | {result['peak_gib']:.2f} | {result['digest'][:16]} |")
    ratio = results[arguments.blocks]["peak_gib"] / results[1]["peak_gib"]
    same = results[arguments.blocks]["digest"] == results[1]["digest"]
    print(f"\nall blocks at once / one at a time: {ratio:.2f}; factors {'the same' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
