"""How fast the page of a report opens: 10,000 steps of 60 metrics, and 5 MiB of responses.

    python -m benchmarks.report_page

Needs Chromium. Prints the milliseconds from opening the file to the first paint, the best of five.
"""

import json
import math
import tempfile
from pathlib import Path

from rlhf.orchestrator.run.files import write_rows
from rlhf.report.run_record import read_runs
from rlhf.report.write import write_report
from rlhf.types import Json
from tests.browser import Browser, open_browser

REPEATS = 5


def make_run(folder: Path, num_steps: int, num_recorded: int) -> Path:
    """The folder of a run with 60 metrics, of which the last steps have 512 responses of 1,000 characters each."""
    names = [f"policy/part_{number}" for number in range(60)]
    metrics: list[dict[str, Json]] = [
        {"step": step, **{name: math.sin(step * place / 1000) for place, name in enumerate(names, 1)}}
        for step in range(1, num_steps + 1)
    ]
    write_rows(folder / "metrics.jsonl", metrics)
    for step in range(num_steps - num_recorded + 1, num_steps + 1):
        responses: list[dict[str, Json]] = [
            {"group": place // 8, "prompt": f"prompt {place // 8}", "response": "word " * 200, "reward": place / 512}
            for place in range(512)
        ]
        write_rows(folder / f"rollouts/step_{step:06d}.jsonl", responses)
    (folder / "config.yaml").write_text("{}\n", encoding="utf-8")
    status = {"status": "done", "step": num_steps, "num_steps": num_steps}
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return folder


def first_paint_ms(browser: Browser, page: Path) -> float:
    """Milliseconds from opening a page until it shows something."""
    browser.open(page)
    entry = "performance.getEntriesByName('first-contentful-paint')[0]"
    browser.wait(entry)
    return float(str(browser.js(f"{entry}.startTime")))


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as made, open_browser(Path(made, "profile")) as browser:
        browser.size(1280, 900)
        for name, num_steps, num_recorded in (("steps", 10_000, 0), ("responses", 10, 10)):
            folder = make_run(Path(made, name), num_steps, num_recorded)
            page = folder / "report.html"
            write_report(read_runs([folder]), page, max_response_bytes=2**23)
            best = min(first_paint_ms(browser, page) for _ in range(REPEATS))
            print(f"{name}: {page.stat().st_size / 2**20:.1f} MiB, first paint after {best:.0f} ms")


if __name__ == "__main__":
    main()
