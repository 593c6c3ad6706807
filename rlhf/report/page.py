"""One HTML file that shows runs: it holds all that it needs, asks no server for anything, and can be mailed.

What a model wrote is data here. It is stored as JSON in blocks that no browser runs, and shown as text. Should any of
it come to stand in the page as markup all the same, the page's content security policy keeps it from running: only the
page's own scripts are allowed, by their hashes, and nothing may be loaded.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from rlhf.types import Json

SCRIPTS = ("text.js", "charts.js", "responses.js", "page.js")
STYLES = ("uPlot.min.css", "page.css")
ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""Characters that could end a block of JSON in HTML, as JSON writes them otherwise."""


def render(title: str, data: Mapping[str, Json], responses: Sequence[Mapping[str, Json]] = ()) -> str:
    """The page. `responses` are blocks that are read only when they are shown, each with `run`, `kind` and `step`."""
    script = "\n".join([_with_license(), *(_file(name) for name in SCRIPTS)])
    style = "\n".join(_file(name) for name in STYLES)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html.jinja")).render(
        title=title,
        policy=(
            f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
            "form-action 'none'"
        ),
        style=style,
        script=script,
        data=as_block(data),
        responses=[(block["run"], block["kind"], block["step"], as_block(block)) for block in responses],
    )


def as_block(value: Mapping[str, Json]) -> str:
    """JSON that can stand inside a script element: it holds no `<`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPED)
    # A half of a surrogate pair cannot be written as UTF-8. JSON can name it.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _with_license() -> str:
    """uPlot, under the license that it comes with."""
    return f"/*!\n{_file('uPlot.LICENSE')}*/\n{_file('uPlot.iife.min.js')}"


def _file(name: str) -> str:
    return (files("rlhf.report") / "page" / name).read_text(encoding="utf-8")
