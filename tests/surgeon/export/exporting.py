"""Tiny pruned models for exports: made from what is live, and run in memory as the stock model with masked weights."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from tiny import make_tiny
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from surgeon.choices import ExportLayout
from surgeon.export import ExportPlan, Probe, PrunedModel, export_checkpoint, plan_export
from surgeon.export.load_back_script import logits_of
from surgeon.models import Checkpoint, resolve_model
from surgeon.models.quiet import quiet_transformers
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.pruning.linear import PrunedLinear
from tests.surgeon.passes.stock import load_stock

PROBE = Probe.of([list(range(5, 23)), list(range(30, 41))])
Kill = Callable[[int, dict], None]
"""Clears what is to be removed of a block: given its index and name → (live rows, live columns)."""


@dataclass
class Case:
    """A pruned model; `others` and `trunk` are changed tensors that are none of a linear, as `PrunedModel` has them."""

    checkpoint: Checkpoint
    blocks: dict[int, dict[str, PrunedLinear]]
    path: str
    removed: tuple[int, ...] = ()
    others: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    trunk: dict[str, torch.Tensor] = field(default_factory=dict)

    def without(self, *removed) -> "Case":
        return replace(self, removed=removed)

    @property
    def pruned(self) -> PrunedModel:
        def live(index):
            return {name: (li.live_rows, li.live_columns) for name, li in self.blocks[index].items()}

        return PrunedModel(
            *(self.checkpoint, self.blocks.__getitem__, live),
            removed=self.removed,
            others=lambda index: self.others.get(index, {}),
            trunk=self.trunk,
        )

    def overrides(self, index):
        """Weights and biases of a block by full name, of dense shape."""
        tensors = {}
        for name, linear in self.blocks[index].items():
            tensors[f"{self.path}.{index}.{name}.weight"] = linear.weight
            if linear.bias is not None:
                tensors[f"{self.path}.{index}.{name}.bias"] = linear.bias
        return tensors | {f"{self.path}.{index}.{name}": value for name, value in self.others.get(index, {}).items()}

    def plan(self, dtype="float32", layout=ExportLayout.AUTO) -> ExportPlan:
        return plan_export(self.pruned, dtype, layout)

    def masked(self, dtype=torch.float32):
        """The stock model of dense shapes with masked weights; hidden states pass by removed blocks (no cache then)."""
        model = load_stock(self.checkpoint.path, dtype)
        state = model.state_dict()
        with torch.no_grad():
            for index in self.blocks:
                for name, value in self.overrides(index).items():
                    state[name].copy_(value)
            for name, value in self.trunk.items():
                state[name].copy_(value)
        for index in self.removed:
            block = model.get_submodule(f"{self.path}.{index}")
            block.forward = pass_by(isinstance(block, FalconDecoderLayer))
        return model

    def block_wise(self, dtype=torch.float32):
        """The same, as the package opens it."""
        return BlockwiseModel(
            self.checkpoint, dtype=dtype, overrides=self.overrides, removed=self.removed, trunk=self.trunk
        )

    @contextmanager
    def in_memory(self, dtype=torch.float32):
        """The same with all blocks loaded."""
        model = self.block_wise(dtype)
        with model.loaded(range(model.n_blocks)):
            yield model.model


def pass_by(returns_tuple):
    def forward(hidden_states, *_args, **_kwargs):
        return (hidden_states,) if returns_tuple else hidden_states

    return forward


def opened(path):
    return resolve_model(str(path), path.parent / "cache")


def case_of(checkpoint, kill: Kill, seed=None) -> Case:
    """A model of which `kill` removes rows and columns; with a seed, what stays is changed too."""
    model = BlockwiseModel(checkpoint)
    generator = torch.Generator().manual_seed(seed or 0)
    blocks = {}
    for index in range(model.n_blocks):
        with model.loaded(range(index, index + 1)):
            dense = {}
            for name, linear in model.linears(index).items():
                parts = [linear.weight, linear.bias]
                if seed is not None:
                    parts = [p if p is None else p + 0.05 * torch.randn(p.shape, generator=generator) for p in parts]
                dense[name] = PrunedLinear.dense(*(p if p is None else p.detach().clone() for p in parts))
        live = {name: (linear.live_rows.clone(), linear.live_columns.clone()) for name, linear in dense.items()}
        kill(index, live)
        blocks[index] = {name: dense[name].restricted(*live[name]) for name in dense}
    return Case(checkpoint, blocks, model.architecture.blocks_path)


def tiny_case(family, folder, kill: Kill, *, seed=None, **options) -> Case:
    return case_of(opened(make_tiny(family, folder / "model", **options)), kill, seed)


def exported(case: Case, folder, dtype="float32", layout=ExportLayout.AUTO):
    """Writes an export and gives its facts."""
    plan = case.plan(dtype, layout)
    return export_checkpoint(plan, folder, "{{export}}", {"version": 1}).facts | {"code": plan.needs_code}


def logits_by_others(folder, facts, dtype="float32"):
    """What the script of the fresh process finds, in this process: logits in one go, and in two steps with a cache."""
    tokens = {"input_ids": PROBE.input_ids, "attention_mask": PROBE.attention_mask}
    with quiet_transformers():
        return logits_of(str(folder), tokens, dtype, facts["code"])


def masked_logits(case: Case, dtype=torch.float32):
    with torch.no_grad():
        return case.masked(dtype)(PROBE.input_ids, attention_mask=PROBE.attention_mask).logits.float()


def difference(found, expected):
    """Largest difference at tokens that are no padding, relative to the largest logit."""
    real = PROBE.attention_mask.bool()
    return float((found[real] - expected[real]).abs().max() / expected[real].abs().max())
