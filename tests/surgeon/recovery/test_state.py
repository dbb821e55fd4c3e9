"""Going on from a state gives the same bits, in the same process and after one that was killed."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from surgeon.recovery.state import TrainingState
from tests.surgeon.recovery.small import SmallModel, settings, trainer

GIVEN = settings(tokens=24 * 12)


def bits(state):
    return {name: array.tobytes() for name, array in state.to_arrays().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_is_uninterrupted_to_the_bit(dtype):
    whole, _ = trainer(GIVEN, dtype=dtype)
    losses = whole.run(12)
    first, _ = trainer(GIVEN, dtype=dtype)
    begun = first.run(5)
    arrays = first.state().to_arrays()
    assert arrays["parameter/linear.weight"].dtype == np.dtype(str(dtype).removeprefix("torch."))
    second, _ = trainer(GIVEN, model=SmallModel(seed=9), dtype=dtype)
    second.restore(TrainingState.from_arrays(arrays))
    assert begun + second.run(7) == losses
    assert bits(second.state()) == bits(whole.state())


def test_a_state_is_a_copy():
    made, _ = trainer(GIVEN)
    made.run(1)
    state = made.state()
    before = bits(state)
    made.run(1)
    assert bits(state) == before


def test_without_moments_a_state_is_a_third_and_only_says_what_the_weights_are():
    made, _ = trainer(GIVEN)
    assert not made.state().can_go_on
    made.run(1)
    full, light = made.state(), made.state(moments=False)
    assert full.can_go_on
    assert not light.can_go_on
    assert len(light.to_arrays()) == len(light.parameters) + 1
    assert len(full.to_arrays()) == 3 * len(light.parameters) + 1
    assert light.parameters.keys() == full.parameters.keys()


def test_a_state_of_another_model_is_refused():
    made, _ = trainer(GIVEN)
    other, _ = trainer(GIVEN, model=SmallModel(width=4))
    with pytest.raises(ValueError, match=r"the state is not one of these parameters; they differ in embedding\.weight"):
        other.restore(made.state())


SCRIPT = """
    import sys
    from pathlib import Path

    import numpy as np
    import torch

    from surgeon.recovery.state import TrainingState
    from tests.surgeon.recovery.small import settings, trainer

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    made, _ = trainer(settings(tokens=24 * 12), dtype=torch.float32)
    done = sorted(folder.glob("*.npz"))
    if done:
        with np.load(done[-1], allow_pickle=False) as arrays:
            made.restore(TrainingState.from_arrays(dict(arrays)))
    while made.step < 12:
        losses = [loss.loss for loss in made.run(1)]
        print(made.step - 1, repr(losses[0]), flush=True)
        if made.step % 3 == 0:
            made_ = made.state().to_arrays()
            np.savez(folder / f"{made.step:02d}.part.npz", **made_)
            (folder / f"{made.step:02d}.part.npz").rename(folder / f"{made.step:02d}.npz")
        if len(sys.argv) > 2 and made.step == int(sys.argv[2]):
            print("waiting", flush=True)
            sys.stdin.read()
"""


def test_killed_and_started_again_gives_the_same_losses(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "."])}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]

    def run(folder, *more):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*command, str(folder), *more],
            cwd=Path(__file__).parents[3],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with run(tmp_path / "whole") as whole:
        expected = whole.communicate(timeout=120)[0].splitlines()
    assert len(expected) == 12
    with run(tmp_path / "killed", "8") as killed:
        seen = []
        while (line := killed.stdout.readline().strip()) != "waiting":
            assert line, "the process ended by itself"
            seen.append(line)
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert seen == expected[:8]
    with run(tmp_path / "killed") as again:
        rest = again.communicate(timeout=120)[0].splitlines()
    assert rest == expected[6:]  # steps 6 and 7 are done again: the last state is that after step 5
    first, second = (np.load(tmp_path / name / "12.npz", allow_pickle=False) for name in ("whole", "killed"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first.files)
