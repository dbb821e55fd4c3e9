import sys

import pytest

from surgeon.peak import peak_gib, process_peak_gib, reset_peak


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its high-water mark")
def test_peak_since_reset() -> None:
    gib = 2**30
    reset_peak()  # returns what earlier tests have freed
    block = bytearray(gib // 2)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    before = peak_gib()
    del block
    reset_peak()
    after = peak_gib()
    assert before - after == pytest.approx(0.5, abs=0.1)
    assert process_peak_gib() > before - 0.01  # the kernel counts in batches
    again = bytearray(gib // 4)
    again[:: 2**12] = b"x" * len(again[:: 2**12])
    assert peak_gib() - after == pytest.approx(0.25, abs=0.1)
    del again
    assert peak_gib() - after == pytest.approx(0.25, abs=0.1)
