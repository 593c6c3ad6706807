"""Ours against TRL, pair by pair.

    python -m benchmarks.beside_trl [METHOD ...] [--size tiny 25m] [--lengths uniform long] [--steps N] [--repeats N]

Every half of a pair is a process of its own; the halves take turns, so that the machine's mood meets both. Steps are
warm (the first two are left out) and medians over all repeats; start-ups are a column of their own. `ratio` is TRL's
figure over ours where less is better: above 1, ours is faster or smaller. It is the median of the pairs' ratios, with
the least and the largest behind it. Results are added to a JSON file and the table is printed as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median

from benchmarks.beside_trl import ours
from benchmarks.beside_trl.cases import METHODS, ONLINE, SIZES, Case, write_case
from benchmarks.beside_trl.figures import Figures, MemoryPeak

ENGINES = ("vllm", "transformers")
TRL = "TRL"
HALF_S = {"tiny": 50.0, "25m": 75.0}
"""Seconds that one half of a pair takes, start-up and end included; online ones on long answers take more."""


def sides(case: Case, engines: Sequence[str]) -> list[str]:
    return [TRL, *(engines if case.method in ONLINE else ["ours"])]


def run_half(case: Case, side: str, log: Path) -> Figures:
    """One run of one side, in a fresh folder."""
    peak = MemoryPeak()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as name, log.open("a") as output:
        folder = Path(name)
        write_case(case, folder)
        theirs = [sys.executable, "-m", "benchmarks.beside_trl.theirs", str(folder)]
        command = theirs if side == TRL else ours.command(case, folder, side)
        started = time.time()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            with peak.watching(process.pid):
                code = process.wait(timeout=1800)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code:
            raise SystemExit(f"{case.title}: {side} ended with code {code}; see {log}")
        if side == TRL:
            figures = Figures(**json.loads((folder / "theirs.json").read_text()))
        else:
            figures = ours.read(case, folder, started)
    return replace(figures, peak_mib=peak.mib)


def run_case(case: Case, engines: Sequence[str], repeats: int, log: Path) -> dict[str, list[Figures]]:
    """Every side `repeats` times, taking turns."""
    results: dict[str, list[Figures]] = {side: [] for side in sides(case, engines)}
    for _ in range(repeats):
        for side, runs in results.items():
            runs.append(run_half(case, side, log))
            last = runs[-1]
            print(f"  {case.title:24} {side:13} {last.seconds:8.3f} s a step, {last.peak_mib:6.0f} MiB", flush=True)
    return results


HEADINGS = (
    "method", "size", "lengths", "side", "s a step", "ratio", "samples/s", "peak MiB", "ratio", "start-up s",
    "mean (longest) answer", "reward or loss, first", "last",
)  # fmt: skip


def lines_of(case: Case, results: dict[str, list[Figures]]) -> list[list[str]]:
    """A row of the table for each side."""
    seconds = {side: median(run.seconds for run in runs) for side, runs in results.items()}
    peaks = {side: median(run.peak_mib for run in runs) for side, runs in results.items()}
    rows = []
    for side, runs in results.items():
        ratios = sorted(theirs.seconds / own.seconds for theirs, own in zip(results[TRL], runs, strict=True))
        ratio = f"{median(ratios):.2f}" + (f" ({ratios[0]:.2f}-{ratios[-1]:.2f})" if len(ratios) > 1 else "")
        peak_ratio = peaks[TRL] / peaks[side]
        lengths = f"{mean(run.length_mean for run in runs):.0f} ({max(run.length_max for run in runs):.0f})"
        rows.append(
            [
                case.method,
                case.size,
                case.lengths,
                TRL if side == TRL else f"ours, {side}" if side in ENGINES else "ours",
                f"{seconds[side]:.3f}",
                "" if side == TRL else ratio,
                f"{case.shape.num_answers / seconds[side]:.1f}",
                f"{peaks[side]:.0f}",
                "" if side == TRL else f"{peak_ratio:.2f}",
                f"{median(run.startup_s for run in runs):.0f}",
                lengths if case.method in ONLINE else "",
                f"{mean(run.outcome[0] for run in runs):.3f}",
                f"{mean(run.final for run in runs):.3f}",
            ]
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head = ["| " + " | ".join(HEADINGS) + " |", "|" + "|".join(["---"] * 4 + ["---:"] * (len(HEADINGS) - 4)) + "|"]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def keep(path: Path, case: Case, results: dict[str, list[Figures]]) -> None:
    """Add a case to the JSON file, in place of an older run of it."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[case.title] = {
        "case": asdict(case),
        "taken": time.strftime("%Y-%m-%d %H:%M"),
        "runs": {side: [asdict(run) for run in runs] for side, runs in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1))


def table(path: Path) -> str:
    """The table of everything that the JSON file holds."""
    rows: list[list[str]] = []
    for entry in json.loads(path.read_text()).values():
        runs = {side: [Figures(**run) for run in each] for side, each in entry["runs"].items()}
        rows += lines_of(Case(**entry["case"]), runs)
    return markdown(sorted(rows, key=lambda row: (METHODS.index(row[0]), row[1], row[2] != "uniform")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; none: all")
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--lengths", nargs="+", choices=("uniform", "long"), default=["uniform", "long"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, help="warm steps; by default 20 on given data, 5 online")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/trl.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of what was measured before")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown method {', '.join(unknown)}; have {', '.join(METHODS)}")
    if not args.table:
        cases = [
            Case(method=m, size=s, lengths=x, num_steps=2 + (args.steps or (5 if m in ONLINE else 20)))
            for m in args.methods or METHODS
            for s in args.size
            for x in args.lengths
        ]
        estimate = sum(HALF_S[case.size] * len(sides(case, args.engines)) for case in cases) * args.repeats
        print(f"{len(cases)} pairs, about {estimate / 60:.0f} minutes on two idle cores", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for case in cases:
            keep(args.out, case, run_case(case, args.engines, args.repeats, args.out.with_suffix(".log")))
    print(table(args.out))


if __name__ == "__main__":
    main()
