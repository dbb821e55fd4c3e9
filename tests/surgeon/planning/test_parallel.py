"""Time of work that workers share: what divides by shards, what by blocks, what does not, and the store's limit."""

import pytest

from surgeon.planning import Operation, Rates, Work
from surgeon.planning.parallel import Workers, parallel_seconds

RATES = Rates({**dict.fromkeys(Operation, 10.0), Operation.WRITES: 100.0})
UNIT = RATES.seconds(Work.of(solves=10))


def seconds(kind: str, work: Work, **given: float) -> float:
    settings = {"number": 4, "shards": 4, "blocks": 8, "blocks_per_group": 1, "store_bytes_s": 1e9, **given}
    return parallel_seconds({kind: work}, RATES, Workers(**settings))[kind] / UNIT  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("curvature", 1), ("boundary", 1), ("costs", 1), ("update", 1), ("mask", 4), ("evaluation", 4), ("reduction", 4)],
)
def test_what_is_shared_and_what_is_not(kind: str, expected: float) -> None:
    assert seconds(kind, Work.of(solves=40)) == pytest.approx(expected)


def test_a_worker_with_one_block_more_is_waited_for() -> None:
    assert seconds("costs", Work.of(solves=90), blocks=9) == pytest.approx(3)  # blocks of one unit in three rounds


def test_fewer_shards_than_workers_leave_some_idle() -> None:
    assert seconds("curvature", Work.of(solves=40), shards=2) == pytest.approx(2)


def test_sums_over_shards_go_by_the_blocks_of_a_group() -> None:
    assert seconds("reduction", Work.of(solves=40), blocks_per_group=2) == pytest.approx(2)


def test_the_store_is_shared() -> None:
    work = Work.of(writes=1000)
    assert seconds("costs", work) == pytest.approx(2.5)
    assert seconds("costs", work, store_bytes_s=200) == pytest.approx(5)
    assert seconds("costs", work, store_bytes_s=1) == pytest.approx(10), "one worker is not slowed down by it"


def test_one_worker_takes_what_a_plan_says() -> None:
    work = Work.of(solves=7, writes=30, reads=5, seconds=2)
    alone = {"number": 1, "shards": 1, "blocks": 8, "blocks_per_group": 1, "store_bytes_s": 1e9}
    found = parallel_seconds({"costs": work, "mask": work}, RATES, Workers(**alone))  # type: ignore[arg-type]
    assert list(found.values()) == pytest.approx(2 * [RATES.seconds(work)])
