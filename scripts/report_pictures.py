"""Pictures of a run's report for the documentation, by a headless Chromium.

python -m scripts.report_pictures runs/grpo/report.html docs/pictures
"""

import sys
import tempfile
from pathlib import Path

from tests.browser import Browser, find_browser

WIDTH, HEIGHT = 1100, 720
PICTURES = (("summary", False), ("timeline", True))
"""Sections that a picture begins with, and whether it is in dark mode."""


def main() -> int:
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    program = find_browser()
    if program is None:
        sys.exit("report_pictures: no Chromium is installed")
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        browser.open(page.resolve())
        for name, dark in PICTURES:
            browser.size(WIDTH, HEIGHT, dark=dark)
            browser.js(f"document.getElementById({name!r}).scrollIntoView()")
            browser.wait(f"document.getElementById({name!r}).getBoundingClientRect().top < {HEIGHT}")
            browser.js("new Promise(done => setTimeout(done, 500))")  # charts are drawn when they come into view
            browser.screenshot(folder / f"report_{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
