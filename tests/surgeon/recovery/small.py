"""A small language model in float64 whose loss is written down here, settings for it, and rows to train on."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from surgeon.choices import LossTerm, Recovery
from surgeon.recovery.objective import NextTokens
from surgeon.recovery.settings import RecoverySettings
from surgeon.recovery.training import Trainer, trainable_parameters

ROWS = np.random.default_rng(7).integers(0, 11, (12, 6))
N_VOCABULARY = 11


class SmallModel(nn.Module):
    """Embedding, a linear with bias, a norm's weight, a head."""

    def __init__(self, seed=0, width=5):
        super().__init__()
        self.embedding = nn.Embedding(N_VOCABULARY, width)
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, N_VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, input_ids, use_cache=False):
        hidden = self.embedding(input_ids)
        hidden = hidden + torch.tanh(self.linear(hidden)) * self.scale
        return SimpleNamespace(logits=self.head(hidden))


class ExactLoss(NextTokens):
    """The next-token loss in the precision of the model."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model

    def __call__(self, input_ids):
        logs = torch.log_softmax(self.model(input_ids).logits[:, :-1], dim=-1)
        return {LossTerm.LM: -logs.gather(-1, input_ids[:, 1:, None]).mean()}


def settings(**changes):
    """Four rows a step, in parts of two."""
    start = {
        "method": Recovery.FULL,
        "tokens": 6 * 24,
        "length": 6,
        "batch_tokens": 24,
        "micro_batch": 2,
        "learning_rate": 1e-2,
        "warmup": 2,
        "segment_steps": 3,
        "validation_tokens": 12,
        "seed": 5,
    }
    return RecoverySettings(**(start | changes))


def trainer(given=None, masks=None, *, model=None, dtype=torch.float64, objective=ExactLoss):
    """A trainer of a small model, and the model."""
    model = model or SmallModel()
    model.to(dtype)
    return Trainer(objective(model), trainable_parameters(model), masks or {}, given or settings(), ROWS), model
