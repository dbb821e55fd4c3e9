"""Scores of lm-eval on a tiny model against log-likelihoods that are computed here, document by document."""

import json
import logging
import math
import random
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgeon.downstream import Harness, ScoringSettings, definitions, harness
from surgeon.downstream.scores import read_scores
from surgeon.errors import NonFiniteError, TaskError
from surgeon.models.quiet import quiet_transformers

TASKS = Path(__file__).parents[2] / "local_tasks"
SETTINGS = ScoringSettings(batch_size=2)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def local():
    return Harness(["local_choice", "local_text", "local_answer"], TASKS)


@pytest.fixture
def tiny(checkpoint_of, one_thread):
    path = checkpoint_of("llama").path
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.train(mode=False)
        return model, AutoTokenizer.from_pretrained(path)


def lines(name):
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def log_likelihood(tiny, context, continuation):
    """Sum of log-probabilities of a continuation's tokens, one forward pass without padding, float64."""
    model, tokenizer = tiny
    n_context = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    return float(sum(log_p[position - 1, ids[0, position]] for position in range(n_context, ids.shape[1])))


def choices_of(tiny, prefix=""):
    """For each question: log-likelihoods of its answers, their lengths in characters, and the right one."""
    for doc in lines("questions.jsonl"):
        context = f"{prefix}Question: {doc['q']}\nAnswer:"
        scores = [log_likelihood(tiny, context, f" {choice}") for choice in doc["choices"]]
        yield np.array(scores), np.array([len(choice) for choice in doc["choices"]]), doc["label"]


def test_multiple_choice_is_the_explicit_argmax(local, tiny):
    done = []
    found = local.score(local.open("local_choice"), *tiny, SETTINGS, lambda n, total: done.append((n, total)))
    expected = [(s.argmax() == label, (s / n).argmax() == label) for s, n, label in choices_of(tiny)]
    for index, metric in enumerate(("acc", "acc_norm")):
        right = np.array([row[index] for row in expected], dtype=float)
        score = found.scores[index]
        assert (score.task, score.metric, score.name, score.documents, score.shots) == (
            *("local_choice", metric, metric),
            *(9, 0),
        )
        assert score.value == pytest.approx(right.mean(), abs=1e-12)
        assert score.error == pytest.approx(right.std(ddof=1) / 3, abs=1e-12)
        assert score.higher_is_better is True
        np.testing.assert_array_equal(found.values[index], right)
    assert 0 < found.scores[0].value < 1
    assert len({tuple(values) for values in found.values.values()}) == 2, "both metrics alike would test only one"
    assert done[-1] == (27, 27)


def test_perplexity_of_texts_is_the_explicit_one(local, tiny):
    found = local.score(local.open("local_text"), *tiny, SETTINGS)
    texts = [doc["text"] for doc in lines("texts.jsonl")]
    model, tokenizer = tiny
    total = 0.0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        total += float(sum(log_p[i - 1, ids[i]] for i in range(1, len(ids))))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    by_metric = {score.metric: score for score in found.scores}
    assert by_metric["word_perplexity"].value == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert by_metric["bits_per_byte"].value == pytest.approx(-total / (n_bytes * math.log(2)), rel=1e-5)
    assert by_metric["word_perplexity"].higher_is_better is False
    assert found.values == {}, "they are no means over documents"


def test_generated_answers_are_those_of_greedy_decoding(local, tiny):
    model, tokenizer = tiny
    found = local.score(local.open("local_answer"), *tiny, SETTINGS)
    right = []
    for doc in lines("questions.jsonl"):
        ids = tokenizer(f"Question: {doc['q']}\nAnswer:", return_tensors="pt")["input_ids"]
        n_prompt = ids.shape[1]
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        text = tokenizer.decode(ids[0, n_prompt:], skip_special_tokens=True).split("\n")[0]
        right.append(text.removeprefix(" ") == doc["choices"][doc["label"]])
    (score,) = found.scores
    assert (score.metric, score.value) == ("exact_match", np.mean(right))


def test_an_answer_that_is_generated_counts(local, tiny, tmp_path):
    """The model's own greedy answer as the target: exact match is then 1, so the test above could fail."""
    model, tokenizer = tiny
    ids = tokenizer("Say it:", return_tensors="pt")["input_ids"]
    n_prompt = ids.shape[1]
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    answer = tokenizer.decode(ids[0, n_prompt:], skip_special_tokens=True)
    (tmp_path / "own.jsonl").write_text(json.dumps({"a": answer}) + "\n" + json.dumps({"a": answer + "x"}) + "\n")
    definition = (TASKS / "local_answer.yaml").read_text().replace("questions.jsonl", "own.jsonl")
    definition = definition.replace("Question: {{q}}\\nAnswer:", "Say it:").replace("{{choices[label]}}", "{{a}}")
    definition = definition.replace("local_answer", "own").replace("max_gen_toks: 8", "max_gen_toks: 4")
    definition = definition.replace('["\\n"]', '["</s>"]').replace('    regexes_to_ignore: ["^ "]\n', "")
    (tmp_path / "own.yaml").write_text(definition)
    own = Harness(["own"], tmp_path)
    assert own.score(own.open("own"), *tiny, SETTINGS).scores[0].value == 0.5


def test_limit_takes_the_first_documents(local, tiny):
    whole = local.score(local.open("local_choice"), *tiny, SETTINGS)
    part = local.score(local.open("local_choice"), *tiny, ScoringSettings(limit=4, batch_size=2))
    assert part.scores[0].documents == 4
    np.testing.assert_array_equal(part.values[0], whole.values[0][:4])


def test_shots_are_in_the_prompt_and_the_seed_draws_them(local, tiny):
    one = local.open("local_choice", shots=2)
    first, again, other = (
        local.score(one, *tiny, ScoringSettings(shots=2, batch_size=2, seed=seed)) for seed in (1, 1, 2)
    )
    assert first.scores == again.scores
    assert first.scores[0].shots == 2
    prompts = [instance.args[0] for instance in one.loaded["tasks"]["local_choice"].instances]
    assert all(prompt.count("Question:") == 3 for prompt in prompts)
    local.score(one, *tiny, ScoringSettings(shots=2, batch_size=2, seed=1))
    assert prompts != [instance.args[0] for instance in one.loaded["tasks"]["local_choice"].instances]
    assert other.scores[0].documents == 9


def test_nothing_outside_is_changed(local, tiny, capsys):
    import lm_eval.models.huggingface
    import tqdm

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    level = logging.getLogger("lm_eval").level
    local.score(local.open("local_choice"), *tiny, SETTINGS)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert lm_eval.models.huggingface.tqdm is tqdm.tqdm is tqdm.std.tqdm
    assert logging.getLogger("lm_eval").level == level
    assert not datasets.are_progress_bars_disabled()
    assert capsys.readouterr() == ("", "")


def test_groups_have_rows_of_their_own(tiny):
    both = Harness(["local_group"], TASKS)
    found = both.score(both.open("local_group"), *tiny, SETTINGS)
    by_name = {(score.task, score.metric): score for score in found.scores}
    assert by_name["local_group", "acc"].value == by_name["local_choice", "acc"].value
    assert ("local_answer", "exact_match") in by_name
    with pytest.raises(TaskError, match=r"'arc_esy' is not one\. Did you mean 'arc_easy'\?.*--include DIR adds"):
        both.require_known(["local_choice", "arc_esy"])
    with pytest.raises(TaskError, match=r"the data of 'arc_easy' cannot be had .*without HF_DATASETS_OFFLINE"):
        both.open("arc_easy")


def test_a_task_whose_data_is_not_there():
    absent = Harness(["local_absent"], TASKS)
    with pytest.raises(
        TaskError, match=r"'local_absent' cannot be had \(.*nothing-of-this-name.*over local files with"
    ):
        absent.open("local_absent")


def test_shots_without_effect_are_refused(local):
    with pytest.raises(
        TaskError, match=r"'local_answer' is defined without worked examples .* so 2 shots have no effe"
    ):
        local.open("local_answer", shots=2)
    local.open("local_answer", shots=0)


def test_more_shots_than_documents(local, tiny):
    with pytest.raises(TaskError, match="'local_choice' failed in lm-eval"):
        local.score(local.open("local_choice", shots=40), *tiny, ScoringSettings(shots=40, batch_size=2))


def test_a_definition_that_does_not_work(tmp_path):
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\noutput_type: guess\n")
    with pytest.raises(TaskError, match=r"'bad' cannot be (opened|had)"):
        Harness(["bad"], tmp_path).open("bad")


def test_logits_that_are_not_numbers(local, tiny):
    model, tokenizer = tiny
    model.lm_head.weight.data[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'local_choice': the model's logits are not all numbers\. Evaluate it"):
        local.score(local.open("local_choice"), model, tokenizer, SETTINGS)


def test_a_metric_that_is_not_finite():
    found = {"results": {"t": {"ppl,none": math.inf, "sample_len": 1}}, "samples": {}, "higher_is_better": {}}
    with pytest.raises(NonFiniteError, match="dense: ppl of t is inf: the model gives a document no probability"):
        read_scores({**found, "n-shot": {}}, {}, "dense")


def test_too_little_memory(local, tiny, monkeypatch):
    def fail(*_more, **_options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(tiny[0]), "forward", fail)
    with pytest.raises(TaskError, match=r"not enough memory on cpu for batches of 2; lower run\.batch_size"):
        local.score(local.open("local_choice"), *tiny, SETTINGS)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("shots", -1), ("batch_size", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(TaskError, match=f"{name}: {value} is too small"):
        ScoringSettings(**{name: value})


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setattr(definitions, "PACKAGE", "no_such_package")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        TaskError, match=r'lm-eval, which is not installed\. Install it with: pip install "surgeon\[tas'
    ):
        harness.Harness(["local_choice"], TASKS)
