"""docs/gpu.md: what ran on which GPU, when, and with what figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
"""What ran so far, by machine and part: kept in the repository, so that the page can be made again."""
INTRODUCTION = """\
# What has run on a GPU

This page is written by `make gpu-day`, which tries on the GPUs of a machine what a CPU cannot show, part by part, and
measures it. The parts above `tests` need neither Ray nor vLLM. `python -m benchmarks.gpu_day --parts NAME,NAME` runs
some of them, `--dry` all of them with tiny models on a CPU, to test the parts themselves.
"""
NOTHING = """
**Nothing has run on a GPU yet.** The parts below are written, and their dry runs on a CPU are tested every night.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one part: `status` is passed, failed or skipped."""

    part: str
    status: str
    figures: Sequence[tuple[str, str]]
    note: str = ""
    """Why it failed or was skipped."""
    seconds: float = 0.0
    date: str = ""


def read_results(path: Path = RESULTS) -> dict[str, list[Result]]:
    """The kept results of each machine."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {machine: [Result(**result) for result in results] for machine, results in kept.items()}


def keep(machine: str, results: Sequence[Result], path: Path = RESULTS) -> dict[str, list[Result]]:
    """Add results of a machine; a part that ran before is replaced."""
    kept = read_results(path)
    new = {result.part: result for result in results}
    old = [result for result in kept.get(machine, []) if result.part not in new]
    kept[machine] = [*old, *results]
    plain = {name: [asdict(result) for result in of_machine] for name, of_machine in kept.items()}
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return kept


def page(kept: Mapping[str, Sequence[Result]], parts: Mapping[str, str]) -> str:
    """The page; `parts` are all parts with what each does."""
    text = INTRODUCTION
    for machine, results in kept.items():
        by_part = {result.part: result for result in results}
        text += f"\n## {machine}\n\n| part | result | figures | date |\n|---|---|---|---|\n"
        for name in parts:
            if name in by_part:
                text += _row(by_part[name])
    if not kept:
        text += NOTHING
    text += "\n## The parts\n\n| part | what it does |\n|---|---|\n"
    return text + "".join(f"| `{name}` | {what} |\n" for name, what in parts.items())


def _row(result: Result) -> str:
    figures = "; ".join(f"{name}: {value}" for name, value in result.figures) or result.note
    return f"| `{result.part}` | {result.status} | {figures.replace('|', '/')} | {result.date} |\n"
