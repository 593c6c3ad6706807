"""The file of a report, without a browser: it holds all that it needs, and text stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.errors import CheckpointError, ConfigError
from rlhf.report.page import as_block
from rlhf.report.run_record import read_runs
from rlhf.report.write import write_report
from rlhf.types import Json
from tests.unit.report.support import make_run

HOSTILE = "</script><script>alert(1)</script><!--\u2028\u202e]]>&lt;"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.texts.append((self.tags[-1][0], data))


def page_of(folder: Path, **how: Json) -> str:
    out = folder / "report.html"
    write_report(read_runs([folder]), out)
    return out.read_text(encoding="utf-8")


def test_nothing_is_loaded_and_only_own_scripts_may_run(tmp_path: Path) -> None:
    page = Elements(page_of(make_run(tmp_path / "a", [{"policy/loss": 1.0}])))
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "style", "onload", "onclick"}
    assert [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object")] == []
    (policy,) = [tag[1]["content"] for tag in page.tags if tag[1].get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in page.texts
        if text.strip()
    }
    assert f"script-src 'sha256-{hashes['script']}'" in policy
    assert f"style-src 'sha256-{hashes['style']}'" in policy


def test_the_license_of_the_chart_library_comes_with_it(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", []))
    assert "The MIT License" in page
    assert "Leon Sorokin" in page
    assert len(page) < 120_000


def test_a_block_of_data_cannot_end_its_element() -> None:
    value: dict[str, Json] = {"text": HOSTILE + "\ud800"}
    block = as_block(value)
    assert not set(block) & set("<>&\u2028\u2029\ud800")
    assert json.loads(block) == value


def test_names_and_texts_of_a_run_are_no_markup(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    folder = make_run(
        tmp_path / name, [{HOSTILE: 1.0}], error=HOSTILE, config=f"run: {{name: {json.dumps(HOSTILE)}}}\n"
    )
    page = Elements(page_of(folder))
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [attributes.get("type") for attributes in scripts] == ["application/json", None]
    assert "img" not in {tag for tag, _ in page.tags}


def test_a_report_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a", [])])
    out = tmp_path / "page.html"
    write_report(runs, out)
    write_report(runs, out)
    for path, text in (
        (tmp_path / "a" / "config.yaml", "exists and is not a report"),
        (tmp_path, "is a folder. Name a file"),
        (tmp_path / "b" / "page.html", "is not a folder. Make it first"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            write_report(runs, path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_report(runs, Path("/proc/report.html"))
