"""Recorded responses and the time of a step, as a browser shows them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.orchestrator.run.responses import StepResponses
from rlhf.report.run_record import read_runs
from rlhf.report.write import write_report
from tests.browser import Browser
from tests.unit.report.support import evaluation, group, make_run

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<a href='javascript:alert(1)'>x</a> \u202egnirts desrever\u202c \x1b[31mred\x1b[0m zero\u200bwidth"
)
TIMES = {"time/step": 4.0, "time/wait": 2.0, "time/generate": 1.5, "time/score": 0.3, "time/learn": 1.5}


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    browser.size(1280, 900)
    yield
    assert browser.complaints == []
    assert len([url for url in browser.requests if url.startswith("file://")]) == 1


def open_report(browser: Browser, folder: Path, max_bytes: int = 2**21) -> Path:
    out = folder / "report.html"
    write_report(read_runs([folder]), out, max_response_bytes=max_bytes)
    browser.open(out)
    return out


def texts(browser: Browser, selector: str) -> list[str]:
    found = browser.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    assert isinstance(found, list)
    return [str(one) for one in found]


def choose(browser: Browser, section: str, option: str) -> None:
    browser.js(
        f"(() => {{ const s = document.querySelector('#{section} select');"
        f"s.value = [...s.options].find((o) => o.text === {json.dumps(option)}).value;"
        "s.dispatchEvent(new Event('change')); })()"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    responses = {
        step: StepResponses(
            trained=[group(1, ["worse", f"best of {step}"], [0.25, 0.75], "What?"), group(2, ["c"], [1.0])],
            advantages={"r1-0": -1.0, "r1-1": 1.0},
            evaluated=evaluation([0.5, 1.0]).evaluated if step == 2 else [],
        )
        for step in (1, 2, 3)
    }
    return make_run(tmp_path / "a", [TIMES] * 3, responses=responses)


def test_the_responses_of_a_step_are_shown_best_first(browser: Browser, folder: Path) -> None:
    open_report(browser, folder)
    assert texts(browser, "#responses option") == ["step 1", "step 2", "step 3", "evaluation at step 2"]
    assert texts(browser, "#responses details[open] .response pre") == ["best of 3", "worse"]
    assert texts(browser, "#responses details[open] .response .facts") == [
        "reward 0.75rule 0.375advantage 1ended by stoptokens 2weights of step 0",
        "reward 0.25rule 0.125advantage -1ended by stoptokens 2weights of step 0",
    ]
    assert texts(browser, "#responses details[open] .prompt") == ["What?"]
    assert texts(browser, "#responses details[open] .label") == ["label: b"]
    assert texts(browser, "#responses .groups > details > summary")[0] == "1. What? reward 0.25 to 0.75"


def test_another_step_can_be_chosen(browser: Browser, folder: Path) -> None:
    open_report(browser, folder)
    choose(browser, "responses", "step 1")
    assert texts(browser, "#responses details[open] .response pre")[0] == "best of 1"
    choose(browser, "responses", "evaluation at step 2")
    assert texts(browser, "#responses .groups > details > summary") == ["1. q0 reward 0.5", "2. q1 reward 1"]
    browser.js("document.querySelector('#responses button').click()")
    assert texts(browser, "#responses details[open] .response pre")[0] == "best of 3"
    browser.js("document.querySelectorAll('#responses .groups > details')[1].open = true")
    browser.wait("document.querySelectorAll('#responses .response').length === 3")


def test_a_hostile_response_is_inert_text(browser: Browser, tmp_path: Path) -> None:
    made = group(1, [HOSTILE + "\ud800"], [1.0], HOSTILE)
    made_run = make_run(tmp_path / "a", [TIMES], responses={1: StepResponses(trained=[made])})
    open_report(browser, made_run)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    (shown,) = texts(browser, "#responses .response pre")
    assert "</script><script>document.title='owned'</script><img" in shown
    assert r"\u202egnirts desrever\u202c \x1b[31mred\x1b[0m zero\u200bwidth\ud800" in shown
    assert not set(shown) & {"\u202e", "\u202c", "\x1b", "\u200b"}
    assert browser.js("document.title") == "rlhf report: a"
    assert browser.js("document.querySelectorAll('#main script, #main img, #responses a').length") == 0
    assert browser.js("document.querySelectorAll('#responses .response .escape').length") == 6


def test_the_time_of_a_step_is_a_row_of_bars(browser: Browser, folder: Path) -> None:
    open_report(browser, folder)
    assert texts(browser, "#timeline .track b") == ["trainer", "rollouts"]
    assert texts(browser, "#timeline .bar") == ["wait", "learn", "other", "generate", "score"]
    widths = browser.js(
        "[...document.querySelectorAll('#timeline .bar')]"
        ".map((b) => Math.round(100 * b.getBoundingClientRect().width / b.parentElement.getBoundingClientRect().width))"
    )
    assert isinstance(widths, list)
    for width, share in zip(widths, (50.0, 37.5, 12.5, 37.5, 7.5), strict=True):
        assert float(str(width)) == pytest.approx(share, abs=1.0)


def test_what_is_left_out_is_said(browser: Browser, folder: Path) -> None:
    open_report(browser, folder, max_bytes=0)
    notes = texts(browser, "#responses .faint")
    assert notes[0].startswith("1 of 2 groups are left out; rlhf report ... --steps 3 shows all")


def test_of_five_megabytes_of_responses_one_group_is_built(browser: Browser, tmp_path: Path) -> None:
    """Blocks of other steps are not parsed, and groups that nobody opened have no elements."""
    trained = [group(i, ["word " * 200] * 8, [0.5] * 8, f"prompt {i}") for i in range(64)]
    responses = {step: StepResponses(trained=trained) for step in range(1, 11)}
    made = make_run(tmp_path / "a", [TIMES] * 10, responses=responses)
    page = open_report(browser, made, max_bytes=2**23)
    assert page.stat().st_size > 5 * 2**20
    assert browser.js("document.querySelectorAll('#responses .response').length") == 8
    assert float(str(browser.js("document.querySelectorAll('#main *').length"))) < 1000
    choose(browser, "responses", "step 4")
    assert browser.js("document.querySelectorAll('#responses .response').length") == 8
    browser.js("document.querySelectorAll('#responses .groups > details').forEach((d) => { d.open = true; })")
    browser.wait("document.querySelectorAll('#responses .response').length === 512")


def test_it_fits_a_telephone(browser: Browser, folder: Path) -> None:
    browser.size(390, 844)
    open_report(browser, folder)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert int(str(browser.js("document.documentElement.scrollWidth"))) <= 390


def test_a_run_without_responses_says_so(browser: Browser, tmp_path: Path) -> None:
    open_report(browser, make_run(tmp_path / "a", [{"policy/loss": 1.0}]))
    assert "No responses are recorded" in texts(browser, "#responses")[0]
    assert "No step is finished" in texts(browser, "#timeline")[0]
