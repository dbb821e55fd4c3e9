"""The section about recovery: the losses of training and of held-out rows, and the model before and after."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from flows.report.svg import Ink, drawing, new_figure, style_axes, to_svg
from flows.report.tables import Table

_FACTS = (("perplexity", ",.2f"), ("loss", ".4f"), ("nonzero", ",d"))
_NAMES = {"perplexity": "perplexity", "loss": "loss", "nonzero": "parameters left"}


def recovery_section(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Plot and table; None where nothing was trained."""
    facts = results["recovery"]
    if facts["accepted"] is None:
        return None
    return {
        "note": _note(facts),
        "warning": ""
        if facts["accepted"]
        else "Training did not lower the loss of the held-out rows: the weights are those that pruning left.",
        "plot": draw_learning(facts["curve"], facts["validation"]),
        "table": _table(facts),
    }


def _note(facts: Mapping[str, Any]) -> str:
    given, corpus = facts["parameters"], facts["corpus"]
    early = ", when the loss of the held-out rows had stopped falling" if facts["stopped_early"] else ""
    return (
        f"Method {facts['method']}: {facts['n_trained']:,} numbers trained on {facts['tokens']:,} tokens "
        f"({corpus['source']}) in {facts['steps']} steps{early}; peak rate {given['learning_rate']:g}. The weights are "
        f"those after step {facts['best_step']}. Thick: the loss of held-out rows; thin: of each step."
    )


def _table(facts: Mapping[str, Any]) -> Table:
    rows = [
        (_NAMES[name], format(facts["before"][name], form), format(facts["after"][name], form)) for name, form in _FACTS
    ]
    losses = [point["loss"] for point in facts["validation"]]
    rows.append(("held-out loss", f"{losses[0]:.4f}", f"{min(losses):.4f}"))
    took = (("seconds", "training, s"), ("tokens_per_s", "tokens/s"), ("peak_memory_gib", "peak memory, GiB"))
    rows += [(title, "", f"{facts[name]:,.1f}") for name, title in took if name in facts]
    return Table("Evaluation windows before and after recovery", ("", "before", "after"), rows)


def draw_learning(curve: list[dict[str, float]], validation: list[dict[str, float]]) -> Markup:
    """Losses of steps and of held-out rows, against the number of the step.

    Args:
        curve: loss of each step, or means over several.
        validation: loss of the held-out rows before the first step and after each segment.
    """
    with drawing("learning"):
        figure = new_figure(5.5, 3.2)
        axes = figure.subplots()
        style_axes(axes)
        axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], color=Ink.MUTED, linewidth=1.4)
        steps, losses = [p["step"] for p in validation], [p["loss"] for p in validation]
        axes.plot(steps, losses, color=Ink.REMOVED, linewidth=2.4, zorder=3)
        axes.plot(steps, losses, "o", color=Ink.REMOVED, markersize=7, zorder=4)
        axes.margins(x=0.04, y=0.15)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        points = "; ".join(f"{loss:.3f} after step {step:g}" for step, loss in zip(steps, losses, strict=True))
        description = f"The loss of the held-out rows: {points}."
        return to_svg(figure, "learning", "Losses of recovery training", description)
