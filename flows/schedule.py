"""How the target is divided between shots."""


def shot_target(fraction: float, number: int, shots: int) -> float:
    """Linear schedule: ``number / shots`` of what is to go.

    Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3.4.
    """
    # Rounded, so that a third of 0.3 is 0.1 and shots of different schedules with equal targets are the same work.
    return round(fraction * number / shots, 12)
