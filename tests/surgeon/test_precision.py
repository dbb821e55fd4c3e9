"""TensorFloat-32 is on within passes alone, and never for sums and solves."""

import threading

import torch

from surgeon.choices import Precision
from surgeon.precision import float32_products, only_tf32_here


def precision() -> str:
    return torch.get_float32_matmul_precision()


def test_switches_are_put_back_whatever_happens():
    assert precision() == "highest"
    with float32_products(Precision.TF32):
        assert precision() == "high"
        with float32_products(Precision.FLOAT32):
            assert precision() == "highest"
        assert precision() == "high"
        try:
            with float32_products(Precision.FLOAT32):
                raise KeyError
        except KeyError:
            assert precision() == "high"
    assert precision() == "highest"


def test_a_switch_of_the_whole_process_is_one_threads_at_a_time():
    entered = threading.Event()

    def other():
        with float32_products(Precision.TF32):
            entered.set()

    with only_tf32_here(True):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
        with float32_products(Precision.TF32):
            assert precision() == "high"
        assert precision() == "highest"
    assert entered.wait(10)
    thread.join()
    assert precision() == "highest"
