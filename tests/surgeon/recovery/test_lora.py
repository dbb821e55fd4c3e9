"""Adapters on a pruned model: merged they are the model that was trained, and nothing removed comes back."""

import numpy as np
import pytest
import torch

from surgeon.choices import Recovery
from surgeon.errors import ParameterError
from surgeon.recovery.lora import adapted_linears, adapter_parameters, merged_weights, recovery_adapters
from surgeon.recovery.objective import NextTokens
from surgeon.recovery.state import TrainingState
from surgeon.recovery.training import Trainer, validation_loss
from tests.surgeon.correction.pruned import pruned_model
from tests.surgeon.recovery.small import settings

ROWS = np.random.default_rng(5).integers(4, 260, (8, 12))
GIVEN = settings(
    method=Recovery.LORA, length=12, batch_tokens=48, tokens=48 * 6, rank=3, learning_rate=1e-2, validation_tokens=12
)
MASKS = pytest.mark.parametrize("single_weights", [False, True], ids=["structures", "single weights"])


@MASKS
@pytest.mark.parametrize("family", ["llama-gqa-tied", "opt", "gpt_neox"])
def test_merged_is_the_adapted_model(family, single_weights, checkpoint_of):
    model, live, tensors = pruned_model(checkpoint_of(family), single_weights)
    ids = torch.from_numpy(ROWS[:2])
    with model.loaded(range(3)):
        with recovery_adapters(model.model, adapted_linears(live, ()), GIVEN) as adapters:
            parameters = adapter_parameters(adapters)
            before = validation_loss(model.model, ROWS, 4)
            Trainer(NextTokens(model.model), parameters, {}, GIVEN, ROWS).run(6)
            merged = merged_weights(model.model, adapters, live)
            with torch.no_grad():
                adapted = model.model(ids, use_cache=False).logits
            assert validation_loss(model.model, ROWS, 4) < before
        for name, mask in live.items():
            before, after = tensors[f"{name}.weight"], merged[f"{name}.weight"]
            assert torch.equal(before[~mask].view(torch.int32), after[~mask].view(torch.int32))
            assert (before != after)[mask].float().mean() > 0.9
        with torch.no_grad():
            pruned = model.model(ids, use_cache=False).logits
            for name, weight in merged.items():
                model.model.get_parameter(name).copy_(weight)
            absorbed = model.model(ids, use_cache=False).logits
    torch.testing.assert_close(absorbed, adapted, rtol=1e-4, atol=1e-4)
    assert (pruned - adapted).abs().max() > 1e-2


@MASKS
def test_adapters_go_on_to_the_bit(single_weights, checkpoint_of):
    model, live, _ = pruned_model(checkpoint_of("llama-gqa-tied"), single_weights)

    def begin():
        return recovery_adapters(model.model, adapted_linears(live, ()), GIVEN)

    def made(adapters):
        return Trainer(NextTokens(model.model), adapter_parameters(adapters), {}, GIVEN, ROWS)

    with model.loaded(range(3)):
        with begin() as adapters:
            whole = made(adapters)
            losses, end = whole.run(6), whole.state().to_arrays()
        with begin() as adapters:
            first = made(adapters)
            seen, arrays = first.run(2), first.state().to_arrays()
        with begin() as adapters:
            second = made(adapters)
            second.restore(TrainingState.from_arrays(arrays))
            assert seen + second.run(4) == losses
            again = second.state().to_arrays()
    assert {name: a.tobytes() for name, a in again.items()} == {name: a.tobytes() for name, a in end.items()}
    assert all(name.endswith((".A", ".B")) for name in second.parameters)


LIVE = {
    "model.layers.0.self_attn.q_proj": torch.zeros(4, 4, dtype=torch.bool),
    "model.layers.0.mlp.up_proj": torch.ones(4, 4, dtype=torch.bool),
    "model.layers.0.mlp.down_proj": torch.ones(4, 0, dtype=torch.bool),
    "model.layers.1.mlp.up_proj": torch.zeros(4, 4, dtype=torch.bool),
    "model.layers.1.mlp.down_proj": torch.ones(4, 4, dtype=torch.bool),
}


def test_linears_of_which_nothing_lives_get_no_adapter():
    assert set(adapted_linears(LIVE, ())) == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    assert set(adapted_linears(LIVE, ["up_proj"])) == {"model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["q_proj"],
            "'q_proj' was removed from every block, so an adapter has nothing to adapt; allowed: down_proj, u",
        ),
        (["up_prj"], r"no linear 'up_prj'; allowed: down_proj, q_proj, up_proj\. Did you mean 'up_proj'"),
    ],
)
def test_adapters_on_removed_linears_are_refused(wanted, message):
    with pytest.raises(ParameterError, match=message):
        adapted_linears(LIVE, wanted)


def test_nothing_left_to_adapt():
    with pytest.raises(ParameterError, match=r"recovery\.method: lora has nothing to adapt: no weight of any block"):
        adapted_linears({name: mask & False for name, mask in LIVE.items()}, ())
