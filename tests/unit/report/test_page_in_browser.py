"""The page of a report as a browser shows it: charts, colors, sizes; no request, no complaint."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.orchestrator.run.files import append_json
from rlhf.report.run_record import read_runs
from rlhf.report.write import write_report
from tests.browser import Browser
from tests.unit.report.support import make_run

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202eabc\x1b[31m"


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    """Whatever a test does with a page: nothing but its file is asked for, and nothing reaches the console."""
    browser.size(1280, 900)
    yield
    assert browser.complaints == []
    assert all(url.startswith(("file://", "about:blank")) for url in browser.requests)
    assert len([url for url in browser.requests if url.startswith("file://")]) == 1


def report_on(*folders: Path) -> Path:
    out = folders[0] / "report.html"
    write_report(read_runs(folders), out)
    return out


def rows(num_steps: int, gain: float = 0.0) -> list[dict[str, float]]:
    return [
        {
            "reward/mean_all": gain + math.tanh(3 * step / num_steps) + 0.05 * math.sin(step),
            "kl/ref_per_response": step / num_steps,
            **{f"memory/part_{i}": float(i) for i in range(5)},
        }
        for step in range(1, num_steps + 1)
    ]


def scroll_to(browser: Browser, selector: str) -> None:
    browser.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView()")


def colors_of_chart(browser: Browser) -> int:
    """How many colors the first chart has: 1 means that nothing was drawn."""
    return int(
        str(
            browser.js(
                "(() => { const c = document.querySelector('.chart canvas');"
                "const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
                "return new Set(d).size; })()"
            )
        )
    )


def test_the_verdict_comes_first_and_charts_are_drawn_when_seen(browser: Browser, tmp_path: Path) -> None:
    browser.open(report_on(make_run(tmp_path / "a", rows(60))))
    assert str(browser.js("document.querySelector('.verdict').textContent")).startswith("Done: step 60 of 60. reward")
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length === 2")
    assert colors_of_chart(browser) > 10
    browser.js("document.querySelector('.metrics-group').open = true")
    scroll_to(browser, ".metrics-group")
    browser.wait("document.querySelectorAll('.chart canvas').length === 7")


def test_smoothing_and_the_filter_change_the_charts(browser: Browser, tmp_path: Path) -> None:
    browser.open(report_on(make_run(tmp_path / "a", rows(60))))
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length === 2")
    legend = "document.querySelector('.chart .u-legend').textContent"
    assert "smoothed" in str(browser.js(legend))
    browser.js(
        "(() => { const s = document.querySelector('#smoothing'); s.value = '0';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert "smoothed" not in str(browser.js(legend))
    browser.js(
        "(() => { const s = document.querySelector('#filter'); s.value = 'kl';s.dispatchEvent(new Event('input')); })()"
    )
    assert browser.js("[...document.querySelectorAll('.chart')].filter((c) => !c.hidden).length") == 1
    browser.js("document.querySelector('#log').click()")
    assert colors_of_chart(browser) > 1


def test_several_runs_share_a_chart_and_show_what_differs(browser: Browser, tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, rows(num_steps, gain), config=f"algo: {{kl: {{coef: {gain}}}}}\n")
        for name, num_steps, gain in (("first", 40, 0.0), ("second", 60, 0.5))
    ]
    browser.open(report_on(*folders))
    assert str(browser.js("document.querySelector('.result').textContent")).startswith("second is ahead")
    assert browser.js("document.querySelector('#settings tbody').textContent") == "algo.kl.coef00.5"
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length === 2")
    shown = browser.js(
        "[...document.querySelectorAll('.chart')[0].querySelectorAll('.u-series:not(.unlisted) .u-label')]"
        ".map((e) => e.textContent)"
    )
    assert shown == ["step", "first", "second"]


def test_an_event_is_a_mark_whose_text_is_under_the_pointer(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rows(60))
    append_json(folder / "events.jsonl", {"kind": "warning", "text": "all advantages were 0", "step": 30, "time": 1.0})
    browser.open(report_on(folder))
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length === 2")
    box = browser.js(
        "(() => { const b = document.querySelector('.chart .u-over').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    assert isinstance(box, list)
    left, top, width, height = (float(str(one)) for one in box)
    # Steps 1 to 60 are spread over the whole width.
    for x in (left + 5, left + width * 29 / 59):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=top + height / 2)
    browser.wait("document.querySelector('.chart .note').textContent === 'step 30, warning: all advantages were 0'")
    assert "all advantages were 0" in str(browser.js("document.querySelector('.verdict.wrong').textContent"))
    assert "all advantages were 0" in str(browser.js("document.querySelector('#events tbody').textContent"))


def test_what_a_run_wrote_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>a", [{HOSTILE: 1.0}], config=f"a: {json.dumps(HOSTILE)}\n", error=HOSTILE)
    append_json(folder / "events.jsonl", {"kind": HOSTILE, "text": HOSTILE, "step": 1})
    browser.open(report_on(folder))
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.wait("document.querySelectorAll('.chart canvas').length === 1 || (scrollTo(0, 1e6), false)")
    assert browser.js("document.title") == "rlhf report: <b>a"
    assert browser.js("document.querySelectorAll('#main script, #main img, #main b').length") == 0
    text = str(browser.js("document.querySelector('#events tbody').textContent"))
    assert "<script>document.title='owned'</script>" in text
    assert r"\u202eabc\x1b[31m" in text
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_markup_that_came_into_the_page_would_not_run(browser: Browser, tmp_path: Path) -> None:
    """The second wall: even so, the content security policy stops it."""
    browser.open(report_on(make_run(tmp_path / "a", [])))
    browser.js(
        "(() => { const s = document.createElement('script'); s.textContent = \"document.title='owned'\";"
        "document.body.append(s); document.body.insertAdjacentHTML('beforeend', "
        '"<img src=x onerror=\\"document.title=\'owned\'\\">"); })()'
    )
    browser.js("new Promise((done) => setTimeout(done, 200))")
    assert browser.js("document.title") == "rlhf report: a"
    assert len(browser.complaints) >= 2
    assert all("Content Security Policy" in complaint for complaint in browser.complaints)
    browser.events.clear()
    browser.open(report_on(tmp_path / "a"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_telephone_and_follows_the_color_scheme(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    folders = [make_run(tmp_path / f"{name}{'long_name_' * 8}", rows(30)) for name in "ab"]
    browser.size(width, 844, dark=dark)
    browser.open(report_on(*folders))
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length > 0")
    assert int(str(browser.js("document.documentElement.scrollWidth"))) <= width
    (red, *_) = json.loads(
        str(browser.js("getComputedStyle(document.body).backgroundColor")).replace("rgb(", "[").replace(")", "]")
    )
    assert (red < 60) == dark


def test_charts_change_their_colors_with_the_scheme(browser: Browser, tmp_path: Path) -> None:
    browser.open(report_on(make_run(tmp_path / "a", rows(60))))
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length === 2")
    picture = "document.querySelector('.chart canvas').toDataURL()"
    light = browser.js(picture)
    browser.size(1280, 900, dark=True)
    browser.wait(f"{picture} !== {json.dumps(light)}")


def test_of_ten_thousand_steps_a_thousand_points_and_charts_in_view_are_drawn(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [])
    with (folder / "metrics.jsonl").open("w") as file:
        for step, row in enumerate(rows(10_000), 1):
            more = {f"policy/part_{i}": math.sin(step * (i + 1) / 1000) for i in range(50)}
            file.write(json.dumps({"step": step, **row, **more}) + "\n")
    page = report_on(folder)
    assert page.stat().st_size < 3 * 2**20
    browser.open(page)
    lengths = browser.js("data.curves.steps.map((steps) => steps.length)")
    assert lengths == [1000]
    assert float(str(browser.js("document.querySelectorAll('#main *').length"))) < 1000
    scroll_to(browser, "#metrics")
    browser.wait("document.querySelectorAll('.chart canvas').length === 2")
    assert browser.js("document.querySelectorAll('.chart').length") == 2


def test_a_run_without_a_step_has_a_page(browser: Browser, tmp_path: Path) -> None:
    browser.open(report_on(make_run(tmp_path / "a", [])))
    assert "No step is finished" in str(browser.js("document.querySelector('#metrics').textContent"))
