"""Token sequences: to calibrate on, and to evaluate on."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surgeon.errors import TextError
from surgeon.models import Checkpoint
from surgeon.models.quiet import quiet_transformers
from surgeon.store import Reference
from surgeon.text import (
    SequenceOrder,
    Text,
    TextSpec,
    consecutive_windows,
    read_text,
    require_disjoint,
    require_low_overlap,
    sample_sequences,
    shared_fraction,
    tokenize,
    tokenizer_digest,
)
from tasks.context import Context, ModelSpec
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays

_TEXT = ("surgeon.text.sequences", "surgeon.text.tokenizers")
SEQUENCES = Stage("sequences", 1, _TEXT)
WINDOWS = Stage("windows", 1, _TEXT)


@dataclass(frozen=True)
class SequenceSpec:
    """Fixed-length calibration sequences: how many, how long, drawn how; draws of different shots are independent."""

    text: TextSpec
    n_sequences: int
    length: int
    order: SequenceOrder
    seed: int
    shot: int


@dataclass(frozen=True)
class WindowSpec:
    """Consecutive evaluation windows; all of the text if n_windows is None."""

    text: TextSpec
    n_windows: int | None
    length: int


@lru_cache(maxsize=4)
def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint. It is loaded once: the checkpoint's digest covers its files."""
    with quiet_transformers():  # which does not know the model type of a compact export, and need not
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    return tokenizer


def require_length(model: ModelSpec, length: int, where: str) -> None:
    """Refuses sequences longer than the model's positions.

    Raises:
        TextError: naming the parameter and the limit.
    """
    limit = model.max_length
    if limit is not None and length > limit:
        raise TextError(f"{where}: got {length} tokens, but the model's positions end at {limit}; ask for at most that")


def require_separate(calibration: TextSpec, evaluation: TextSpec, what: str = "calibration") -> None:
    """Refuses to evaluate on the text that calibrates, or what else it is used for."""
    require_disjoint(read_text(calibration), read_text(evaluation), what)


def sequences_request(context: Context, spec: SequenceSpec) -> Request:
    """The request for calibration sequences; reads the text and the tokenizer for their digests."""
    parameters = {
        "n_sequences": spec.n_sequences,
        "length": spec.length,
        "order": spec.order,
        "seed": spec.seed,
        "shot": spec.shot,
    }
    return Request(SEQUENCES, parameters, open_text(context, spec.text)[2], "calibration/sequences")


def windows_request(context: Context, spec: WindowSpec) -> Request:
    """The request for evaluation windows; reads the text and the tokenizer for their digests."""
    parameters = {"n_windows": spec.n_windows, "length": spec.length}
    return Request(WINDOWS, parameters, open_text(context, spec.text)[2], "evaluation/windows")


def sequences_task(context: Context, spec: SequenceSpec) -> Outcome[Reference]:
    """Calibration sequences `[n_sequences, length]` int64 with their offsets in the text."""
    require_length(context.model, spec.length, "calibrate.length")
    text, tokenizer, inputs = open_text(context, spec.text)

    def compute() -> Product:
        tokens = tokenize(text, tokenizer)
        drawn = sample_sequences(tokens, spec.n_sequences, spec.length, (spec.seed, spec.shot), spec.order)
        return Product(
            {"tokens": drawn.tokens, "offsets": drawn.offsets},
            {**origin(text, inputs), "n_sequences": spec.n_sequences, "length": spec.length},
        )

    return produce(context, sequences_request(context, spec), compute)


def windows_task(context: Context, spec: WindowSpec, calibration: Reference) -> Outcome[Reference]:
    """Evaluation windows `[n_windows, length]` int64; refused if they repeat the calibration sequences."""
    require_length(context.model, spec.length, "evaluate.length")
    text, tokenizer, inputs = open_text(context, spec.text)

    def compute() -> Product:
        windows = consecutive_windows(tokenize(text, tokenizer), spec.length, spec.n_windows)
        return Product({"tokens": windows}, {**origin(text, inputs), "n_windows": len(windows), "length": spec.length})

    outcome = produce(context, windows_request(context, spec), compute)
    require_low_overlap(
        read_arrays(context, calibration.key)["tokens"], read_arrays(context, outcome.value.key)["tokens"]
    )
    return outcome


def overlap(context: Context, calibration: Reference, windows: Reference) -> float:
    """Fraction of evaluation tokens that lie in a span found verbatim in the calibration sequences."""
    first, second = (read_arrays(context, reference.key)["tokens"] for reference in (calibration, windows))
    return shared_fraction(first, second)


def open_text(context: Context, spec: TextSpec) -> tuple[Text, PreTrainedTokenizerBase, dict[str, str]]:
    """A text, the tokenizer of the model, and the digests of both, which are inputs of what is made of them."""
    text, checkpoint = read_text(spec), context.model.checkpoint
    return text, load_tokenizer(checkpoint), {"text": text.digest, "tokenizer": _tokenizer_digest(checkpoint)}


@lru_cache(maxsize=4)
def _tokenizer_digest(checkpoint: Checkpoint) -> str:
    return tokenizer_digest(load_tokenizer(checkpoint))


def origin(text: Text, inputs: dict[str, str]) -> dict[str, Any]:
    """Where the tokens of a result come from, for its attributes."""
    return {
        "source": text.source,
        "split": text.split,
        "revision": text.revision,
        "text_digest": inputs["text"],
        "tokenizer_digest": inputs["tokenizer"],
    }
