"""Bytes of training from shapes."""

from surgeon.recovery.memory import TrainingMemory

BLOCKS = [[(8, 4), (4, 8)], [(8, 4)]]


def memory(**changes):
    start = {"n_parameters": 100, "n_trained": 40, "n_vocabulary": 11, "micro_tokens": 6, "n_teacher": 0}
    return TrainingMemory.of(BLOCKS, **(start | changes))


def test_parts():
    found = memory()
    assert (found.weights, found.gradients, found.moments, found.teacher) == (400, 160, 320, 0)
    assert found.logits == 4 * 6 * 11 * 4
    assert found.activations == 2 * 6 * (12 + 12 + 12) * 4
    assert found.total_gib == sum(found.to_json().values())
    assert memory(n_teacher=200).teacher == 800 + 3 * 6 * 11 * 4
