"""What must hold on a GPU, on one; where there is none, what can be tried of it on the CPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks import CHECKS

NO_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all checks: the models and texts are the same."""
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str, folder: Path) -> None:
    CHECKS[name](folder, "cuda")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_themselves_on_the_cpu(name: str, folder: Path) -> None:
    """With the CPU for the GPU, so that a check that cannot pass or says nothing is found before there is a GPU."""
    figures = CHECKS[name](folder, "cpu")
    assert figures


@pytest.mark.usefixtures("one_thread")
def test_bfloat16_is_near_float32(folder: Path) -> None:
    """Of factors, of the order of costs, and of perplexity."""
    figures = CHECKS["precision"](folder, "cpu")
    assert figures["bfloat16: rank correlation of costs"] > 0.9
