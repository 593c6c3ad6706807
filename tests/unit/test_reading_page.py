"""docs/reading_this_code.md names files that exist, and one PPO step is few enough lines to read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reading_this_code.md").read_text(encoding="utf-8")
STEP = re.findall(r"^\| `(rlhf/\S+\.py)`", PAGE, re.MULTILINE)


def test_one_ppo_step_is_seven_files_and_1500_lines() -> None:
    assert 5 <= len(STEP) <= 7
    assert sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in STEP) <= 1500


@pytest.mark.parametrize(
    "path", sorted(path for path in set(re.findall(r"`((?:rlhf|examples|tests)/[\w/.]+)`", PAGE)) if "NAME" not in path)
)
def test_what_the_page_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "file"), re.findall(r"\| `(rlhf/\S+)` \| `(?:[A-Z]\w+\.)?(\w+)`", PAGE))
def test_what_the_page_points_at_is_defined_there(name: str, file: str) -> None:
    assert re.search(rf"(?:def|class) {file}\b", (ROOT / name).read_text(encoding="utf-8"))
