"""The learning rate of each step: it rises linearly, then falls along a cosine to a part of the peak.

Reference:
    Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts; Jha et al. 2023, *Just CHOP*, appendix.
"""

import math

from surgeon.recovery.settings import RecoverySettings


def rate_at(settings: RecoverySettings, step: int) -> float:
    """The learning rate of a step.

    Args:
        settings: peak, warm-up, floor and number of steps.
        step: from 0. The first after the warm-up has the peak; the last has the floor.
    """
    peak, warmup = settings.learning_rate, settings.warmup
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    n_falling = settings.steps - 1 - warmup
    done = (step - warmup) / n_falling if n_falling > 0 else 0.0
    return peak * (settings.floor + (1.0 - settings.floor) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))
