"""The notes of a release, from a changelog and a history made here."""

import subprocess
from pathlib import Path

import pytest

from rlhf import __version__
from scripts.release_notes import (
    ROOT,
    ReleaseError,
    changelog_section,
    check_release,
    commits_by_area,
    main,
    release_notes,
)

CHANGELOG = """\
# Changelog

## 0.2.0 (2026-12-01)

### Added
- A thing.

## 0.1.0 (2026-11-01)

The first.
"""


def git(folder: Path, *arguments: str) -> None:
    author = ("-c", "user.name=Tester", "-c", "user.email=tester@example.com")
    subprocess.run(["git", "-C", str(folder), *author, *arguments], capture_output=True, check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of version 0.1.0, then three of 0.2.0."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "docs: write a changelog")
    git(tmp_path, "tag", "v0.1.0")
    for subject in ("cli: shorten the help", "Rename a thing", "cli: check the config first"):
        git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", subject)
    return tmp_path


def test_a_section_ends_where_the_next_begins() -> None:
    assert changelog_section(CHANGELOG, "0.2.0") == ("0.2.0 (2026-12-01)", "### Added\n- A thing.")
    assert changelog_section(CHANGELOG, "0.1.0") == ("0.1.0 (2026-11-01)", "The first.")
    with pytest.raises(ReleaseError, match=r'no section "## 0\.3\.0"'):
        changelog_section(CHANGELOG, "0.3.0")


def test_commits_are_listed_by_area_and_those_without_one_last() -> None:
    lines = ["1a zoo: add a keeper", "2b Rename a thing", "3c docs, cli: say so", "4d zoo: feed it", "5e Note: a colon"]
    assert commits_by_area(lines) == {
        "docs, cli": ["- say so (3c)"],
        "zoo": ["- add a keeper (1a)", "- feed it (4d)"],
        "other": ["- Rename a thing (2b)", "- Note: a colon (5e)"],
    }
    assert [*commits_by_area(lines)][-1] == "other"


def test_the_notes_hold_the_section_and_the_commits_since_the_last_tag(repository: Path) -> None:
    git(repository, "tag", "v0.2.0")
    notes = release_notes(repository, "0.2.0", "v0.2.0")
    assert notes.startswith(
        "# rlhf 0.2.0 (2026-12-01)\n\n### Added\n- A thing.\n\n## Commits since v0.1.0\n\n### cli\n\n"
    )
    assert [line.rpartition(" (")[0] for line in notes.splitlines() if line.endswith(")")][1:] == [
        "- check the config first",
        "- shorten the help",
        "- Rename a thing",
    ]


def test_the_first_release_lists_every_commit(repository: Path) -> None:
    git(repository, "tag", "--delete", "v0.1.0")
    notes = release_notes(repository, "0.2.0")
    assert "## Commits\n" in notes
    assert "write a changelog" in notes


@pytest.mark.parametrize(
    ("tag", "heading", "text"),
    [
        ("v0.1.0", "0.2.0 (2026-12-01)", "tag v0.1.0 is not v0.2.0"),
        ("0.2.0", "0.2.0 (2026-12-01)", "tag 0.2.0 is not v0.2.0"),
        ("v0.2.0", "0.2.0 (unreleased)", "Put the date of the release"),
    ],
)
def test_what_is_no_release_is_refused(tag: str, heading: str, text: str) -> None:
    with pytest.raises(ReleaseError, match=text):
        check_release(tag, "0.2.0", heading)


def test_a_tag_that_is_not_the_version_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["v0.0.0"]) == 2
    assert f"tag v0.0.0 is not v{__version__}" in capsys.readouterr().err


def test_the_changelog_has_a_section_for_this_version() -> None:
    changelog_section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
