"""What is known of an export once it is written: its form, and how large it is beside the dense model."""

from collections.abc import Sequence
from typing import Any

from surgeon.choices import ExportLayout
from surgeon.export.plan import ExportPlan
from surgeon.export.tensors import Tally

CARD_FACTS = "{{export}}"
"""Where a model card has what `describe` gives."""


def export_facts(plan: ExportPlan, tally: Tally, n_bytes: int) -> dict[str, Any]:
    """Facts of an export; plain JSON.

    Args:
        plan: the export.
        tally: what was counted while it was written.
        n_bytes: bytes of all tensors written.
    """
    kept, blocks = plan.layout.kept, plan.layout.blocks
    n_blocks = plan.dense.architecture.n_blocks
    n_left = sum(linear.dense[0] * linear.dense[1] for block in blocks for linear in block.linears.values())
    n_weights = _linear_weights(plan)
    n_live = sum(tally.live.get(index, block.n_live) for index, block in zip(kept, blocks, strict=True))
    is_dense = plan.form is ExportLayout.DENSE
    return {
        "layout": plan.form.value,
        "why_not_stock": plan.why_not_stock,
        "trust_remote_code": plan.needs_code,
        "index_maps": not is_dense and any(li.has_maps for block in blocks for li in block.linears.values()),
        "parameters_dense": tally.parameters_dense,
        "parameters": tally.parameters,
        "weights": n_weights,
        "weights_zeroed": n_weights - n_live,
        "weights_gone": n_weights - n_left + (0 if is_dense else sum(block.n_gone for block in blocks)),
        "bytes_dense": tally.bytes_dense,
        "bytes": n_bytes,
        "blocks_dense": n_blocks,
        "blocks_removed": [index for index in range(n_blocks) if index not in kept],
        "neurons": _range([block.n_neurons for block in blocks]) if not is_dense else None,
        "query_heads": _range([block.n_query_heads for block in blocks]) if not is_dense else None,
        "key_value_heads": _range([block.n_kv_heads for block in blocks]) if not is_dense else None,
    }


def _linear_weights(plan: ExportPlan) -> int:
    """Weights of all linears of the dense model."""
    architecture, skeleton = plan.dense.architecture, plan.dense.skeleton
    return sum(
        architecture.linear(skeleton, index, name).weight.numel()
        for index in range(architecture.n_blocks)
        for name in architecture.linear_names(index)
    )


def _range(counts: Sequence[int | None]) -> list[int] | None:
    """The smallest and the largest."""
    known = [count for count in counts if count is not None]
    return [min(known), max(known)] if len(known) == len(counts) else None


def describe(facts: dict[str, Any]) -> str:
    """Size and form of an export for a reader, and how to load it (Markdown)."""
    share = 1 - facts["bytes"] / facts["bytes_dense"]
    size = (
        f"The weight files are {share:.1%} smaller"
        if facts["bytes"] < facts["bytes_dense"]
        else "The files are no smaller"
    )
    lines = [
        "| | dense | this checkpoint |",
        "|---|---|---|",
        f"| parameters in the files | {facts['parameters_dense']:,} | {facts['parameters']:,} |",
        f"| bytes of weights, same type | {facts['bytes_dense']:,} | {facts['bytes']:,} |",
        "",
        f"Of {facts['weights']:,} weights of decoder linears pruning set {facts['weights_zeroed']:,} to zero; "
        f"{facts['weights_gone']:,} are not in the files, with all that depended on them alone.",
        *_blocks(facts),
        f"{size} than those of the dense model in the same type. Layout: {_LAYOUTS[facts['layout']]}.{_widths(facts)}",
        "",
        _HOW_TO_LOAD[facts["trust_remote_code"]],
        "",
        f"Loaded back in a fresh process, its logits differ from those of the pruned model by "
        f"{facts['largest_logit_difference']:.1e} of the largest.",
    ]
    return "\n".join(lines)


_LAYOUTS = {
    "stock": "stock, a smaller model of a kind that transformers knows",
    "compact": "compact, linears of the sizes that are left, with a modelling file beside the weights",
    "dense": "dense, the shapes of the dense model with exact zeros, which make nothing faster",
}

_HOW_TO_LOAD = {
    False: """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```""",
    True: """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)
```

`trust_remote_code` runs the modelling file in this directory. Where Surgeon is installed,
`surgeon.load("path/to/this/directory")` loads an export without running it.""",
}


def _blocks(facts: dict[str, Any]) -> list[str]:
    """Which blocks are gone whole."""
    removed, n_blocks = facts["blocks_removed"], facts["blocks_dense"]
    if not removed:
        return []
    return [
        f"{n_blocks - len(removed)} of {n_blocks} decoder blocks are left, numbered anew; gone: "
        f"{', '.join(map(str, removed))} (counted from 0)."
    ]


def _widths(facts: dict[str, Any]) -> str:
    labels = {"neurons": "MLP neurons", "query_heads": "query heads", "key_value_heads": "key/value heads"}
    kept = [
        f"{' to '.join(str(count) for count in sorted(set(facts[name])))} {label}"
        for name, label in labels.items()
        if facts[name] is not None
    ]
    return f" Per block: {', '.join(kept)}." if kept else ""
