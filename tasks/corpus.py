"""Rows of a text that recovery trains on, and rows that are held out to see whether it helps."""

from surgeon.recovery.packing import pack_rows
from surgeon.recovery.settings import RecoverySettings
from surgeon.store import Reference
from surgeon.text import TextSpec, require_low_overlap, tokenize
from tasks.calibration import open_text, origin, require_length
from tasks.context import Context
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays

CORPUS = Stage("corpus", 1, ("surgeon.recovery.packing", "surgeon.text.tokenizers"))


def corpus_request(context: Context, spec: TextSpec, settings: RecoverySettings, windows: Reference) -> Request:
    """The request for the rows of a text; reads the text and the tokenizer for their digests.

    The evaluation windows are an input, because a text that holds them is refused.
    """
    parameters = {
        "length": settings.length,
        "n_rows": settings.steps * settings.rows_per_step,
        "rows_per_step": settings.rows_per_step,
        "validation_rows": settings.validation_rows,
        "seed": settings.seed,
    }
    inputs = {**open_text(context, spec)[2], "windows": windows.digest}
    return Request(CORPUS, parameters, inputs, "recovery/corpus")


def corpus_task(context: Context, spec: TextSpec, settings: RecoverySettings, windows: Reference) -> Outcome[Reference]:
    """Rows to train on, ``training`` `[n_rows, length]`, and held out, ``validation``; int64.

    Raises:
        TextError: the text is too short, or it holds the evaluation windows, be it in rows that are not drawn.
    """
    require_length(context.model, settings.length, "recovery.length")
    text, tokenizer, inputs = open_text(context, spec)

    def compute() -> Product:
        tokens = tokenize(text, tokenizer)
        evaluation = read_arrays(context, windows.key)["tokens"]
        require_low_overlap(tokens[None], evaluation, what="recovery corpus")
        rows = pack_rows(tokens, settings)
        facts = {
            **origin(text, inputs),
            "n_rows": len(rows.training),
            "n_validation_rows": len(rows.validation),
            "length": settings.length,
            "epochs": settings.steps * settings.rows_per_step / len(rows.training),
        }
        arrays = {
            "training": rows.training,
            "validation": rows.validation,
            "training_places": rows.training_places,
            "validation_places": rows.validation_places,
        }
        return Product(arrays, facts)

    return produce(context, corpus_request(context, spec, settings, windows), compute)
