"""The loop against formulas, masks, and what is refused."""

import math

import numpy as np
import pytest
import torch

from surgeon.errors import MemoryShortageError, NonFiniteError
from surgeon.recovery.objective import NextTokens
from surgeon.recovery.packing import step_rows
from surgeon.recovery.schedule import rate_at
from surgeon.recovery.training import Trainer, trainable_parameters, training_memory, validation_loss
from tests.surgeon.recovery.small import ROWS, ExactLoss, SmallModel, settings, trainer


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_steps_are_those_of_the_formulas():
    """Algorithm 2 of AdamW, written out, with clipping, over several steps."""
    given = settings(clip=0.3)
    made, model = trainer(given)
    reference = SmallModel().double()
    parameters = dict(reference.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    losses = made.run(given.steps)
    for step in range(given.steps):
        ids = torch.from_numpy(ROWS[step_rows(len(ROWS), step, given)])
        loss = next(iter(ExactLoss(reference)(ids).values()))
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert losses[step].loss == pytest.approx(float(loss), rel=1e-12)
        assert losses[step].gradient_norm == pytest.approx(norm, rel=1e-10)
        assert norm > given.clip  # or clipping is not tested
        rate, t = rate_at(given, step), step + 1
        for name, parameter in parameters.items():
            g = gradients[name] * min(1.0, given.clip / (norm + 1e-6))
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.95).add_(0.05 * g * g)
            decay = 0.1 if parameter.ndim > 1 else 0.0
            change = (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + given.epsilon) + 0.0
            with torch.no_grad():
                parameter.copy_(parameter * (1 - rate * decay) - rate * change)
    for name, parameter in parameters.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_parts_of_a_batch_add_up_to_the_batch(micro_batch):
    whole, model = trainer(settings(micro_batch=4))
    parts, other = trainer(settings(micro_batch=micro_batch))
    first, second = whole.run(6), parts.run(6)
    assert [loss.loss for loss in first] == pytest.approx([loss.loss for loss in second], rel=1e-12)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_the_loss_of_the_library_is_the_formula():
    made, _ = trainer(dtype=torch.float32, objective=NextTokens)
    exact, _ = trainer()
    assert [loss.loss for loss in made.run(3)] == pytest.approx([loss.loss for loss in exact.run(3)], rel=1e-5)


def masked(pattern, dtype=torch.float32):
    """A model with removed weights, negative zeros among them, and its masks."""
    model = SmallModel().to(dtype)
    mask = pattern(model.linear.weight)
    bias = mask.any(dim=1)
    with torch.no_grad():
        model.linear.weight.mul_(mask)
        model.linear.bias.mul_(bias)
    assert (model.linear.weight[~mask].view(torch.int32 if dtype is torch.float32 else torch.int64) != 0).any()
    return model, {"linear.weight": mask, "linear.bias": bias}


def two_of_four(weight):
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[:, 0:2] = True
    kept[::2, 2:4] = True
    kept[::2, 0:2] = False
    kept[3] = False
    return kept


def single(weight):
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.4


@pytest.mark.parametrize("pattern", [two_of_four, single])
def test_masks_hold_to_the_bit(pattern):
    model, masks = masked(pattern)
    made, _ = trainer(settings(tokens=24 * 20), masks, model=model, dtype=torch.float32)
    before = copies(model)
    made.run(20)
    for name, mask in masks.items():
        now = dict(model.named_parameters())[name]
        assert (now[~mask].view(torch.int32) == 0).all()
        assert (now != before[name])[mask].all()
    state = made.state()
    assert all((state.first_moments[name][~mask] == 0).all() for name, mask in masks.items())


def test_a_mask_that_is_broken_is_noticed():
    model, masks = masked(single)
    made, _ = trainer(settings(), masks, model=model, dtype=torch.float32)
    with torch.no_grad():
        model.linear.weight[~masks["linear.weight"]] = -0.0
    with pytest.raises(AssertionError, match=r"linear\.weight: a removed weight has changed"):
        made.state()


def test_weights_that_live_where_none_should():
    model = SmallModel()
    masks = {"linear.weight": single(model.linear.weight)}
    with pytest.raises(ValueError, match=r"linear\.weight has weights that are not zero where none lives"):
        trainer(masks=masks, model=model, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"the mask of linear\.weight is torch\.bool \(2, 2\); must be"):
        trainer(masks={"linear.weight": torch.ones(2, 2, dtype=torch.bool)})


def test_the_gradient_of_removed_weights_does_not_count_for_clipping():
    model, masks = masked(single, torch.float64)
    made, _ = trainer(settings(), masks, model=model)
    ids = torch.from_numpy(ROWS[step_rows(len(ROWS), 0, settings())])
    loss = next(iter(ExactLoss(model)(ids).values()))
    gradients = dict(zip(copies(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = math.sqrt(
        sum(float((g * masks[name] if name in masks else g).square().sum()) for name, g in gradients.items())
    )
    assert made.run(1)[0].gradient_norm == pytest.approx(norm, rel=1e-10)


def test_a_loss_that_is_not_finite_names_the_step_and_changes_nothing():
    made, model = trainer(settings())
    made.run(2)
    with torch.no_grad():
        model.scale[0] = math.nan
    before = copies(model)
    with pytest.raises(NonFiniteError, match=r"the loss in step 2 of recovery is nan .*Try a lower recovery\.learning"):
        made.run(1)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n != "scale")


def test_a_gradient_that_is_not_finite_names_the_step():
    class Cliff(ExactLoss):
        def __call__(self, input_ids):
            terms = super().__call__(input_ids)
            return {name: value + (self.model.scale[0] * 0.0).sqrt() for name, value in terms.items()}

    made, _ = trainer(objective=Cliff)
    with pytest.raises(NonFiniteError, match="the norm of the gradient in step 0 of recovery is"):
        made.run(1)


def test_validation_is_the_mean_over_rows():
    model = SmallModel().double()
    explicit = float(next(iter(ExactLoss(model)(torch.from_numpy(ROWS)).values())))
    for micro_batch in (1, 5, 12):
        assert validation_loss(model, ROWS, micro_batch) == pytest.approx(explicit, rel=1e-6)
    with torch.no_grad():
        model.embedding.weight[int(ROWS[7, 2])] = math.inf
    first = next(i for i in range(12) if (ROWS[i, :-1] == ROWS[7, 2]).any())
    with pytest.raises(NonFiniteError, match=f"the loss of validation rows {first} to {first} is nan"):
        validation_loss(model, ROWS, 1)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_memory_that_runs_out_says_what_to_lower(error):
    with (
        pytest.raises(MemoryShortageError, match=r"Lower recovery\.micro_batch .* recovery\.method=lora"),
        training_memory(),
    ):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^shapes$"), training_memory():
        raise RuntimeError("shapes")


def test_a_real_allocation_that_is_too_large(monkeypatch):
    class Greedy(ExactLoss):
        def __call__(self, input_ids):
            torch.empty(2**60, dtype=torch.uint8)
            return super().__call__(input_ids)

    made, _ = trainer(objective=Greedy)
    with pytest.raises(MemoryShortageError, match="recovery ran out of memory"):
        made.run(1)


def test_frozen_parameters_stay():
    model = SmallModel().double()
    model.requires_grad_(False)
    parameters = {"head.weight": trainable_parameters(model)["head.weight"]}
    before = copies(model)
    Trainer(ExactLoss(model), parameters, {}, settings(), ROWS).run(2)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"head.weight"}
    assert np.isfinite(model.head.weight.detach().numpy()).all()
