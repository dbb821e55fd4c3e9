"""The section about where the numbers come from, with the command that makes the same run again."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from flows.params import Params
from flows.report.inputs import IRRELEVANT, ReportInputs
from flows.report.tables import Table

_WHOLE = ("text",)
"""Sections that are given as a whole: a part of the default may not fit to the rest."""


def provenance_section(inputs: ReportInputs) -> dict[str, Any]:
    """Model, texts, versions, digests, command and all parameters."""
    results = inputs.results
    origin = results["provenance"]
    model, calibration, evaluation = origin["model"], origin["calibration"], origin["evaluation"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    drawn = f"{calibration['n_sequences']} sequences of {calibration['length']} tokens"
    cut = f"{evaluation['n_windows']} windows of {evaluation['length']} tokens"
    rows = [
        ("model", f"{model['source']}, revision {model['revision']}", False),
        ("model digest", model["digest"], True),
        ("calibration", f"{drawn} of {_text(calibration)}", False),
        ("calibration text", calibration["text_digest"], True),
        ("evaluation", f"{cut} of {_text(evaluation)}", False),
        ("evaluation text", evaluation["text_digest"], True),
        ("tokenizer", calibration["tokenizer_digest"], True),
        ("pruned weights", results["weights_digest"], True),
        ("seed", str(origin["seed"]), False),
        ("device", f"{origin['device']}, {origin['batch_size']} sequences in a pass", False),
        ("versions", versions, False),
    ]
    parameters = [(name, "null" if value is None else _yaml(value)) for name, value in flat(origin["parameters"])]
    return {
        "command": command_line(inputs.params),
        "origin": rows,
        "parameters": Table(
            "Names as in params.yaml; prune with every choice made", ("parameter", "value"), parameters
        ),
        "version": origin["versions"]["surgeon"],
    }


def _text(text: Mapping[str, Any]) -> str:
    split = f" ({text['split']})" if text["split"] else ""
    return f"{text['source']}{split}, revision {text['revision']}"


def command_line(params: Params) -> str:
    """`surgeon run` with every parameter that is not the default one, quoted for a shell.

    It is meant for a directory with the shipped params.yaml, or with none.
    """
    given, default = params.model_dump(mode="json"), Params().model_dump(mode="json")
    for name in IRRELEVANT:
        del given["run"][name]
    parts = [f"-S {shlex.quote(f'{name}={_yaml(value)}')}" for name, value in _changed(given, default)]
    return " \\\n    ".join(["surgeon run", *parts])


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of all parameters."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        leaves += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return leaves


def _changed(given: dict[str, Any], default: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in given.items():
        if value == default[name]:
            continue
        if isinstance(value, dict) and isinstance(default[name], dict) and name not in _WHOLE:
            found += _changed(value, default[name], f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _yaml(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
