"""Work as counted against what torch counts, and what can be said of any amount of work."""

import pytest
import torch
from tiny import make_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from surgeon.choices import Method, Structure
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.loss import next_token_loss
from surgeon.planning import Operation, Rates, Work
from surgeon.planning.passes import BlockShape, backward_work, forward_work, gram_work, head_backward_work, head_work
from surgeon.planning.solves import Solved, cost_work, elimination_work, update_work
from surgeon.preferences import Preferences
from surgeon.recipe import resolve

BATCH, LENGTH = 2, 24
QUERY_WIDTHS = {"llama-gqa-tied": 32, "qwen3": 64, "gpt_neox": 32, "opt": 32}


def counted(body):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        body()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", QUERY_WIDTHS)
def test_passes_are_counted_as_torch_does(family, tmp_path):
    model = BlockwiseModel(resolve_model(str(make_tiny(family, tmp_path / "model")), tmp_path))
    ids = torch.randint(4, 200, (BATCH, LENGTH))
    blocks = [
        BlockShape(sum(li.weight.numel() for li in model.linears(b).values()), QUERY_WIDTHS[family])
        for b in range(model.n_blocks)
    ]
    n_head = model.model.get_output_embeddings().weight.numel()
    tokens = BATCH * LENGTH

    def run(*, backward):
        embedded = model.embed(ids)
        start = hidden = embedded.hidden.detach().requires_grad_(backward)
        for index in range(model.n_blocks):
            hidden = model.run_block(index, hidden, embedded.calls[index])
        loss = next_token_loss(model.head(ids, hidden), ids)
        if backward:
            loss.backward()
            assert start.grad is not None

    with model.loaded(range(model.n_blocks)):
        with torch.no_grad():
            forward = counted(lambda: run(backward=False))
        both = counted(lambda: run(backward=True))
    expected = forward_work(blocks, tokens, LENGTH) + head_work(n_head, tokens)
    assert forward == pytest.approx(expected.flops, rel=0.01)
    back = backward_work(blocks, tokens, LENGTH) + head_backward_work(n_head, tokens)
    assert both == pytest.approx((expected + back).flops, rel=0.01)


def test_sums_of_outer_products_form_one_triangle_by_panels():
    assert gram_work([100, 256], 10) == Work.of(gram=10 * (100**2 + 256**2))
    assert gram_work([512], 1) == Work.of(gram=256 * 256 + 256 * 512)


def test_an_elimination_takes_about_the_work_of_a_few_factorisations():
    """Downdates by equal parts add up to n³/3 with the matrix and o n² with weight and its product."""
    n_out, n = 64, 640
    solves = elimination_work(n_out, n, n, 64).amounts[Operation.SOLVES]
    assert solves == pytest.approx(n**3 / 3 + n_out * n**2, rel=0.05)


def test_work_is_added_and_scaled():
    work = 2 * (Work.of(forward=3, copies=8) + Work.of(forward=1, eigen=2))
    assert work == Work.of(forward=8, copies=16, eigen=4)
    assert work.flops == 2 * (8 + 4.5 * 4)
    assert Rates({Operation.FORWARD: 4.0, Operation.COPIES: 8.0, Operation.EIGEN: 1.0}).seconds(work) == pytest.approx(
        8.0, rel=0.1
    )
    assert Rates({}).seconds(Work.of(seconds=1.5)) == pytest.approx(1.5)


def test_rates_of_other_operations_are_not_read():
    rates = Rates({name: 2.0 for name in Operation if name is not Operation.SECONDS})
    assert Rates.from_json(rates.to_json()) == rates
    assert Rates.from_json({**rates.to_json(), "forwards": 1.0}) is None
    assert Rates.from_json({}) is None


@pytest.mark.parametrize("structure", [Structure.UNITS, Structure.ROWS_AND_COLUMNS, Structure.WEIGHTS])
@pytest.mark.parametrize("kind", [cost_work, update_work])
def test_solves_grow_with_the_linear(kind, structure):
    recipe = resolve(Preferences(method=Method.LLM_SURGEON, granularity=structure))

    def total(n_out, n_in):
        work = kind(recipe, Solved(n_out, n_in, 0.1, 0.1, 0.1, n_groups=n_in))
        return sum(work.amounts.values())

    assert total(64, 64) < total(128, 64) < total(128, 128)
