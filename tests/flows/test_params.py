from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.params import CalibrateParams, Params, load_params
from flows.params_prune import PruneParams
from surgeon.choices import Cost, Dtype, SequenceOrder
from surgeon.errors import InputError, ParameterError
from surgeon.pruning.granularity import NMPattern
from surgeon.recipe import Damping
from surgeon.text import TextSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return write_file


def leaves(value: Any, name: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {name}
    return {leaf for key, below in value.items() for leaf in leaves(below, f"{name}.{key}")}


class TestFile:
    def test_project_file_holds_all_defaults(self) -> None:
        import yaml

        assert load_params(ROOT / "params.yaml") == Params()
        assert leaves(yaml.safe_load((ROOT / "params.yaml").read_text())) == leaves(Params().model_dump(mode="json"))

    @pytest.mark.parametrize("text", ["", "# only a comment\n", "run:\nprune:\n", "run: {}\n"])
    def test_left_out_is_default(self, write: Any, text: str) -> None:
        assert load_params(write(text)) == load_params(None) == Params()

    def test_values(self, write: Any) -> None:
        params = load_params(
            write(
                "seed: 7\nmodel: {dtype: bfloat16}\ncalibrate: {order: random-offsets}\n"
                "evaluate: {windows: null}\nprune: {structure: rows, cost: obd, damping: {gradients: 0}}\n"
            )
        )
        assert params.seed == 7
        assert params.model.dtype is Dtype.BFLOAT16
        assert params.calibrate.order is SequenceOrder.RANDOM_OFFSETS
        assert params.evaluate.windows is None
        assert params.prune.cost is Cost.OBD
        assert params.prune.recipe(7).damping == Damping(0.01, 0)

    @pytest.mark.parametrize("number", ["0.5", "5e-1", "'0.5'"])
    def test_one_number_sets_both_dampings(self, write: Any, number: str) -> None:
        damping = load_params(write(f"prune: {{damping: {number}}}")).prune.damping
        assert (damping.activations, damping.gradients) == (0.5, 0.5)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ParameterError, match=r"There is no parameter file .*missing\.yaml"):
            load_params(tmp_path / "missing.yaml")

    def test_syntax_error_names_the_line(self, write: Any) -> None:
        with pytest.raises(ParameterError, match=r"params\.yaml, line 2, column 8: not valid YAML"):
            load_params(write("seed: 1\nprune: }\n"))

    def test_key_given_twice(self, write: Any) -> None:
        with pytest.raises(ParameterError, match="line 3, column 3: not valid YAML: key 'shots' is given twice"):
            load_params(write("prune:\n  shots: 1\n  shots: 2\n"))

    def test_key_that_is_a_list(self, write: Any) -> None:
        with pytest.raises(ParameterError, match="not valid YAML: found unhashable key"):
            load_params(write("[1, 2]: 3\n"))

    @pytest.mark.parametrize("text", ["- 1\n", "prune\n", "3\n"])
    def test_not_sections(self, write: Any, text: str) -> None:
        with pytest.raises(ParameterError, match="must hold sections such as 'prune:'"):
            load_params(write(text))

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "params.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ParameterError, match="cannot be read"):
            load_params(path)


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("prnue: {shots: 2}", "params.yaml: prnue: unknown section. Did you mean 'prune'"),
            ("prune: {sparsty: 0.3}", "prune.sparsty: unknown key. Did you mean 'sparsity'"),
            ("prune: {adapters: {epoch: 3}}", "prune.adapters.epoch: unknown key. Did you mean 'epochs'"),
            ("prune: {damping: {gradient: 0.3}}", "prune.damping.gradient: unknown key. Did you mean 'gradients'"),
            ("calibrate: {text: {splits: x}}", "calibrate.text.splits: unknown key. Did you mean 'split'"),
            ("run: {qqqq: 1}", "run.qqqq: unknown key. Allowed: engine, runner, workers, cluster"),
            ("3: {x: 1}", "Keys should be strings|unknown section"),
        ],
    )
    def test_in_file(self, write: Any, text: str, message: str) -> None:
        with pytest.raises(ParameterError, match=message):
            load_params(write(text))

    def test_in_overrides(self) -> None:
        with pytest.raises(ParameterError, match=r"-S prun\.shots=2: prun: unknown section\. Did you mean 'prune'"):
            load_params(None, ["prun.shots=2"])
        with pytest.raises(ParameterError, match=r"-S prune\.shot=2: prune\.shot: unknown key\. Did you mean 'shots'"):
            load_params(None, ["prune.shot=2"])


class TestValues:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("prune.sparsity=0", "prune.sparsity: got 0; must be greater than 0"),
            ("prune.sparsity=1", "prune.sparsity: got 1; must be less than 1"),
            ("prune.sparsity=.nan", "prune.sparsity: got nan; must be"),
            ("prune.method=wnada", "Did you mean 'wanda'"),
            (
                "prune.structure=row",
                "got 'row'; allowed: units, rows, .*weights, blocks, or N:M such as 2:4. Did you mean 'rows'",
            ),
            ("prune.structure=4:4", "got '4:4'; N of every M weights of a group go, so N must be at least 1 and below"),
            (
                "prune.structure=124",
                "got 124; must be text: units, rows, columns, rows-and-columns, weights, blocks or N:M",
            ),
            ("prune.structure=null", "got null; must be text"),
            ("prune.rank=1", "must be greater than or equal to 2"),
            ("prune.power_iterations=0", "must be greater than or equal to 1"),
            ("prune.draws=0", "must be greater than or equal to 1"),
            ("prune.max_iterations=true", "must be a number"),
            ("prune.max_correlate=0", "must be greater than or equal to 1"),
            ("prune.tolerance=0", "must be greater than 0"),
            ("prune.newton_step=1.5", "must be less than or equal to 1"),
            ("prune.correction=adapter", "Did you mean 'adapters'"),
            ("prune.allocation=local", "allowed: global, per-layer, per-row"),
            ("prune.adapters.rank=0", "must be greater than or equal to 1"),
            ("prune.adapters.learning_rate=0", "must be greater than 0"),
            ("prune.adapters.fraction=2", "must be less than or equal to 1"),
            ("prune.adapters=3", "it is a section with the keys rank, learning_rate, fraction, epochs"),
            ("prune.shots=0", "must be greater than or equal to 1"),
            ("prune.shots=2.5", "must be a valid integer"),
            ("prune.shots=true", "prune.shots: got true; must be a number"),
            ("seed=-1", "seed: got -1; must be greater than or equal to 0"),
            ("seed=false", "seed: got false; must be a number"),
            ("prune.cost=osb", "prune.cost: got 'osb'; allowed: obs, obd. Did you mean 'obs'"),
            ("prune.widths=fre", "Did you mean 'free'"),
            ("prune.multiple=0", "must be greater than or equal to 1"),
            ("prune.parameters=100X", "got '100X'; must be a number such as 100M, 1.2B or 90000000"),
            ("prune.parameters=0", "must be greater than 0"),
            ("prune.size=big", "prune.size: got 'big'"),
            ("prune.speedup=1", "must be greater than 1"),
            ("model.dtype=float64", "allowed: float32, bfloat16, float16. Did you mean 'float"),
            ("model.trust_remote_code=1", "got 1; allowed: true, false"),
            ("model.revision=1234567", "model.revision: got 1234567; must be text, so put it in quotes"),
            ("model.source=''", "model.source: got an empty text"),
            ("prune.damping=-1", "prune.damping.activations: got -1; must be greater than or equal to 0"),
            ("prune.damping=true", "prune.damping: got true; it is a section with the keys activations, gradients"),
            ("prune.damping.gradients=.inf", "must be a finite number"),
            ("calibrate.text=a.txt", "it is a section with the keys source, split, column, revision"),
            ("calibrate.length=1", "must be greater than or equal to 2"),
            ("evaluate.windows=0", "must be greater than or equal to 1"),
            ("run.engine=prefct", "Did you mean 'prefect'"),
            ("run.device=gpu", "allowed: auto, cpu, cuda"),
            ("run.keep=first", "allowed: last, all, none"),
            ("run.memory_gib=0", "must be greater than 0"),
            ("run.batch_size=0", "must be greater than or equal to 1"),
            ("report.new_tokens=0", "must be greater than or equal to 1"),
        ],
    )
    def test_out_of_range(self, override: str, message: str) -> None:
        with pytest.raises(ParameterError, match=message) as caught:
            load_params(None, [override])
        assert f"-S {override}: {override.partition('=')[0]}" in str(caught.value)

    def test_several_problems_together(self, write: Any) -> None:
        with pytest.raises(ParameterError) as caught:
            load_params(write("prune: {shots: 0, sparsty: 1}\nseed: x\n"), ["run.keep=first", "nothing"])
        lines = str(caught.value).splitlines()
        assert lines[0] == "5 problems with the parameters:"
        for start in ("-S nothing", "-S run.keep=first: run.keep"):
            assert sum(line.startswith(f"  {start}") for line in lines) == 1
        for name in ("prune.shots", "prune.sparsty", "seed"):
            assert sum(f"params.yaml: {name}: " in line for line in lines) == 1

    def test_is_an_input_error(self) -> None:
        with pytest.raises(InputError):
            load_params(None, ["prune.shots=0"])


class TestOverrides:
    def test_win_over_the_file(self, write: Any) -> None:
        path = write("prune: {shots: 5, sparsity: 0.4}\n")
        params = load_params(path, ["prune.shots=2", "evaluate.windows=null", "prune.shots=3", "report.prompt=a=b"])
        assert (params.prune.shots, params.prune.sparsity, params.evaluate.windows) == (3, 0.4, None)
        assert params.report.prompt == "a=b"

    def test_section_that_is_null_in_the_file(self, write: Any) -> None:
        assert load_params(write("prune:\n"), ["prune.shots=2"]).prune.shots == 2

    def test_section_as_a_whole(self) -> None:
        assert load_params(None, ["prune.structure=rows", "prune.damping={gradients: 1}"]).prune.damping.gradients == 1

    def test_scientific_notation(self) -> None:
        assert (
            load_params(None, ["prune.structure=rows", "prune.damping.gradients=1e-3"]).prune.damping.gradients == 0.001
        )

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("prune.shots", "-S prune.shots: has no '='; write section.key=value, such as -S prune.sparsity=0.3"),
            ("prune..shots=1", "the key 'prune..shots' has an empty part"),
            ("=1", "has an empty part"),
            ("prune.shots=", "has no value; write null"),
            ("report.prompt=[a", "the value is not valid YAML"),
            ("seed.x=1", "seed is 3, which has no keys; set seed itself"),
        ],
    )
    def test_malformed(self, write: Any, override: str, message: str) -> None:
        with pytest.raises(ParameterError, match=message.replace("[", r"\[")):
            load_params(write("seed: 3\n"), [override])


class TestCombinations:
    def test_column_of_a_text_without_columns(self) -> None:
        with pytest.raises(
            ParameterError,
            match=r"-S calibrate\.text\.column=body, .*: calibrate\.text: column 'body' has no effect on 'python-docs'",
        ):
            load_params(None, ["calibrate.text.column=body", "calibrate.text.split=calibration"])

    def test_source_changed_under_a_split_of_another(self) -> None:
        with pytest.raises(ParameterError, match=r"text: split 'held-out' of a local text: .* no split \(null\)"):
            load_params(ROOT / "params.yaml", ["evaluate.text.source=a.txt"])
        params = load_params(ROOT / "params.yaml", ["evaluate.text.source=a.txt", "evaluate.text.split=null"])
        assert params.evaluate.text.spec() == TextSpec("a.txt")

    def test_source_alone_has_no_split(self) -> None:
        assert load_params(None, ["evaluate.text.source=a.txt"]).evaluate.text.split is None

    def test_unreadable_kind_of_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_text("x")
        with pytest.raises(ParameterError, match=r"calibrate\.text: .* unknown kind '\.pdf'"):
            load_params(None, [f"calibrate.text.source={tmp_path / 'a.pdf'}"])

    def test_scoring_on_the_calibration_text(self) -> None:
        with pytest.raises(ParameterError, match="must not be scored on the text it was pruned with"):
            load_params(None, ["evaluate.text.split=calibration"])

    def test_fresh_calibration_of_one_shot(self) -> None:
        assert load_params(None, ["prune.fresh_calibration=true"]).prune.fresh_calibration
        with pytest.raises(ParameterError, match="prune: fresh_calibration: true has no effect with shots: 1"):
            load_params(None, ["prune.fresh_calibration=true", "prune.shots=1"])

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["method=wanda"], "prune: structure: got units, but method wanda removes single weights"),
            (["structure=2:4", "sparsity=0.6"], "sparsity: got 0.6, but structure: 2:4 removes at most 0.5"),
            (["adapters.rank=4"], "adapters has no effect with correction: none"),
            (["adapters.rank=4", "correction=newton"], "adapters has no effect with correction: newton"),
            (["method=k-obd", "damping=0.1"], "damping.activations: 0.1 has no effect with cost: obd and update: none"),
            (["rank=3"], "rank: 3 has no effect with curvature: kfac"),
            (["sparsity=0.3", "size=200MB"], "sparsity and size are given, but a model has one target"),
            (["structure=rows", "parameters=1M"], "parameters has no effect with structure: rows"),
            (["structure=2:4", "widths=free"], "widths: free has no effect with structure: 2:4"),
        ],
    )
    def test_of_pruning(self, overrides: list[str], message: str) -> None:
        given = [f"prune.{override}" for override in overrides]
        with pytest.raises(ParameterError, match=message) as caught:
            load_params(None, given)
        origin = ", ".join(f"-S {override}" for override in given)
        assert str(caught.value).startswith(f"{origin}: prune: ")

    def test_of_pruning_in_a_file(self, write: Any) -> None:
        with pytest.raises(ParameterError, match=r"params\.yaml: prune: rank: 3 has no effect with curvature: kfac"):
            load_params(write("prune: {rank: 3}\n"))

    def test_memory_and_blocks(self) -> None:
        with pytest.raises(ParameterError, match="run: memory_gib has no effect when blocks_per_group is given"):
            load_params(None, ["run.memory_gib=2", "run.blocks_per_group=1"])

    def test_update_with_obd_is_allowed(self) -> None:
        assert load_params(None, ["prune.cost=obd", "prune.update=exact"]).prune.recipe(0).cost is Cost.OBD


class TestStructure:
    @pytest.mark.parametrize("text", ["2:4", "'2:4'", '"2:4"'])
    def test_pattern_is_not_a_number_in_base_60(self, write: Any, text: str) -> None:
        expected = NMPattern(2, 4)
        assert load_params(write(f"prune:\n  structure: {text}\n")).prune.structure == expected
        assert load_params(write(f"prune: {{structure: {text}, shots: 1}}\n")).prune.structure == expected
        assert load_params(None, [f"prune.structure={text}"]).prune.structure == expected
        assert load_params(None, [f"prune={{structure: {text}}}"]).prune.structure == expected

    def test_other_numbers_are_as_before(self, write: Any) -> None:
        params = load_params(write("seed: 0x10\nprune: {sparsity: .25, shots: 1_0}\n"))
        assert (params.seed, params.prune.sparsity, params.prune.shots) == (16, 0.25, 10)
        assert load_params(None, ["report.prompt=12:30:45"]).report.prompt == "12:30:45"

    @pytest.mark.parametrize(
        ("structure", "sparsity"),
        [
            ("units", 0.2),
            ("rows", 0.2),
            ("columns", 0.2),
            ("rows-and-columns", 0.2),
            ("weights", 0.5),
            ("2:4", 0.5),
            ("1:4", 0.25),
        ],
    )
    def test_default_sparsity(self, structure: str, sparsity: float) -> None:
        assert load_params(None, [f"prune.structure={structure}"]).prune.target_sparsity == sparsity

    @pytest.mark.parametrize(
        ("given", "name", "value"),
        [
            ("parameters=100M", "parameters", 10**8),
            ("parameters=1.25b", "parameters", 1_250_000_000),
            ("parameters=90000", "parameters", 90_000),
            ("size=200MB", "size", 200_000_000),
            ("size=1GiB", "size", 2**30),
            ("speedup=1.5", "speedup", 1.5),
        ],
    )
    def test_other_targets(self, given: str, name: str, value: float) -> None:
        prune = load_params(None, [f"prune.{given}"]).prune
        assert getattr(prune, name) == value
        assert prune.resolved()[name] == value and prune.resolved()["sparsity"] is None

    def test_given_sparsity(self) -> None:
        given = ["prune.structure=2:4", "prune.sparsity=0.5"]
        assert load_params(None, given).prune.target_sparsity == 0.5


class TestResolved:
    def test_names_are_those_of_the_parameters(self) -> None:
        prune = load_params(None, ["prune.correction=adapters"]).prune
        of_other_methods = {"layerchop": None, "bonsai": None}
        assert leaves(prune.resolved()) == leaves(prune.model_dump(mode="json") | of_other_methods)

    def test_default(self) -> None:
        resolved = load_params(None).prune.resolved()
        given = {name: value for name, value in resolved.items() if value is not None}
        assert given == {
            "method": "llm-surgeon",
            "sparsity": 0.2,
            "shots": 3,
            "structure": "units",
            "widths": "uniform",
            "multiple": 64,
            "heads": False,
            "rescorings": 32,
            "curvature": "kfac",
            "targets": "empirical",
            "cost": "obs",
            "update": "exact",
            "damping": {"activations": 0.1, "gradients": None},
            "correction": "none",
            "fresh_calibration": False,
        }

    @pytest.mark.parametrize(
        "overrides",
        [
            ["structure=2:4", "method=sparsegpt"],
            ["structure=weights", "curvature=kronecker-sum", "targets=sampled", "damping=0", "correction=newton"],
            ["structure=weights", "update=chunked"],
            ["structure=rows", "method=magnitude", "correction=adapters", "adapters.rank=4"],
            [
                "widths=free",
                "parameters=1.5M",
                "ranking=cost",
                "allocation=per-layer",
                "multiple=8",
                "heads=false",
                "rescorings=0",
            ],
            ["size=200MB", "damping=0.1"],
            ["speedup=1.5"],
        ],
    )
    def test_can_be_given_again(self, overrides: list[str]) -> None:
        """What is written down with a result makes the same recipe."""
        prune = load_params(None, [f"prune.{override}" for override in overrides]).prune
        resolved = {name: value for name, value in prune.resolved().items() if value is not None}
        again = PruneParams.model_validate(resolved)
        assert (again.recipe(3), again.target_sparsity) == (prune.recipe(3), prune.target_sparsity)

    def test_seed_is_that_of_draws(self) -> None:
        assert load_params(None, ["prune.targets=sampled"]).prune.recipe(5).curvature.seed == 5
        assert load_params(None).prune.recipe(5).curvature.seed == 0


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CalibrateParams().length = 3
