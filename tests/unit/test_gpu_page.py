"""docs/gpu.md is what the kept results say, and a failed part is shown as one."""

import re
from pathlib import Path

import pytest

from benchmarks.gpu_day.__main__ import PAGE, run_part, what_parts_do
from benchmarks.gpu_day.page import Result, keep, page, read_results
from benchmarks.gpu_day.parts import PARTS, Part
from benchmarks.gpu_day.setting import Figures, Setting


def passed(part: str, value: str) -> Result:
    return Result(part=part, status="passed", figures=[("speed", value)], date="2026-01-02")


def test_the_page_is_that_of_the_kept_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results(), what_parts_do()), (
        "write it with `python -m benchmarks.gpu_day --page`"
    )


def test_what_the_review_names_is_there() -> None:
    """Each finding is fixed by a test that exists, or left with a reason."""
    text = (PAGE.parent / "gpu_review.md").read_text(encoding="utf-8")
    rows = [
        line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "finding" not in line
    ]
    assert len(rows) == 45
    for _finding, answer, shown in rows:
        named = re.findall(r"`((?:rlhf|tests)/[\w/.]+)`", answer + shown)
        assert all((PAGE.parents[1] / path).exists() for path in named), named
        assert named or "left:" in answer or "says so" in answer, answer


def test_every_part_says_what_it_does() -> None:
    described = what_parts_do()
    assert list(described) == list(PARTS)
    assert all(len(text) > 20 for text in described.values())


def test_a_part_that_ran_again_replaces_its_result(tmp_path: Path) -> None:
    kept = tmp_path / "results.json"
    keep("1 x H100", [passed("checksum", "1 GB/s"), passed("training", "2")], kept)
    keep("2 x A100", [passed("checksum", "3 GB/s")], kept)
    text = page(keep("1 x H100", [passed("checksum", "9 GB/s")], kept), what_parts_do())
    assert "| `checksum` | passed | speed: 9 GB/s | 2026-01-02 |" in text
    assert "speed: 3 GB/s" in text
    assert "speed: 1 GB/s" not in text
    assert "Nothing has run" not in text
    assert "Nothing has run" in page({}, what_parts_do())


def fine(_setting: Setting) -> Figures:
    return []


@pytest.mark.parametrize(
    ("part", "note"),
    [
        (Part(run=fine, dry_packages=("no_such_package",)), "no_such_package not installed"),
        (Part(run=fine, packages=("no_such_package",)), ""),
        (Part(run=fine, least_gpus=2), ""),
    ],
)
def test_a_part_that_cannot_run_is_skipped_with_its_reason(tmp_path: Path, part: Part, note: str) -> None:
    assert part.missing(Setting(folder=tmp_path, num_gpus=0, is_dry=True)) == note
    if note:
        result = run_part("checksum", part, Setting(folder=tmp_path, num_gpus=0, is_dry=True))
        assert (result.status, result.note) == ("skipped", note)
    if part.least_gpus > 1:
        assert part.missing(Setting(folder=tmp_path, num_gpus=1, is_dry=False)) == "needs 2 GPUs"


def test_a_part_without_an_end_is_a_failure(tmp_path: Path) -> None:
    part = Part(run=fine, timeout_s=0.01)
    result = run_part("checksum", part, Setting(folder=tmp_path, num_gpus=0, is_dry=True))
    assert (result.status, result.note) == ("failed", "no end after 0.01 s")
