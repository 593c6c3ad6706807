"""What README and docs say about methods is what runs."""

import re
from pathlib import Path

import pytest

from rlhf.algorithms import algorithm_class
from rlhf.cli.pages.algorithms import kinds_of, page
from rlhf.config.commands import METHODS
from rlhf.config.fields import sections_in, variant_of

ROOT = Path(__file__).parents[4]


def shown() -> dict[str, set[str]]:
    """The README's rows: a command as it is typed -> the names in its row's last cell."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| learns from |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[1].strip("`"): set(re.findall(r"`([^`]+)`", row[2])) for row in rows}


def test_the_readme_names_every_method_and_no_other() -> None:
    rows = shown()
    typed = {"online-kto": "kto --online", "grpo": "grpo --algo NAME", "online-dpo": "online-dpo --algo NAME"}
    typed["dpo"] = "dpo --loss NAME"
    assert set(rows) == {*(f"rlhf train {typed.get(name, name)}" for name in METHODS), "--algo custom"}
    for command in ("grpo", "online-dpo"):
        assert rows[f"rlhf train {typed[command]}"] == {variant_of(kind) for kind in kinds_of(command)}
    (dpo,) = kinds_of("dpo")
    losses = sections_in(dpo.model_fields["loss"].annotation)
    assert rows["rlhf train dpo --loss NAME"] == {variant_of(loss) for loss in losses}


@pytest.mark.parametrize("command", METHODS)
def test_every_kind_of_algorithm_can_be_built(command: str) -> None:
    for kind in kinds_of(command):
        assert callable(algorithm_class(variant_of(kind)))


def test_the_page_of_algorithms_is_current() -> None:
    """Run `python -m rlhf.cli.pages.algorithms docs/algorithms.md` after changing an algorithm."""
    assert (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8") == page()
