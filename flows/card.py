"""The model card of an exported checkpoint."""

from collections.abc import Iterator, Mapping
from typing import Any

from flows.results import provenance
from flows.session import Session
from surgeon.export import CARD_FACTS

_ELSEWHERE = ("sparsity",)
"""Settings that are in the tables beside."""


def model_card(session: Session, found: Mapping[str, Any]) -> str:
    """What was removed, how, from which data, and what it cost: Markdown with the hub's metadata header.

    Args:
        session: its parameters.
        found: facts of the stages before, by their name.
    """
    dense, prune, texts, recovery = (found[name] for name in ("evaluate", "prune", "calibrate", "recovery"))
    origin = provenance(session)
    recipe = origin["parameters"]["prune"]
    trained = "with low-rank adapters trained after each shot" if recipe["adapters"] else "without retraining"
    pruned = {**prune["pruned"], **(recovery["after"] if recovery["accepted"] else {})}
    calibration, evaluation = texts["calibration"], texts["evaluation"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    rows = "\n".join(
        f"| {shot['shot']} | {shot['target']:.1%} | {shot['sparsity']:.2%} | {shot['perplexity']:.2f} |"
        for shot in prune["shots"]
    )
    return f"""---
library_name: transformers
tags: [pruned, surgeon]
---

# {_inline(session.checkpoint.source)}, {pruned["sparsity"]:.1%} of its decoder weights removed

Pruned with Surgeon {origin["versions"]["surgeon"]} {trained}: {describe_settings(recipe)}.{_recovery(recovery)}

| | dense | pruned |
|---|---|---|
| perplexity ({evaluation["n_windows"]} windows of {evaluation["length"]} tokens) | {dense["perplexity"]:.2f} | {pruned["perplexity"]:.2f} |
| non-zero parameters | {dense["nonzero"]:,} | {pruned["nonzero"]:,} |
| non-zero weights of decoder linears | {dense["linear_nonzero"]:,} | {pruned["linear_nonzero"]:,} |

| shot | asked | removed | perplexity |
|---|---|---|---|
{rows}

{CARD_FACTS}

- Base model: {_inline(session.checkpoint.source)}, revision {_inline(session.checkpoint.revision)}, digest `{session.checkpoint.digest}`.
- Calibration: {calibration["n_sequences"]} sequences of {calibration["length"]} tokens of {_inline(calibration["source"])}
  ({_inline(calibration["split"])}, {_inline(calibration["revision"])}), seed {origin["seed"]}.
- Evaluation: {_inline(evaluation["source"])} ({_inline(evaluation["split"])}, {_inline(evaluation["revision"])}).
- Digest of the weights: `{recovery["weights_digest"]}`.
- Versions: {versions}.
"""


def _recovery(facts: Mapping[str, Any]) -> str:
    """What training came after pruning; nothing where there was none, or it did not help."""
    if not facts["accepted"]:
        return ""
    corpus, given = facts["corpus"], facts["parameters"]
    return (
        f" Then trained ({given['method']}) to step {facts['best_step']} of {facts['steps']}, "
        f"{given['batch_tokens']:,} tokens each, on {_inline(corpus['source'])} ({_inline(corpus['split'])}), at a "
        f"peak rate of {given['learning_rate']:g}: perplexity {facts['before']['perplexity']:.2f} before, "
        f"{facts['after']['perplexity']:.2f} after."
    )


def describe_settings(resolved: dict[str, Any]) -> str:
    """All settings of pruning that have an effect, but the sparsity, in one line."""
    return ", ".join(f"{name} {value}" for name, value in _leaves(resolved) if name not in _ELSEWHERE)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of settings that have an effect, those of a section after its name."""
    for key, value in tree.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name} of ")
        elif value is not None:
            yield name, value


def _inline(text: str) -> str:
    """A name as inline code, so that nothing in it is taken for markup."""
    return "`" + str(text).replace("`", "'").replace("\n", " ") + "`"
