"""docs/models.md says what becomes of every model type, for the installed transformers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.family_results import sections
from tests.models_page import REFUSED, UNPACKED, WORKS, families, tried

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ZOO, _, RUNS = PAGE.partition("## Runs of some families")
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in ZOO.splitlines() if line.startswith("| ")}
SAMPLE = ["qwen3_moe", "opt", "bert", "musicgen"]
TRIED = families() if os.environ.get("RLHF_TEST_MODELS") else SAMPLE

# Importing DeepSpeed warns, and so does the code of many models.
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_page_lists_every_model_type_of_the_installed_transformers() -> None:
    assert f"of transformers {transformers.__version__}," in PAGE, "run python -m tests.models_page docs/models.md"
    assert sorted(ROWS.keys() - {"model type"}) == families()
    results = [ROWS[family].split(" | ")[1] for family in families()]
    assert set(results) == {WORKS, UNPACKED, REFUSED}
    assert sum(result in (WORKS, UNPACKED) for result in results) >= 100


@pytest.mark.parametrize("family", TRIED)
def test_what_the_page_says_of_a_model_type_is_so(family: str) -> None:
    assert str(tried(family)) == ROWS[family]


def test_the_page_shows_the_runs_that_are_kept() -> None:
    assert bool(sections()) == bool(RUNS)
    assert PAGE.endswith(sections()), "run make models"
