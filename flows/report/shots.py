"""The section about shots: perplexity against sparsity, and what each shot did."""

import math
from collections.abc import Mapping
from typing import Any

from flows.report.numbers import percent, rough
from flows.report.plots import draw_curve
from flows.report.tables import Table


def shot_section(results: Mapping[str, Any]) -> dict[str, Any]:
    """Curve and tables, from the dense model over all shots."""
    dense, shots = results["dense"]["perplexity"], results["shots"]
    rows = [("dense", "", "0%", f"{dense:,.2f}", "")]
    before = dense
    for shot in shots:
        step = f"{math.log(shot['perplexity'] / before):+.3f}"
        asked, reached = percent(shot["target"], 2), percent(shot["sparsity"], 2)
        rows.append((str(shot["shot"]), asked, reached, f"{shot['perplexity']:,.2f}", step))
        before = shot["perplexity"]
    head = ("shot", "asked", "removed", "perplexity", "loss, change")
    note = f"{results['windows']} windows of {results['window_length']} tokens that were not used for calibration."
    return {
        "curve": draw_curve(dense, shots),
        "curve_note": note,
        "shots": Table("The dense model and the model after every shot; loss in nats per token", head, rows),
        "shot_losses": _losses(results),
    }


def _losses(results: Mapping[str, Any]) -> Table:
    """What the curvature predicted beside what was measured.

    The prediction is of the damped quadratic model on the calibration text, and the measurement is on the evaluation
    text after the update, so that only their course over the shots is to be compared.
    """
    rows, before = [], math.log(results["dense"]["perplexity"])
    for shot in results["shots"]:
        threshold = "none" if shot["threshold"] is None else rough(shot["threshold"])
        measured = shot["loss"] - before
        predicted = "none" if shot["predicted_cost"] is None else rough(shot["predicted_cost"])
        rows.append((str(shot["shot"]), f"{shot['n_removed']:,}", threshold, predicted, f"{measured:+.4f}"))
        before = shot["loss"]
    head = ("shot", "structures removed", "threshold of the mask", "rise predicted", "rise measured")
    caption = (
        "Loss in nats per token: predicted by the damped curvature on the calibration text, and measured on the "
        "evaluation text. How the two move together says more than how far apart they are."
    )
    return Table(caption, head, rows)
