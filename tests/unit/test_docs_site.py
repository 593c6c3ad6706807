"""The documentation site's navigation: every page, once. `make docs` checks the links."""

from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import TypeAdapter

ROOT = Path(__file__).parents[2]


def pages_in(navigation: object) -> Iterator[str]:
    """The pages of a navigation: a list of titles with a page, or with a list of the same kind."""
    for entry in TypeAdapter(list[dict[str, object]]).validate_python(navigation):
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from pages_in(target)


def test_every_page_is_in_the_navigation_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    folder = ROOT / "docs"
    pages = sorted(str(page.relative_to(folder)) for page in folder.rglob("*.md"))
    assert sorted(pages_in(site["nav"])) == pages


def test_a_page_of_a_nested_section_is_found() -> None:
    assert [*pages_in([{"A": "a.md"}, {"B": [{"C": "c.md"}, {"D": [{"E": "d/e.md"}]}]}])] == ["a.md", "c.md", "d/e.md"]


def test_the_build_fails_on_what_it_warns_of() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {kind for rules in site["validation"].values() for kind in rules.values()} == {"warn"}
    assert "--strict" in (ROOT / "scripts" / "docs.sh").read_text(encoding="utf-8")
