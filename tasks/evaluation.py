"""What a model is worth: perplexity on held-out windows, size, and a sample of text."""

from functools import partial

import torch

from surgeon.counting import count_model
from surgeon.generation import continue_prompt
from surgeon.passes.evaluation import evaluate_perplexity
from surgeon.store import Reference
from tasks.calibration import load_tokenizer
from tasks.context import Context, ModelState
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays
from tasks.weights import open_model

EVALUATION = Stage(
    "evaluation",
    1,
    (
        "surgeon.passes.blockwise",
        "surgeon.passes.curvature",
        "surgeon.passes.evaluation",
        "surgeon.passes.loss",
        "surgeon.counting",
    ),
)
SAMPLE = Stage("sample", 1, ("surgeon.passes.blockwise", "surgeon.generation"))


def evaluation_request(context: Context, state: ModelState, windows: Reference, label: str) -> Request:
    """The request for the evaluation of a state."""
    inputs = {"weights": state.digest, "windows": windows.digest}
    return Request(EVALUATION, {"batch_size": context.batch_size}, inputs, f"{label}/evaluation")


def evaluation_task(context: Context, state: ModelState, windows: Reference, label: str) -> Outcome[Reference]:
    """Perplexity and parameter counts of a state; the numbers are the reference's attributes."""

    def compute() -> Product:
        model = open_model(context, state)
        tokens = read_arrays(context, windows.key)["tokens"]
        progress = partial(report, f"{label}: evaluation")
        whole = range(model.n_blocks) if len(context.groups) == 1 else range(0)
        with model.loaded(whole):  # where all blocks fit, they are read once for both
            result = evaluate_perplexity(model, tokens, context.groups, context.batch_size, progress)
            counts = count_model(model)
        return Product(
            {},
            {
                "perplexity": result.perplexity,
                "loss": result.loss,
                "n_predictions": result.n_predictions,
                "n_windows": result.n_windows,
                "length": result.length,
                "parameters": counts.parameters,
                "nonzero": counts.nonzero,
                "linear_weights": counts.linear_weights,
                "linear_nonzero": counts.linear_nonzero,
                "bytes": counts.bytes,
            },
        )

    return produce(context, evaluation_request(context, state, windows, label), compute)


def sample_request(context: Context, state: ModelState, prompt: str, n_tokens: int, label: str) -> Request:  # noqa: ARG001
    """The request for a greedy continuation."""
    return Request(SAMPLE, {"prompt": prompt, "n_tokens": n_tokens}, {"weights": state.digest}, f"{label}/sample")


def sample_task(context: Context, state: ModelState, prompt: str, n_tokens: int, label: str) -> Outcome[Reference]:
    """Greedy continuation of a prompt; the text is in the reference's attributes."""

    def compute() -> Product:
        model = open_model(context, state)
        tokenizer = load_tokenizer(context.model.checkpoint)
        with model.loaded(range(model.n_blocks)), torch.no_grad():
            text = continue_prompt(model.model, tokenizer, prompt, n_tokens)
        return Product({}, {"prompt": prompt, "continuation": text})

    return produce(context, sample_request(context, state, prompt, n_tokens, label), compute)
