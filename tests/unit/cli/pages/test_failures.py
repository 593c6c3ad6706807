"""The guide to failures says what the error classes say."""

from pathlib import Path

from rlhf.cli.help import main_help
from rlhf.cli.pages.failures import table, written
from rlhf.errors import RlhfError, WeightSyncError, error_classes

PAGE = Path(__file__).parents[4] / "docs" / "failures.md"


def test_the_table_of_exit_codes_is_current() -> None:
    """Run `python -m rlhf.cli.pages.failures docs/failures.md` after changing an error class."""
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page
    assert table() in page


def test_every_class_says_what_it_means_and_what_to_do() -> None:
    classes = error_classes()
    assert len({kind.meaning for kind in classes}) == len(classes) > 9
    assert all(kind.meaning and kind.advice.endswith(".") for kind in classes)
    assert {RlhfError, WeightSyncError} <= set(classes)


def test_the_help_names_every_code() -> None:
    for kind in error_classes():
        assert f" {kind.exit_code} " in main_help().replace("\n", " "), kind
