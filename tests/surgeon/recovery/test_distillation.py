"""Terms against their formulas, written out; gradients; which layers are compared."""

import numpy as np
import pytest
import torch

from surgeon.choices import LossTerm, Recovery
from surgeon.errors import ParameterError
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.recovery.distillation import Distillation, find_taps, identity_map, mean_divergence, mean_square
from surgeon.recovery.training import Trainer, trainable_parameters
from tests.surgeon.correction.pruned import pruned_model
from tests.surgeon.recovery.small import settings

ROWS = np.random.default_rng(5).integers(4, 260, (8, 12))
IDS = torch.from_numpy(ROWS[:2])
OUTPUT = {"llama-gqa-tied": "self_attn.o_proj", "opt": "self_attn.out_proj", "gpt_neox": "attention.dense"}


@pytest.fixture(params=list(OUTPUT))
def pair(request, checkpoint_of):
    """Student of blocks 0 and 2, its teacher, and the taps of both; all in memory."""
    checkpoint = checkpoint_of(request.param)
    student, _, _ = pruned_model(checkpoint, single_weights=False)
    teacher = BlockwiseModel(checkpoint)
    every = range(3)
    with student.loaded(every), teacher.loaded(every):
        taps = tuple(
            find_taps(m.model.get_input_embeddings(), [m.block(b) for b in (0, 2)], OUTPUT[request.param])
            for m in (student, teacher)
        )
        yield student.model, teacher.model, taps


def explicit(model, taps, ids):
    """Logits, embedding, outputs of blocks and of their attention, with the model's own record of hidden states."""
    found = {}

    def note(name, output):
        found[name] = output[0] if isinstance(output, tuple) else output

    hooks = [
        module.register_forward_hook(lambda _m, _i, o, name=name: note(name, o))
        for name, module in {
            "embedding": taps.embedding,
            **{f"hidden {k}": block for k, block in enumerate(taps.blocks)},
            **{f"attention {k}": linear for k, linear in enumerate(taps.attention)},
        }.items()
    ]
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits.double(), {name: value.double() for name, value in found.items()}


def test_terms_are_the_formulas(pair):
    student, teacher, taps = pair
    made = Distillation(student, teacher, taps, list(LossTerm))
    with torch.no_grad():
        for parameter in made.extra.values():  # maps that are not the identity
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        terms = {term: float(value) for term, value in made(IDS).items()}
        (ours, mine), (theirs, its) = (explicit(m, t, IDS) for m, t in zip((student, teacher), taps, strict=True))
    maps = {name: p.detach().double() for name, p in made.extra.items()}
    n_predictions = 2 * 11
    p, q = theirs[:, :-1].softmax(-1), ours[:, :-1].softmax(-1)
    targets = IDS[:, 1:, None]
    assert terms[LossTerm.LM] == pytest.approx(float(-q.log().gather(-1, targets).sum()) / n_predictions, rel=1e-5)
    assert terms[LossTerm.KL] == pytest.approx(float((p * (p / q).log()).sum()) / n_predictions, rel=1e-4)
    hidden = sum(
        float((its[f"hidden {k}"] - mine[f"hidden {k}"] @ maps[f"map.hidden.{k}"]).square().mean()) for k in (0, 1)
    )
    attention = sum(float((its[f"attention {k}"] - mine[f"attention {k}"]).square().mean()) for k in (0, 1))
    embedding = float((its["embedding"] - mine["embedding"] @ maps["map.embedding"]).square().mean())
    assert terms[LossTerm.HIDDEN] == pytest.approx(hidden, rel=1e-5)
    assert terms[LossTerm.ATTENTION] == pytest.approx(attention, rel=1e-5)
    assert terms[LossTerm.EMBEDDING] == pytest.approx(embedding, rel=1e-5)
    assert min(terms.values()) > 0


def test_a_model_beside_itself_is_no_distance_away(pair):
    _, teacher, taps = pair
    made = Distillation(teacher, teacher, (taps[1], taps[1]), list(LossTerm))
    terms = {term: float(value) for term, value in made(IDS).items()}
    assert terms.pop(LossTerm.LM) > 1.0
    assert all(abs(value) < 1e-6 for value in terms.values())


def test_only_the_student_and_the_maps_are_trained(pair):
    student, teacher, taps = pair
    made = Distillation(student, teacher, taps, list(LossTerm))
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    given = settings(
        method=Recovery.DISTILL, terms=dict.fromkeys(LossTerm, 1.0), length=12, batch_tokens=48, tokens=48 * 8
    )
    trainer = Trainer(made, trainable_parameters(student), {}, given, ROWS)
    losses = trainer.run(8)
    assert losses[-1].loss < losses[0].loss
    for loss in losses:
        assert loss.loss == pytest.approx(sum(loss.terms.values()))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())
    assert {name for name in trainer.parameters if name.startswith("map.")} == {
        "map.embedding",
        "map.hidden.0",
        "map.hidden.1",
    }
    eye = torch.eye(32)
    assert all((made.extra[name] - eye).abs().max() > 1e-4 for name in made.extra)


def test_terms_not_asked_for_are_not_computed(pair):
    student, teacher, taps = pair
    made = Distillation(student, teacher, taps, [LossTerm.LM, LossTerm.KL])
    assert set(made(IDS)) == {LossTerm.LM, LossTerm.KL}
    assert made.extra == {}
    assert not any(module._forward_hooks for module in student.modules())


def test_divergence_in_float64():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    p, q = teacher[:, :2].softmax(-1), student[:, :2].softmax(-1)
    assert float(mean_divergence(teacher, student)) == pytest.approx(float((p * (p / q).log()).sum() / 4), rel=1e-12)


def test_maps_of_other_widths():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    mapped = identity_map(student, teacher)
    assert mapped.shape == (4, 6)
    assert torch.equal(mapped.detach()[:, :4], torch.eye(4))
    wanted = (teacher - student @ mapped).square().mean()
    assert float(mean_square(teacher, student, mapped)) == pytest.approx(float(wanted), rel=1e-6)


def test_attention_that_is_gone_or_not_known():
    class Block(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.out = torch.nn.Linear(width, 4, bias=False)

    blocks = [Block(4), Block(0)]
    taps = find_taps(torch.nn.Embedding(3, 4), blocks, "out")
    assert taps.attention == (blocks[0].out, None)
    assert find_taps(torch.nn.Embedding(3, 4), blocks, None).attention == (None, None)
    assert find_taps(torch.nn.Embedding(3, 4), blocks, "gone").attention == (None, None)
    nothing = find_taps(torch.nn.Embedding(3, 4), blocks, None)
    with pytest.raises(ParameterError, match="recovery terms: attention has nothing to compare: no block has"):
        Distillation(blocks[0], blocks[0], (nothing, taps), [LossTerm.ATTENTION])
