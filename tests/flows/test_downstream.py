"""`surgeon evaluate --tasks`: the dense and the exported model side by side, from the store when it is asked again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon
from flows.downstream import score_model, score_pair, wanted_scores
from flows.params import Params
from flows.session import Session
from flows.workspace import Workspace
from surgeon.downstream import paired_error
from surgeon.errors import TaskError
from surgeon.store import Store
from tests.flows.project import ROOT, Project
from tests.flows.sessions import Recorder
from tests.flows.test_bad_input import is_one_message

TASKS = ROOT / "tests" / "local_tasks"
INCLUDE = ("--include", str(TASKS))


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def scored(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Any]:
    """A copy of the finished project after both models were scored, and what came out."""
    project = finished.copy(tmp_path_factory.mktemp("scored") / "project")
    done = project.surgeon("evaluate", "--tasks", "local_choice,local_text", *INCLUDE, "--json").ok()
    assert done.stderr == ""
    return project, json.loads(done.stdout)


def right_answers(model: Any, directory: Path) -> list[bool]:
    """For each question, whether the right answer is the most likely: one forward pass for each answer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for line in (TASKS / "questions.jsonl").read_text().splitlines():
        doc = json.loads(line)
        context = f"Question: {doc['q']}\nAnswer:"
        n_context = len(tokenizer(context)["input_ids"])
        scores = []
        for choice in doc["choices"]:
            ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids).logits[0].double(), -1)
            scores.append(sum(float(log_p[i - 1, ids[0, i]]) for i in range(n_context, ids.shape[1])))
        found.append(int(np.argmax(scores)) == doc["label"])
    return found


def test_both_models_side_by_side(scored: tuple[Project, Any], inputs: Path) -> None:
    project, found = scored
    export = project.data / "export"
    dense = np.array(right_answers(AutoModelForCausalLM.from_pretrained(inputs / "model"), inputs / "model"), float)
    pruned = np.array(right_answers(surgeon.load(export), inputs / "model"), float)
    assert [(row["task"], row["metric"]) for row in found["rows"]] == [
        *(("local_choice", "acc"), ("local_choice", "acc_norm")),
        *(("local_text", "word_perplexity"), ("local_text", "bits_per_byte")),
    ]
    accuracy, _, perplexity, _ = found["rows"]
    assert accuracy["dense"] == pytest.approx(dense.mean())
    assert accuracy["pruned"] == pytest.approx(pruned.mean())
    assert accuracy["difference"] == pytest.approx(pruned.mean() - dense.mean())
    assert accuracy["stderr"] == pytest.approx(paired_error(dense, pruned))
    assert accuracy["dense_stderr"] == pytest.approx(dense.std(ddof=1) / 3)
    assert perplexity["dense"] != perplexity["pruned"]
    assert perplexity["stderr"] is None
    assert found["models"]["pruned"]["source"] == str(export)
    assert project.read("metrics/tasks.json") == found


def test_the_table(scored: tuple[Project, Any]) -> None:
    project, found = scored
    before = project.contents()
    done = project.surgeon("evaluate", "--tasks", "local_choice,local_text", *INCLUDE).ok()
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    accuracy = found["rows"][0]
    numbers = [format(accuracy["dense"], ",.4f"), format(accuracy["pruned"], ",.4f")]
    more = [format(accuracy["difference"], "+,.4f"), format(accuracy["stderr"], ",.4f"), "9", "0"]
    assert ["local_choice", "acc", "↑", *numbers, *more] in lines
    assert any(line[:3] == ["local_text", "word_perplexity", "↓"] and "–" in line for line in lines)  # noqa: RUF001
    assert "stderr is that of the difference" in done.stdout
    assert project.contents() == before, "everything was there"


def test_one_model(scored: tuple[Project, Any]) -> None:
    project, found = scored
    before = project.contents()
    arguments = ("evaluate", "data/export", "--tasks", "local_choice", *INCLUDE)
    one = json.loads(project.surgeon(*arguments, "--json").ok().stdout)
    assert [row["model"] for row in one["rows"]] == [row["pruned"] for row in found["rows"][:2]]
    assert project.contents() == before, "the same weights, whatever they are called"
    table = project.surgeon(*arguments, "--limit", "4").ok().stdout
    assert "only the first 4 documents of each task: not comparable" in table


def open_session(project: Project, **sections: Any) -> tuple[Session, Recorder]:
    recorder = Recorder()
    return Session(Params.model_validate(project.params | sections), Workspace(project.root), recorder), recorder


def test_only_what_is_new_is_scored(scored: tuple[Project, Any], in_process: None, tmp_path: Path) -> None:
    project = scored[0].copy(tmp_path / "project")
    store = Store(project.data / "store")

    def keys() -> set[str]:
        return {reference.key for reference in store.entries() if reference.kind == "task-scores"}

    def new(names: str, include: Path = TASKS, limit: int | None = None, **sections: Any) -> int:
        session, recorder = open_session(project, **sections)
        before = keys()
        score_pair(session, wanted_scores(session, names, include, limit))
        n_new = len(keys() - before)
        assert recorder.ran == (["tasks"] if n_new else [])
        return n_new

    assert new("local_choice,local_text") == 0
    assert new("local_text") == 0
    assert new("local_text,local_answer") == 2
    assert new("local_choice", limit=3) == 2
    assert new("local_choice", seed=0, run=project.params["run"] | {"batch_size": 2}) == 2
    other = tmp_path / "tasks"
    other.mkdir()
    for file in TASKS.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert new("local_choice", other) == 0
    with (other / "questions.jsonl").open("a") as file:
        file.write('{"q": "A day has", "choices": ["hours", "weeks", "years"], "label": 0}\n')
    assert new("local_choice", other) == 2


def test_tasks_are_opened_before_any_model_is_loaded(scored: tuple[Project, Any], in_process: None) -> None:
    session, _ = open_session(scored[0])
    with pytest.raises(TaskError, match=r"the data of 'local_absent' cannot be had"):
        score_model(session, wanted_scores(session, "local_answer,local_absent", TASKS, shots=0))
    labels = scored[0].labels().values()
    assert "model/tasks/local_answer" not in labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "3"), "--limit has no effect without --tasks"),
        (("--shots", "1", "--include", "x"), "--include, --shots has no effect without --tasks"),
        (("--tasks", " , "), "names no task; give names separated by commas"),
        (("--tasks", "local_text,local_choice,local_text", *INCLUDE), "local_text is there twice; give each task once"),
        (("--tasks", "local_text", "--include", str(TASKS) + "s"), "is not a directory. Did you mean 'local_tasks'?"),
        (("--tasks", "local_text", "--include", str(ROOT / "surgeon")), r"holds no \.yaml file"),
        (("--tasks", "local_absent", *INCLUDE), "the data of 'local_absent' cannot be had"),
        (("--tasks", "local_txt", *INCLUDE), "'local_txt' is not one. Did you mean 'local_text'?"),
        (("--tasks", "local_answer", "--shots", "3", *INCLUDE), "so 3 shots have no effect"),
    ],
)
def test_bad_input(scored: tuple[Project, Any], arguments: tuple[str, ...], message: str) -> None:
    done = scored[0].surgeon("evaluate", *arguments)
    assert done.status == 2, done
    assert message.replace("\\", "") in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_exported_yet(params: dict[str, Any], tmp_path: Path) -> None:
    done = Project(tmp_path / "early", params).surgeon("evaluate", "--tasks", "local_text", *INCLUDE)
    assert done.status == 2
    is_one_message(done, "holds no export to measure: run `surgeon export` first .*`surgeon evaluate MODEL --tasks")


def test_other_parameters_than_those_of_the_export(scored: tuple[Project, Any]) -> None:
    done = scored[0].surgeon("evaluate", "--tasks", "local_text", *INCLUDE, "-S", "prune.sparsity=0.5")
    assert done.status == 2
    is_one_message(done, r"prune.sparsity 0\.3, now 0\.5.*run `surgeon prune` first")
