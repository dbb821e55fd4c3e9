"""Coupled units through the whole pipeline: widths, prices, updates, targets, and the smaller checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tiny
from transformers import AutoModelForCausalLM

from flows.stages import run_all
from surgeon.choices import Resource
from surgeon.errors import InputError, ParameterError
from surgeon.models.families import QkvLayout
from surgeon.pruning.units import SubLayerKind
from tasks.rule import WEIGHTS, Usage
from tasks.stage import read_arrays
from tasks.units import block_sub_layers, dense_usage
from tests.flows.project import Project, write_text
from tests.flows.sessions import Pruned, Runs
from tests.surgeon.conftest import make_falcon

FAMILIES = ("opt", "llama", "llama-gqa-tied", "mistral", "qwen2", "qwen3", "gpt_neox")
HEADS_ARE_FREE = {"opt": False, "gpt_neox": False}

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    """Family → runs on its tiny model, with a store of its own."""
    folder = tmp_path_factory.mktemp("units")
    texts = {name: {"source": str(write_text(folder / f"{name}.txt", s))} for s, name in enumerate(("first", "second"))}
    return {
        family: Runs(
            {
                "model": {"source": str(make_tiny(family, folder / family))},
                "calibrate": {"text": texts["first"], "sequences": 6, "length": 32},
                "evaluate": {"text": texts["second"], "windows": 4, "length": 32},
                "benchmark": {"rounds": 0},
                "report": {"new_tokens": 4},
                "run": {"engine": "inline", "batch_size": 3, "blocks_per_group": 3, "keep": "all"},
            },
            folder / f"runs-{family}",
        )
        for family in FAMILIES
    }


def kept_units(pruned: Pruned, shot: int = -1) -> dict[SubLayerKind, list[int]]:
    """Live units of every block, counted in the weights themselves."""
    model, state = pruned.session.model, pruned.shots[shot].state
    counts: dict[SubLayerKind, list[int]] = {kind: [] for kind in SubLayerKind}
    linears = pruned.linears(state)
    for block in range(model.n_blocks):
        for sub in block_sub_layers(model, block):
            columns = linears[block, sub.output].live_columns
            counts[sub.kind].append(int(sub.live_units(columns).sum()))
    return counts


@pytest.mark.parametrize("widths", ["uniform", "free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_go_whole(runs: dict[str, Runs], family: str, widths: str) -> None:
    """What makes a removed unit and what reads it are both gone, and nothing else is."""
    pruned = runs[family].prune(structure="units", widths=widths, multiple=8, sparsity=0.3, shots=2)
    model, (_, shot) = pruned.session.model, pruned.shots
    linears, gone = pruned.linears(shot.state), 0
    couplings = model.couplings
    assert couplings is not None
    for block in range(model.n_blocks):
        mlp, attention = couplings[block].mlp, couplings[block].attention
        neurons = linears[block, mlp.column_linear].live_columns
        for name in mlp.row_linears:
            assert torch.equal(linears[block, name].live_rows, neurons)
        columns = linears[block, attention.output].live_columns
        for group in range(attention.n_kv_heads):
            alive = {bool(columns[c]) for c in attention.columns(group)}
            for name, rows in attention.rows(group).items():
                alive |= {bool(linears[block, name].live_rows[r]) for r in rows}
            assert len(alive) == 1, "a key/value group lives or goes as one"
        for linear in (linears[block, name] for name in (s.name for s in model.blocks[block])):
            assert not linear.weight[~linear.live_rows].any() and not linear.weight[:, ~linear.live_columns].any()
            assert linear.bias is None or not linear.bias[~linear.live_rows].any()
            gone += linear.n_weights - linear.n_live_weights
        fused = attention.layout is QkvLayout.FUSED_PER_HEAD
        assert linears[block, attention.query].live_columns.all() or fused, "the residual side stays"
    assert gone / model.n_weights == pytest.approx(shot.record["sparsity"])
    assert shot.record["sparsity"] >= 0.3
    assert shot.record["kept"] == {kind.value: kept for kind, kept in kept_units(pruned).items()}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_widths(runs: dict[str, Runs], family: str, heads: bool) -> None:
    settings: dict[str, Any] = {"structure": "units", "multiple": 8, "sparsity": 0.3, "shots": 2, "heads": heads}
    if heads and not HEADS_ARE_FREE.get(family, True):
        with pytest.raises(
            ParameterError, match=r"prune.heads: the stock configuration of .* ties the number of heads"
        ):
            runs[family].prune(**settings)
        return
    pruned = runs[family].prune(**settings)
    kept = kept_units(pruned)
    assert all(len(set(counts)) == 1 for counts in kept.values())
    assert kept[SubLayerKind.MLP][0] % 8 == 0
    if not heads:
        assert set(kept[SubLayerKind.ATTENTION]) == {block_sub_layers(pruned.session.model, 0)[0].n_units}


def test_free_widths_differ_and_cost_less(runs: dict[str, Runs]) -> None:
    settings: dict[str, Any] = {"structure": "units", "multiple": 4, "sparsity": 0.3, "shots": 1}
    free = runs["qwen3"].prune(**settings, widths="free")
    uniform = runs["qwen3"].prune(**settings)
    assert any(len(set(counts)) > 1 for counts in kept_units(free).values())
    assert free.shots[0].record["predicted_cost"] < uniform.shots[0].record["predicted_cost"]


def test_rows_are_free_and_columns_are_paid_for(runs: dict[str, Runs]) -> None:
    """Linears that make units keep their other weights as they were; those that read them are updated."""
    pruned = runs["llama"].prune(structure="units", widths="free", sparsity=0.2, shots=1)
    before, after = pruned.linears(pruned.session.dense), pruned.linears(pruned.shots[0].state)
    outputs = {sub.output for sub in block_sub_layers(pruned.session.model, 0)}
    changed = set()
    for (block, name), linear in after.items():
        dense = before[block, name].weight * linear.live_rows[:, None] * linear.live_columns
        if not torch.equal(linear.weight, dense):
            changed.add(name)
    assert changed == outputs
    facts = pruned.references["shot-01/block-00/update"].attributes["linears"]
    assert all(facts[name]["predicted_cost"] == 0.0 for name in facts if name not in outputs)


def test_what_was_predicted_is_what_the_update_costs(runs: dict[str, Runs]) -> None:
    """Costs along the order of elimination add up to what the joint update of each linear costs."""
    pruned = runs["mistral"].prune(structure="units", widths="free", sparsity=0.3, shots=1)
    record = pruned.shots[0].record
    mask = pruned.references["shot-01/mask"].attributes
    assert record["predicted_cost"] == pytest.approx(mask["predicted_cost"], rel=1e-3)


def test_only_output_linears_are_measured_for_costs(runs: dict[str, Runs]) -> None:
    pruned = runs["opt"].prune(structure="units", widths="free", sparsity=0.2, shots=1)
    costs = pruned.references["shot-01/block-01/costs"]
    assert set(costs.attributes["linears"]) == {"self_attn.out_proj", "fc2"}
    arrays = read_arrays(pruned.session.context, costs.key)
    assert sorted(arrays["mlp/order"].tolist()) == list(range(64))
    assert (arrays["mlp/costs"] >= 0).all() and np.isfinite(arrays["mlp/costs"]).all()


def test_statistics_are_of_output_linears_alone(runs: dict[str, Runs]) -> None:
    """And the same to the bit as when all linears are measured."""
    units = runs["llama-gqa-tied"].prune(structure="units", widths="free", sparsity=0.2, shots=1)
    everything = runs["llama-gqa-tied"].prune(sparsity=0.2, shots=1)
    context, outputs = units.session.context, {"self_attn.o_proj", "mlp.down_proj"}
    for kind in ("input-factors", "output-factors"):
        label = f"shot-01/block-01/{kind}"
        few, many = (read_arrays(context, run.references[label].key) for run in (units, everything))
        assert {name.split("/")[0] for name in few} == outputs
        assert len(many) > len(few)
        assert all(np.array_equal(values, many[name]) for name, values in few.items())


def test_costs_serve_every_target(runs: dict[str, Runs]) -> None:
    """Another sparsity, other widths or another multiple take only masks and updates."""
    run = runs["qwen2"]
    run.prune(structure="units", widths="free", sparsity=0.2, shots=1)
    for other in ({"sparsity": 0.4, "widths": "free"}, {"sparsity": 0.3, "multiple": 8}):
        kinds = run.prune(structure="units", shots=1, **other).kinds()
        assert kinds["mask"] == 1
        assert not kinds["costs"] and not kinds["input-factors"] and not kinds["curvature"]


def test_a_sub_layer_can_go_whole(runs: dict[str, Runs], tmp_path: Path) -> None:
    """With nine tenths to remove, blocks lose their attention or their MLP, and the export still loads back."""
    run = runs["llama-gqa-tied"]
    session = run.session({"structure": "units", "widths": "free", "sparsity": 0.9, "shots": 1})
    results = run_all(session)
    kept = results["shots"][-1]["kept"]
    assert 0 in kept["mlp"] + kept["attention"]
    assert results["export"]["layout"] == "compact"
    assert results["pruned"]["sparsity"] >= 0.9
    again = Runs({**run.params, "model": {"source": str(session.workspace.export)}}, tmp_path)
    with pytest.raises(InputError, match=r"has no linears any more in|units: blocks of .* have no attention or no MLP"):
        again.session({"structure": "units", "sparsity": 0.2})


def test_a_model_without_linears_is_evaluated_but_not_pruned_again(runs: dict[str, Runs], tmp_path: Path) -> None:
    """Parameters of `prune`, which no other model than that of the run has to fit, are not looked at."""
    run = runs["opt"]
    session = run.session({"structure": "units", "widths": "free", "sparsity": 0.999, "shots": 1})
    export = run_all(session)["export"]
    project = Project(tmp_path / "project", {**run.params, "prune": {"structure": "units", "parameters": 30_000}})
    done = project.surgeon("evaluate", str(session.workspace.export), "--json", "--quiet").ok()
    assert json.loads(done.stdout)["parameters"] == export["parameters"] < 30_000
    assert done.stderr == ""
    for structure in ("units", "weights"):
        settings = [f"model.source={session.workspace.export}", f"prune.structure={structure}", "prune.parameters=null"]
        refused = project.surgeon("run", "--quiet", *(word for s in settings for word in ("-S", s)))
        assert refused.status == 2
        assert "has no linears any more in 3 of its blocks" in refused.stderr


@pytest.mark.parametrize("target", [{"parameters": 40_000}, {"size": 150_000}], ids=str)
def test_targets_people_think_in(runs: dict[str, Runs], target: dict[str, int]) -> None:
    """The exported model has at most that many parameters or bytes, and little less."""
    run = runs["llama"]
    session = run.session({"structure": "units", "widths": "free", "multiple": 1, "shots": 2, **target})
    export = run_all(session)["export"]
    (most,) = target.values()
    if "parameters" in target:
        found = export["parameters"]
        unit = 3 * 32
    else:
        found = sum(f.stat().st_size for f in session.workspace.export.glob("*.safetensors"))
        unit = 4 * 4 * 32 * 8
    assert most - unit < found <= most


def test_speedup_is_measured_for(runs: dict[str, Runs]) -> None:
    """The table of times is measured once; the widths chosen make the predicted pass that much faster."""
    run = runs["llama"]
    settings: dict[str, Any] = {"structure": "units", "widths": "free", "speedup": 1.2, "shots": 1}
    pruned = run.prune(**settings)
    usage = pruned.session.goal.usage
    assert usage.resource is Resource.SECONDS
    kept = kept_units(pruned)
    after = sum(
        usage.of(sub)[kept[sub.kind][block]]
        for block in range(pruned.session.model.n_blocks)
        for sub in block_sub_layers(pruned.session.model, block)
    )
    budget = (1 - pruned.session.goal.fraction) * dense_usage(pruned.session.model, usage)
    assert after <= budget * (1 + 1e-9)
    again = run.prune(**settings)
    assert not again.ran, "the same times give the same model"


def test_the_default_run_ends_with_a_smaller_stock_model(runs: dict[str, Runs]) -> None:
    run = runs["mistral"]
    session = run.session({"structure": "units", "sparsity": 0.25, "shots": 1, "multiple": 8, "heads": True})
    results = run_all(session)
    dense_config = json.loads((Path(session.checkpoint.path) / "config.json").read_text())
    config = json.loads((session.workspace.export / "config.json").read_text())
    assert results["export"]["layout"] == "stock"
    assert config["model_type"] == "mistral"
    smaller = ("intermediate_size", "num_key_value_heads", "num_attention_heads")
    assert any(config[name] < dense_config[name] for name in smaller)
    model = AutoModelForCausalLM.from_pretrained(session.workspace.export)
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == results["export"]["parameters"] < session.model.n_parameters


class TestBadInput:
    def test_unknown_couplings(self, runs: dict[str, Runs], tmp_path: Path) -> None:
        sections = {**runs["llama"].params, "model": {"source": str(make_falcon("falcon", tmp_path / "falcon"))}}
        falcon = Runs(sections, tmp_path)
        message = r"units: what belongs together in .* is not known .*OPT, Llama.*prune.structure=rows-and-columns"
        with pytest.raises(ParameterError, match=message):
            falcon.session({"structure": "units", "sparsity": 0.2})
        assert falcon.session({"sparsity": 0.2})

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ({"parameters": 10_000_000}, r"parameters: 10,000,000 is not below what the dense model has: [\d,]+"),
            ({"parameters": 1_000}, r"parameters: 1,000 is out of reach: without any unit .* still has [\d,]+"),
            ({"size": "1GB"}, r"size: 1,000,000,000 bytes is not below"),
            ({"size": "1KB"}, r"size: 1,000 bytes is out of reach"),
        ],
    )
    def test_targets_out_of_reach(self, runs: dict[str, Runs], target: dict[str, Any], message: str) -> None:
        with pytest.raises(ParameterError, match=message):
            runs["llama"].session({"structure": "units", **target})

    def test_speedup_out_of_reach(self, runs: dict[str, Runs]) -> None:
        with pytest.raises(ParameterError, match=r"speedup: 1000 is out of reach: .* times as fast here"):
            runs["llama"].prune(structure="units", speedup=1000.0, shots=1)

    @pytest.mark.parametrize("settings", [{"sparsity": 0.9, "multiple": 8}, {"sparsity": 0.2}], ids=str)
    def test_widths_that_no_target_reaches(self, runs: dict[str, Runs], settings: dict[str, Any]) -> None:
        """Equal widths keep all heads unless told otherwise, and multiples of 64 are the whole MLP here."""
        with pytest.raises(
            ParameterError, match=r"prune.sparsity: 0\..: the target leaves .* widths: uniform may keep"
        ):
            runs["opt"].session({"structure": "units", **settings})


def test_usage_counts_biases_only_among_parameters(runs: dict[str, Runs]) -> None:
    model = runs["opt"].session({"structure": "units", "sparsity": 0.2, "multiple": 8}).model
    attention, mlp = block_sub_layers(model, 0)
    assert (attention.n_units, mlp.n_units) == (4, 64)
    assert mlp.weights_per_unit == 2 * 32 and mlp.parameters_per_unit == 2 * 32 + 1
    assert attention.weights_per_unit == 4 * 8 * 32 and attention.parameters_per_unit == 4 * 8 * 32 + 3 * 8
    assert dense_usage(model, WEIGHTS) == model.n_weights
    assert dense_usage(model, Usage(Resource.PARAMETERS)) == model.n_weights + 3 * (64 + 3 * 32)
