"""The benchmark of the driver runs the loop as it is."""

import pytest

from benchmarks.driver import ALGORITHMS, HEADINGS, Case, measure, row


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_small_step_is_measured_in_all_its_phases(algorithm: str) -> None:
    case = Case(algorithm=algorithm, responses=16, tokens=24)
    figures = measure(case)
    assert all(seconds > 0 for seconds in figures.cpu_s.values())
    assert figures.engines_s > 0
    # A step of 16 responses: 12 tokens or more each, of 12 bytes, and 128 of a prompt, of 17 or more.
    assert figures.array_bytes > 16 * (12 * 12 + 17 * (128 + 12))
    assert len(row(case, figures)) == len(HEADINGS)
