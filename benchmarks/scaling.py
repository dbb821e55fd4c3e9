"""What pruning costs by size of model and machine: tables and plot of docs/scaling.md, from `surgeon plan`'s code.

Usage: python -m benchmarks.scaling [--write] [--measure MACHINE]

Without options prints the tables. `--write` puts them into docs/scaling.md and draws docs/scaling.png. `--measure` puts
the rates of this machine into benchmarks/machines.yaml, measured on random weights of OPT-1.3B's widths (best of some
rounds): run it on a machine that does nothing else.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from benchmarks.random_checkpoints import SHAPES, make_checkpoint
from benchmarks.scaling_model import MACHINES, SHOTS, SPARSITY, TERMS, Cost, Machine, ScalingModel, read_machines
from surgeon.planning import Operation

MODELS = {
    "125M": "opt-125m",
    "1.3B": "opt-1.3b",
    "7B": "llama-2-7b",
    "13B": "llama-2-13b",
    "70B": "llama-2-70b",
}
STRUCTURES = ("units", "rows-and-columns")
DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- begin: python -m benchmarks.scaling --write -->", "<!-- end -->"
_ROUNDS = 3
Costs = Mapping[tuple[str, str, str], Cost | None]
"""By structure, model and machine."""


def costs(structures: tuple[str, ...] = STRUCTURES, models: Mapping[str, str] = MODELS) -> Costs:
    """Everything that the tables say."""
    machines = read_machines()
    found: dict[tuple[str, str, str], Cost | None] = {}
    with tempfile.TemporaryDirectory() as directory:
        for structure in structures:
            for size, name in models.items():
                model = ScalingModel(SHAPES[name], structure, Path(directory) / structure / name)
                for key, machine in machines.items():
                    found[structure, size, key] = model.cost(machine)
    return found


def tables(found: Costs) -> Iterator[str]:
    """Markdown of all tables."""
    machines = read_machines()
    yield _machines_table(machines)
    for structure in dict.fromkeys(structure for structure, _, _ in found):
        mine = {(size, key): cost for (s, size, key), cost in found.items() if s == structure}
        yield f"### `structure: {structure}`"
        yield _summary(mine, machines)
        yield _terms_table(mine, machines)
        yield _parallel_table(mine)


def _machines_table(machines: Mapping[str, Machine]) -> str:
    names = (Operation.FORWARD, Operation.GRAM, Operation.SOLVES, Operation.WRITES, Operation.READS, Operation.LOADS)
    lines = ["| machine | forward, Tmac/s | gram | solves | store written, GB/s | read | weights | source |"]
    lines.append("|---" * 8 + "|")
    for machine in machines.values():
        rates = [machine.rates.per_second[name] for name in names]
        cells = [f"{rate / 1e12:.3g}" for rate in rates[:3]] + [f"{rate / 1e9:.2g}" for rate in rates[3:]]
        lines.append(f"| {machine.name} | {' | '.join(cells)} | {machine.source} |")
    return "\n".join(lines)


def row(size: str, key: str, cost: Cost | None, machines: Mapping[str, Machine]) -> str:
    """A row of the summary."""
    name = machines[key].name
    if cost is None:
        return f"| {size} | {name} | does not fit | | | | | | | |"
    first = sum(cost.first.values())
    return (
        f"| {size} | {name} | {duration(first)} | {duration(cost.seconds)} | {cost.dominant} "
        f"| {cost.device_gib:.1f} | {cost.host_gib:.1f} | {cost.disk_gib:,.0f} | {cost.moved_gib:,.0f} "
        f"| {cost.blocks_per_group} |"
    )


def _summary(found: Mapping[tuple[str, str], Cost | None], machines: Mapping[str, Machine]) -> str:
    lines = [
        f"| model | machine | first shot | {SHOTS} shots | most of it | device, GiB | host, GiB | store, GiB "
        "| moved, GiB | blocks at once |",
        "|---" * 10 + "|",
    ]
    lines += [row(size, key, cost, machines) for (size, key), cost in found.items()]
    return "\n".join(lines)


def _terms_table(found: Mapping[tuple[str, str], Cost | None], machines: Mapping[str, Machine]) -> str:
    lines = [f"| seconds of {SHOTS} shots | machine | {' | '.join(TERMS)} |", "|---" * (2 + len(TERMS)) + "|"]
    for (size, key), cost in found.items():
        if cost is not None:
            cells = " | ".join(f"{cost.terms[term]:,.0f}" for term in TERMS)
            lines.append(f"| {size} | {machines[key].name} | {cells} |")
    return "\n".join(lines)


def _parallel_table(found: Mapping[tuple[str, str], Cost | None]) -> str:
    """One 80 GB GPU beside eight of them, by kind of task."""
    kinds = ("curvature", "boundary", "reduction", "costs", "mask", "update", "evaluation", "spectra")
    lines = [f"| {SHOTS} shots, seconds: 1 / 8 GPUs of 80 GB | {' | '.join(kinds)} | all |"]
    lines.append("|---" * (2 + len(kinds)) + "|")
    for size in dict.fromkeys(size for size, _ in found):
        one, eight = found.get((size, "gpu80")), found.get((size, "gpu80x8"))
        if one is None or eight is None:
            continue
        cells = [f"{one.by_kind.get(kind, 0.0):,.0f} / {eight.by_kind.get(kind, 0.0):,.0f}" for kind in kinds]
        whole = f"{one.seconds:,.0f} / {eight.seconds:,.0f} ({one.seconds / eight.seconds:.1f} times)"
        lines.append(f"| {size} | {' | '.join(cells)} | {whole} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def write_document(found: Costs) -> None:
    """Puts the tables between the marks of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(tables(found)) + f"\n\n{END}{after}", encoding="utf-8")


def draw(found: Costs, path: Path) -> None:
    """Time of all shots by size of model, a line for each machine; circles where one block at a time fits no more."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    machines = read_machines()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    sizes = {size: float(size.rstrip("MB")) * (1e6 if size.endswith("M") else 1e9) for size in MODELS}
    for axis, structure in zip(axes, STRUCTURES, strict=True):
        for key, machine in machines.items():
            points = [(sizes[size], found[structure, size, key]) for size in MODELS]
            there = [(x, cost.seconds / 3600) for x, cost in points if cost is not None]
            axis.plot(*zip(*there, strict=True), marker="o", label=machine.name)
        axis.set(xscale="log", yscale="log", xlabel="parameters", title=f"structure: {structure}")
        axis.set_xticks(list(sizes.values()), list(sizes))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"hours of {SHOTS} shots")
    ticks = {1 / 60: "1 min", 1 / 6: "10 min", 1: "1 h", 10: "10 h", 100: "4 days", 1000: "6 weeks"}
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Pruning to {SPARSITY:.0%} in {SHOTS} shots, 128 x 2,048 calibration tokens")
    figure.savefig(path, dpi=110)


def measure(key: str) -> None:
    """Measures this machine and keeps the best of what was found."""
    from flows.engine import InlineEngine
    from flows.machine import measured_rates
    from flows.params import load_params
    from flows.session import Session
    from flows.workspace import Workspace

    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = make_checkpoint(SHAPES["opt-1.3b"], Path(directory) / "model", 2)
        given = [f"model.source={model}", "model.dtype=bfloat16", "calibrate.length=512", "run.batch_size=1"]
        session = Session(load_params(None, given), Workspace(Path(directory) / "project"), InlineEngine())
        for _ in range(_ROUNDS):
            for name, rate in measured_rates(session, again=True).to_json().items():
                best[name] = max(rate, best.get(name, 0.0))
        session.close()
    text = MACHINES.read_text(encoding="utf-8")
    rows = yaml.safe_load(text)
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    rows[key]["rates"] = {name: float(f"{rate:.3g}") for name, rate in best.items()}
    MACHINES.write_text(comment + yaml.safe_dump(rows, sort_keys=False, width=116), encoding="utf-8")


def main() -> None:
    """Does what the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md and draw the plot")
    parser.add_argument("--measure", metavar="MACHINE", help="measure this machine for a row of machines.yaml")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    found = costs()
    if arguments.write:
        write_document(found)
        draw(found, DOCUMENT.with_suffix(".png"))
    else:
        print("\n\n".join(tables(found)))


if __name__ == "__main__":
    main()
