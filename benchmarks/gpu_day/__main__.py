"""The first hour on a machine with GPUs: `make gpu-day`.

    python -m benchmarks.gpu_day                          # every part, then docs/gpu.md
    python -m benchmarks.gpu_day --parts checksum,training
    python -m benchmarks.gpu_day --dry                    # tiny models on a CPU; writes no page

Each part runs in a process of its own with a deadline, so that one that fails or hangs takes no other with it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_day.page import Result, keep, page, read_results
from benchmarks.gpu_day.parts import PARTS, Part
from benchmarks.gpu_day.setting import Setting
from rlhf.launch.local_gpus import usable_gpus

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def what_parts_do() -> dict[str, str]:
    """Each part's docstring, on one line."""
    described = {name: getattr(part.run, "func", part.run) for name, part in PARTS.items()}
    return {name: " ".join((run.__doc__ or "").split()).replace("NAME", name) for name, run in described.items()}


def run_part(name: str, part: Part, setting: Setting) -> Result:
    """Run one part in its own process."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    if reason := part.missing(setting):
        return Result(part=name, status="skipped", figures=(), note=reason, date=date)
    result = setting.folder / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--one", name, "--folder", str(setting.folder)]
    command += ["--dry"] if setting.is_dry else []
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=part.timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Result(part=name, status="failed", figures=(), note=f"no end after {part.timeout_s:g} s", date=date)
    seconds = time.monotonic() - start
    (setting.folder / f"{name}.log").write_text(output)
    if not result.exists():
        last = (output.strip().splitlines() or ["no output"])[-1]
        return Result(part=name, status="failed", figures=(), note=f"ended: {last}", seconds=seconds, date=date)
    said = json.loads(result.read_text())
    return Result(part=name, seconds=seconds, date=date, **said)


def one(name: str, setting: Setting) -> None:
    """In the part's own process: write what became of it."""
    try:
        figures = PARTS[name].run(setting)
        said = {"status": "passed", "figures": list(figures), "note": ""}
    except Exception as error:
        traceback.print_exc()
        said = {"status": "failed", "figures": [], "note": f"{type(error).__name__}: {error}"}
    (setting.folder / f"{name}.json").write_text(json.dumps(said))


def show(results: Sequence[Result], machine: str) -> None:
    """Print the table."""
    table = Table(title=machine)
    for heading in ("part", "result", "seconds", "figures"):
        table.add_column(heading)
    for result in results:
        figures = "\n".join(f"{name}: {value}" for name, value in result.figures) or result.note
        table.add_row(result.part, result.status, f"{result.seconds:.0f}", figures)
    Console(width=140).print(table, markup=False)


def main() -> int:
    """Returns 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--folder", type=Path, help="where models and logs are kept; default: a temporary folder")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="write docs/gpu.md again from the kept results")
    args = parser.parse_args()
    if args.page:
        PAGE.write_text(page(read_results(), what_parts_do()), encoding="utf-8")
        return 0
    gpus = [] if args.dry else usable_gpus()
    if not gpus and not args.dry:
        parser.error("this machine has no GPU; --dry tests the parts on a CPU")
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(folder=folder, num_gpus=len(gpus), is_dry=args.dry)
        if args.one:
            one(args.one, setting)
            return 0
        results = [run_part(name, PARTS[name], setting) for name in chosen]
    machine = f"{len(gpus)} x {gpus[0]}" if gpus else "dry run on a CPU"
    show(results, machine)
    if not args.dry:
        PAGE.write_text(page(keep(machine, results), what_parts_do()), encoding="utf-8")
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
