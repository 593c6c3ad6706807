"""Writes the notes of a release: `python -m scripts.release_notes [TAG]`.

Prints the section of CHANGELOG.md for `rlhf.__version__`, then the commits since the last version tag, by the area that
their subjects begin with. With a tag it refuses to write notes for anything but a release: the tag must be the version
with a v before it, and the changelog must give the version a date.
"""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf import __version__

ROOT = Path(__file__).parents[1]
AREA = re.compile(r"([a-z][\w/, -]{0,30}): (.+)")
"""A subject: its area, then what changes."""
OTHER = "other"
UNRELEASED = "(unreleased)"


class ReleaseError(Exception):
    """The state of the repository is not that of a release. Says what to change."""


def changelog_section(changelog: str, version: str) -> tuple[str, str]:
    """The heading of a version, and what stands under it.

    Raises:
        ReleaseError: the changelog has no such version.
    """
    sections = re.split(r"^## +", changelog, flags=re.MULTILINE)[1:]
    for section in sections:
        heading, _, text = section.partition("\n")
        if heading.split()[0].strip("[]") == version:
            return heading.strip(), text.strip()
    raise ReleaseError(f'CHANGELOG.md has no section "## {version}". Add one that says what changed.')


def check_release(tag: str, version: str, heading: str) -> None:
    """Raises ReleaseError where the tag is not the version's, or the changelog calls the version unreleased."""
    if tag != f"v{version}":
        raise ReleaseError(f"tag {tag} is not v{version}, the version in rlhf/__init__.py. Change one of them.")
    if UNRELEASED in heading:
        raise ReleaseError(f'CHANGELOG.md says "## {heading}". Put the date of the release in place of {UNRELEASED}.')


def commits_by_area(lines: Iterable[str]) -> dict[str, list[str]]:
    """`HASH SUBJECT` lines as list items under their areas, sorted by area; those without one come last."""
    areas: defaultdict[str, list[str]] = defaultdict(list)
    for line in lines:
        commit, _, subject = line.partition(" ")
        found = AREA.fullmatch(subject)
        area, what = (found[1], found[2]) if found else (OTHER, subject)
        areas[area].append(f"- {what} ({commit})")
    return {area: areas[area] for area in sorted(areas, key=lambda area: (area == OTHER, area))}


def git(*arguments: str, folder: Path) -> str:
    """What a git command prints. Raises CalledProcessError where it fails."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def last_tag(folder: Path, tag: str | None) -> str | None:
    """The newest version tag before HEAD, other than `tag`. None before the first release."""
    tags = git("tag", "--list", "v*", "--merged", "HEAD", "--sort=-creatordate", folder=folder).split()
    return next((found for found in tags if found != tag), None)


def release_notes(folder: Path, version: str, tag: str | None = None) -> str:
    """The notes in Markdown.

    Raises:
        ReleaseError: a tag is given and this is not its release, or the changelog lacks the version.
    """
    heading, text = changelog_section((folder / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if tag is not None:
        check_release(tag, version, heading)
    since = last_tag(folder, tag)
    span = "HEAD" if since is None else f"{since}..HEAD"
    areas = commits_by_area(git("log", "--no-merges", "--format=%h %s", span, folder=folder).splitlines())
    commits = "\n\n".join("\n".join([f"### {area}", "", *items]) for area, items in areas.items())
    return f"# rlhf {heading}\n\n{text}\n\n## Commits{f' since {since}' if since else ''}\n\n{commits}\n"


def main(arguments: Sequence[str]) -> int:
    """Print the notes, or say why there are none and return 2."""
    if len(arguments) > 1:
        sys.stderr.write("Usage: python -m scripts.release_notes [TAG]\n")
        return 2
    try:
        sys.stdout.write(release_notes(ROOT, __version__, *arguments))
    except ReleaseError as error:
        sys.stderr.write(f"release: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
