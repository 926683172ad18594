"""The version formula says what counting the steps of 1F1B says."""

import pytest
from order import versions

from lightning_lwpm.pipeline.asynchronous.delay import Delay


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("m", range(1, 10))
def test_formula_is_what_counting_says(p, m):
    for k in range(p):
        delay, total = Delay(k, p, m), 8 * m
        for (kind, i), version in versions(k, p, m, total).items():
            formula = delay.forward_version(i) if kind == "F" else delay.backward_version(i)
            assert version == formula, (kind, i)


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("m", range(1, 10))
def test_mean_and_most_in_the_steady_state(p, m):
    for k in range(p):
        delay = Delay(k, p, m)
        start = m * (p + 1)
        crossed = [delay.crossed(i) for i in range(start, start + m)]
        assert sum(crossed) == pytest.approx(delay.mean * m)
        assert max(crossed) == delay.most
        assert all(delay.crossed(i) <= delay.most for i in range(start))


def test_a_bound_of_one_step_from_as_many_microbatches_as_stages_ahead():
    for p in range(2, 9):
        assert all(Delay(k, p, p - 1).most <= 1 for k in range(p))
        assert Delay(0, p, 1).most == p - 1
