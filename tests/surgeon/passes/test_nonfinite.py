"""NaN and infinity are errors that say where: block, linear and sequence."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_tiny

from surgeon.errors import NonFiniteError
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import forward_group
from surgeon.passes.evaluation import evaluate_perplexity
from tests.surgeon.passes.running import LENGTH, kfac_group, sequences_of

BAD_SEQUENCE = 3
BAD_TOKEN = 265


def poisoned_token(family, folder):
    """A model whose embedding of one token is infinite, and sequences of which one has that token."""
    path = make_tiny(family, folder / "model", tie_word_embeddings=False)
    tensors = load_file(path / "model.safetensors")
    (name,) = [name for name in tensors if re.search(r"embed_tokens|embed_in", name)]
    tensors[name][BAD_TOKEN, 7] = torch.inf
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    sequences = sequences_of()
    sequences[BAD_SEQUENCE, 5] = BAD_TOKEN
    return BlockwiseModel(resolve_model(str(path), folder / "cache")), sequences


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_that_overflows_is_named(family, tmp_path):
    model, sequences = poisoned_token(family, tmp_path)
    first = re.escape(model.shared(0)[0][0])
    with pytest.raises(
        NonFiniteError, match=rf"input activation in block 0, linear {first}, sequence {BAD_SEQUENCE}\. .*another seed"
    ):
        kfac_group(model, sequences, range(3), None, None, batch_size=2)
    with pytest.raises(
        NonFiniteError, match=rf"hidden states after blocks 0 to 1, sequence {BAD_SEQUENCE}\. .*float32 or bfloat16"
    ):
        forward_group(model, sequences, range(2), None, batch_size=2)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_a_loss_that_is_not_finite_names_its_windows(n_groups, tmp_path):
    model, windows = poisoned_token("llama", tmp_path)
    if n_groups == 1:
        with pytest.raises(NonFiniteError, match=r"loss of evaluation windows 2 to 3 is nan"):
            evaluate_perplexity(model, windows, [range(3)], batch_size=2)
    else:
        with pytest.raises(NonFiniteError, match=r"hidden states after blocks 0 to 1, sequence 3"):
            evaluate_perplexity(model, windows, [range(2), range(2, 3)], batch_size=2)


def poisoned(tensor, value=torch.inf):
    """The tensor of the batch of sequences 2 and 3 with one number of sequence 3 replaced; OPT has one row a token."""
    result = tensor.detach().clone()
    result.view(2, -1)[BAD_SEQUENCE - 2, -5] = value
    return result


def on_second_batch(change):
    calls = []

    def changed(value):
        calls.append(value)
        return change(value) if len(calls) == 2 else None

    return changed


@pytest.mark.parametrize(("family", "value"), [("llama", torch.inf), *((family, torch.nan) for family in FAMILIES)])
def test_every_input_activation_is_looked_at(family, value, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of()
    for name in [group[0] for group in model.shared(0)]:
        change = on_second_batch(lambda args: (poisoned(args[0], value),))
        handle = model.linears(1)[name].register_forward_pre_hook(lambda _module, args, change=change: change(args))
        message = f"non-finite input activation in block 1, linear {name}, sequence {BAD_SEQUENCE}. The"
        with pytest.raises(NonFiniteError, match=re.escape(message)):
            kfac_group(model, sequences, range(3), None, None, batch_size=2)
        handle.remove()


@pytest.mark.parametrize(("family", "value"), [("llama", torch.nan), *((family, -torch.inf) for family in FAMILIES)])
def test_every_output_gradient_is_looked_at(family, value, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of()
    for name in model.linears(1):
        change = on_second_batch(lambda gradient: poisoned(gradient, value))

        # Registered before the observer's own hooks, so that those see the changed gradient.
        def hook(_module, _args, output, change=change):
            output.register_hook(change)

        handle = model.linears(1)[name].register_forward_hook(hook)
        message = f"non-finite output gradient in block 1, linear {name}, sequence {BAD_SEQUENCE}. The"
        with pytest.raises(NonFiniteError, match=re.escape(message)):
            kfac_group(model, sequences, range(3), None, None, batch_size=2)
        handle.remove()


def test_an_infinite_gradient_from_above(checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("mistral")), sequences_of()
    boundary = forward_group(model, sequences, range(1), None, batch_size=2)
    above = np.ones_like(boundary)
    above[BAD_SEQUENCE, 0, 3] = np.inf
    with pytest.raises(NonFiniteError, match=r"output gradient in block 1, linear mlp.down_proj, sequence 3"):
        kfac_group(model, sequences, range(1, 2), boundary, above, batch_size=2)


def test_an_infinite_weight_shows_where_it_is_used(checkpoint_of):
    checkpoint, name = checkpoint_of("llama"), "model.layers.1.self_attn.v_proj.weight"
    weight = load_file(checkpoint.path / "model.safetensors")[name]
    weight[3, 4] = torch.inf
    model = BlockwiseModel(checkpoint, overrides=lambda index: {name: weight} if index == 1 else {})
    with pytest.raises(NonFiniteError, match=r"input activation in block 1, linear self_attn.o_proj, sequence 0"):
        kfac_group(model, sequences_of(), range(3), None, None, batch_size=2)
    with pytest.raises(NonFiniteError, match=r"hidden states after blocks 1 to 1, sequence 0"):
        forward_group(model, sequences_of(), range(1, 2), np.ones((5, LENGTH, 32), np.float32), batch_size=2)


def test_finite_numbers_whose_squares_overflow_are_an_error_too(checkpoint_of):
    model = BlockwiseModel(checkpoint_of("llama"))
    model.linears(1)["mlp.down_proj"].register_forward_pre_hook(lambda _module, args: (args[0] * 0 + 1e25,))
    with pytest.raises(NonFiniteError, match=r"block 1, linear mlp.down_proj, the sum over sequences"):
        kfac_group(model, sequences_of(), range(3), None, None, batch_size=2)


def test_large_finite_float16_hidden_states_are_not_an_error(checkpoint_of):
    """Their sum over a sequence does not fit into float16, each of them does."""
    model = BlockwiseModel(checkpoint_of("llama"), dtype=torch.float16)
    boundary = np.full((2, LENGTH, 32), 1000.0, np.float32)
    result = forward_group(model, sequences_of(2), range(1, 2), boundary, batch_size=2)
    assert np.isfinite(result).all()
    assert np.abs(result.sum(axis=(1, 2))).min() > torch.finfo(torch.float16).max
