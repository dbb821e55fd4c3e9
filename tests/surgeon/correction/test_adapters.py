"""Training adapters on tiny pruned models: what gets better, what stays exactly as it was, what is refused."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from surgeon.correction.adapters import AdapterSettings, choose_sequences, train_adapters
from surgeon.correction.masked import masked_adapters
from surgeon.errors import NonFiniteError, ParameterError
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.evaluation import evaluate_perplexity
from surgeon.passes.loss import next_token_loss
from tests.surgeon.correction.pruned import pruned_model

FAMILIES = ("llama-gqa-tied", "opt", "gpt_neox")
FAST = AdapterSettings(rank=4, learning_rate=1e-2, epochs=3, batch_size=2, seed=3)
HARMFUL = AdapterSettings(rank=4, learning_rate=30.0, batch_size=6, seed=3)
TOKENS = np.random.default_rng(5).integers(4, 260, (6, 12))
MASKS = pytest.mark.parametrize("single_weights", [False, True], ids=["structures", "single weights"])
PAIR = ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.o_proj")


def with_weights(checkpoint, tensors, dtype=torch.float32):
    """The model that has these tensors in place of its own."""

    def overrides(index):
        return {name: tensor for name, tensor in tensors.items() if f".{index}." in name}

    return BlockwiseModel(checkpoint, overrides=overrides, dtype=dtype)


def loss_of(model, tokens=TOKENS):
    return evaluate_perplexity(model, tokens, [range(model.n_blocks)], FAST.batch_size).loss


def likely_tokens(model):
    """What the model itself goes on with: it has learnt these already, and a long step can only harm."""
    tokens = torch.from_numpy(TOKENS[:, :1])
    with model.loaded(range(3)), torch.no_grad():
        for _ in range(11):
            following = model.model(tokens, use_cache=False).logits[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens.numpy()


@MASKS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_the_mask_holds(family, single_weights, checkpoint_of):
    model, live, tensors = pruned_model(checkpoint_of(family), single_weights)
    result = train_adapters(model, TOKENS, live, FAST)
    assert result.accepted
    assert result.loss_after < result.loss_before - 0.02
    assert (result.steps, result.sequences) == (9, tuple(range(6)))
    assert result.weights.keys() == {f"{name}.weight" for name in live}
    for name, mask in live.items():
        before, after = tensors[f"{name}.weight"], result.weights[f"{name}.weight"]
        assert after.dtype == torch.float32
        assert (after[~mask].view(torch.int32) == 0).all()  # positive zeros, bit for bit
        assert (after != before)[mask].float().mean() > 0.9
    assert result.loss_before == loss_of(model)
    assert result.loss_after == loss_of(with_weights(checkpoint_of(family), tensors | result.weights))


def test_structures_stay_low_rank_and_both_ways_of_masking_agree(checkpoint_of):
    model, live, tensors = pruned_model(checkpoint_of("opt"), single_weights=False)
    result = train_adapters(model, TOKENS, live, FAST)
    for name in live:
        change = result.weights[f"{name}.weight"] - tensors[f"{name}.weight"]
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= FAST.rank
    # One more removed weight that was zero anyway takes the other way to the same gradients elsewhere.
    name = "model.decoder.layers.1.fc1"
    live[name][3, 5] = False
    tensors[f"{name}.weight"][3, 5] = 0.0
    other = train_adapters(with_weights(checkpoint_of("opt"), tensors), TOKENS, live, replace(FAST, epochs=1))
    live[name][3, 5] = True
    first = train_adapters(with_weights(checkpoint_of("opt"), tensors), TOKENS, live, replace(FAST, epochs=1))
    assert other.weights[f"{name}.weight"][3, 5] == 0.0
    assert first.weights[f"{name}.weight"][3, 5] != 0.0
    assert other.loss_after == pytest.approx(first.loss_after, abs=1e-3)


@MASKS
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_is_what_is_kept(family, single_weights, checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of(family), single_weights)
    input_ids = torch.from_numpy(TOKENS)
    seen = []

    def look(_done, _total):
        with torch.no_grad():  # between the evaluations, the model computes with its adapters
            seen.append(next_token_loss(model.model(input_ids, use_cache=False).logits, input_ids).item() / (6 * 11))

    result = train_adapters(model, TOKENS, live, FAST, look)
    after_last_step = seen[3 + result.steps - 1]
    assert result.loss_after == pytest.approx(after_last_step, abs=2e-6)
    assert abs(after_last_step - seen[0]) > 0.02


def test_gradients_are_those_of_the_masked_loss(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("llama-gqa-tied"), single_weights=True)
    input_ids = torch.from_numpy(TOKENS)
    with model.loaded(range(3)), masked_adapters(model.model, live, rank=2, seed=1) as adapters:
        for name in PAIR:
            adapter = adapters[name]
            loss = model.model(input_ids, labels=input_ids, use_cache=False).loss
            slope = torch.autograd.grad(loss, adapter.b)[0][7, 1].item()
            losses = []
            for step in (1e-2, -1e-2):
                with torch.no_grad():
                    adapter.b[7, 1] += step
                    losses.append(model.model(input_ids, labels=input_ids, use_cache=False).loss.item())
                    adapter.b[7, 1] -= step
            assert slope == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05, abs=2e-5)


def picture(model):
    """Everything of a model that a user of it could notice."""
    modules = {
        name: (type(module), id(module), sorted(vars(module)), len(module._forward_hooks), module.training)
        for name, module in model.model.named_modules()
    }
    parameters = {
        name: (id(p), p.data_ptr(), p.requires_grad, p.grad, copy.deepcopy(p.detach()))
        for name, p in model.model.named_parameters()
    }
    return modules, parameters


def require_same(found, expected):
    assert found[0] == expected[0]
    assert list(found[1]) == list(expected[1])
    for name, values in expected[1].items():
        assert found[1][name][:4] == values[:4], name
        assert torch.equal(found[1][name][4], values[4]), name


@MASKS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family, single_weights, checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of(family), single_weights)
    with model.loaded(range(3)):
        expected = picture(model)
        train_adapters(model, TOKENS, live, replace(FAST, epochs=1))
        require_same(picture(model), expected)
    assert all(parameter.is_meta for parameter in model.block(0).parameters())


def test_the_model_is_left_as_it_was_after_an_error(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("opt"), single_weights=True)

    def stop(done, _total):
        if done == 4:
            raise KeyboardInterrupt

    with model.loaded(range(3)):
        expected = picture(model)
        with pytest.raises(KeyboardInterrupt):
            train_adapters(model, TOKENS, live, FAST, stop)
        require_same(picture(model), expected)


def test_a_half_made_injection_is_undone(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("opt"), single_weights=False)
    live["model.decoder.layers.2.fc2"] = "not a mask"
    with model.loaded(range(3)):
        expected = picture(model)
        with pytest.raises(AttributeError), masked_adapters(model.model, live, rank=2, seed=0):
            pass
        require_same(picture(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_that_does_not_fall_changes_nothing(family, checkpoint_of):
    model, live, tensors = pruned_model(checkpoint_of(family), single_weights=False)
    result = train_adapters(model, likely_tokens(model), live, HARMFUL)
    assert not result.accepted
    assert result.loss_after > result.loss_before
    assert result.steps == 1
    assert result.weights.keys() == {f"{name}.weight" for name in live}
    assert all(torch.equal(weight, tensors[name]) for name, weight in result.weights.items())


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("llama-gqa-tied"), single_weights=False)
    settings = replace(FAST, fraction=0.5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = train_adapters(model, TOKENS, live, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(99)
    second = train_adapters(pruned_model(checkpoint_of("llama-gqa-tied"), False)[0], TOKENS, live, settings)
    assert second.loss_after == first.loss_after
    assert all(torch.equal(second.weights[name], weight) for name, weight in first.weights.items())
    # All sequences, so that a difference comes from order and start only.
    third, fourth = (train_adapters(model, TOKENS, live, replace(FAST, seed=seed)) for seed in ((3, 1), (3, 2)))
    assert third.loss_after != fourth.loss_after


def test_nothing_is_said(checkpoint_of, capfd, recwarn):
    model, live, _ = pruned_model(checkpoint_of("llama-gqa-tied"), single_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_adapters(model, TOKENS[:2], live, replace(FAST, epochs=1))
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_batch(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("opt"), single_weights=False)
    told = []
    train_adapters(model, TOKENS, live, replace(FAST, epochs=2), lambda done, total: told.append((done, total)))
    assert told == [(done, 12) for done in range(1, 13)]


def test_a_fraction_of_the_sequences_is_used(checkpoint_of):
    model, live, tensors = pruned_model(checkpoint_of("opt"), single_weights=False)
    result = train_adapters(model, TOKENS, live, replace(FAST, fraction=0.5))
    assert len(result.sequences) == 3
    assert list(result.sequences) == sorted(set(result.sequences))
    chosen = TOKENS[list(result.sequences)]
    corrected = with_weights(checkpoint_of("opt"), tensors | result.weights)
    assert (result.loss_before, result.loss_after) == (loss_of(model, chosen), loss_of(corrected, chosen))
    draws = {tuple(choose_sequences(6, replace(FAST, fraction=0.5, seed=seed))) for seed in range(10)}
    assert len(draws) > 3
    assert len(choose_sequences(6, replace(FAST, fraction=1e-6))) == 1


def test_half_precision_keeps_the_precision_of_the_stored_weights(checkpoint_of):
    model, live, tensors = pruned_model(checkpoint_of("opt"), single_weights=False, dtype=torch.bfloat16)
    result = train_adapters(model, TOKENS, live, FAST)
    assert result.accepted
    name = next(iter(result.weights))
    mask = live[name.removesuffix(".weight")]
    assert result.weights[name].dtype == torch.float32
    assert (result.weights[name] != result.weights[name].bfloat16().float())[mask].any()
    assert (result.weights[name][~mask] == 0).all()
    again = with_weights(checkpoint_of("opt"), tensors | result.weights, torch.bfloat16)
    assert result.loss_after == loss_of(again)
    rejected = train_adapters(model, likely_tokens(model), live, HARMFUL)
    assert not rejected.accepted
    assert all(torch.equal(weight, tensors[name]) for name, weight in rejected.weights.items())


def test_a_loss_that_is_not_finite_names_step_and_sequence(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("opt"), single_weights=False)
    with pytest.raises(NonFiniteError, match=r"the loss in step \d+ of the correction is nan, first in sequence \d"):
        train_adapters(model, TOKENS, live, replace(FAST, learning_rate=1e30))
    with pytest.raises(NonFiniteError, match=r"after 1 steps of the correction, .* window"):
        train_adapters(model, TOKENS[:2], live, replace(FAST, learning_rate=1e30, epochs=1))


def test_a_bad_sequence_is_named_by_its_own_number(checkpoint_of):
    _, live, tensors = pruned_model(checkpoint_of("opt"), single_weights=False)
    model = with_weights(checkpoint_of("opt"), tensors)
    tokens = TOKENS.copy()
    tokens[4, 3] = 270
    settings = replace(FAST, fraction=0.5, seed=next(s for s in range(99) if 4 in choose_sequences(6, half(s))))

    def poison(done, _total):
        if done == 2:  # the loss before has been taken
            model.model.model.decoder.embed_tokens.weight.data[270] = float("nan")

    # The output embedding is tied to it, so only an untied model shows one sequence alone.
    model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.detach().clone(), requires_grad=False)
    with pytest.raises(NonFiniteError, match="first in sequence 4"):
        train_adapters(model, tokens, live, settings, poison)


def half(seed):
    return replace(FAST, fraction=0.5, seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "correction rank: got 0, allowed: 1 or more"),
        ({"epochs": 0}, "correction epochs: got 0"),
        ({"batch_size": 0}, "correction batch_size: got 0"),
        ({"learning_rate": 0.0}, "correction learning_rate: got 0.0, allowed: above 0"),
        ({"learning_rate": float("nan")}, "correction learning_rate: got nan"),
        ({"learning_rate": float("inf")}, "correction learning_rate: got inf"),
        ({"fraction": 0.0}, "correction fraction: got 0.0"),
        ({"fraction": 1.1}, "correction fraction: got 1.1, allowed: above 0, up to 1"),
        ({"seed": -1}, "correction seed: got -1, allowed: 0 or more"),
        ({"seed": (3, -1)}, r"correction seed: got \(3, -1\)"),
        ({"seed": ()}, r"correction seed: got \(\)"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ParameterError, match=message):
        replace(FAST, **change)


def test_live_weights_that_do_not_fit(checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("llama-gqa-tied"), single_weights=False)
    name = PAIR[0]
    with pytest.raises(ValueError, match=f"exactly the 21 linears; differs in .*{name}"):
        train_adapters(model, TOKENS, {n: mask for n, mask in live.items() if n != name}, FAST)
    with pytest.raises(ValueError, match=f"{name}: got torch.float32 .*must be torch.bool"):
        train_adapters(model, TOKENS, live | {name: live[name].float()}, FAST)
    with pytest.raises(ValueError, match=f"{name} has weights that are not zero where none lives"):
        train_adapters(model, TOKENS, live | {name: torch.zeros_like(live[name])}, FAST)
