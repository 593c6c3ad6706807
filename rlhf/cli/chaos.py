"""`rlhf chaos`: a run with injected faults, compared with the same run without.

RUNS/NAME-clean/  RUNS/NAME-chaos/ (the two runs)
RUNS/NAME-chaos-faults/  plan.json  phases.json  witness.jsonl  NAME-chaos_K.log (what its K-th driver printed)
"""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle, islice, product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.cli.chaos_child import DRIVER, WITNESSES, Fault
from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import dump_config
from rlhf.config.tools import ChaosConfig
from rlhf.errors import ConfigError, NumericsError, RlhfError, StallError, WorkerLostError
from rlhf.orchestrator.run.checkpoint import sha256_of
from rlhf.orchestrator.run.files import read_rows, write_text
from rlhf.orchestrator.run.run_directory import PRIVATE, newest_processes
from rlhf.terminal import counted, rich_console
from rlhf.types import Json

RESUMABLE = {WorkerLostError.exit_code, StallError.exit_code}
"""Exit codes of runs that used up their restarts and can be resumed."""
TIMED = ("time", "throughput/", "sync/seconds", "memory/", "repairs/")
"""Metrics that differ between any two runs, or between one with faults and one without."""


def run_chaos(command: str, config: TrainConfig, options: ChaosConfig) -> int:
    """Run both, and compare.

    Raises:
        ConfigError: there is a folder already.
        NumericsError: the disturbed run learned something else.
        RlhfError: a run failed in a way that faults must not lead to.
    """
    console = rich_console(soft_wrap=True)
    clean = Path(options.against) if options.against is not None else folder_of(config, "clean")
    disturbed = folder_of(config, "chaos")
    for folder in [disturbed] if options.against is not None else [clean, disturbed]:
        if folder.exists():
            raise ConfigError(f"chaos: {folder} is there already. Remove it, or choose another run.name.")
    work = disturbed.with_name(f"{disturbed.name}-faults")
    work.mkdir(parents=True, mode=PRIVATE)
    write_text(work / "plan.json", "[]")
    if options.against is None:
        console.print(f"the run without faults, into {clean}")
        run_to_end(command, config, clean, work, console, most_drivers=1)
    processes = newest_processes(clean)
    if not processes:
        raise ConfigError(f"chaos: {clean} is not a finished run: its logs do not say which process ran where.")
    # By name: those that were replaced come last in the run's own list.
    faults = draw(options, sorted(process.name for process in processes), phases_of(work, clean))
    write_text(work / "plan.json", json.dumps([asdict(fault) for fault in faults]))
    console.print(f"the run with {counted(len(faults), 'fault')}, into {disturbed}")
    codes = run_to_end(command, config, disturbed, work, console, most_drivers=len(faults) + 1)
    witnesses = read_rows(work / WITNESSES)
    console.print(table(faults, witnesses))
    kinds = [event.get("kind") for event in read_rows(disturbed / "events.jsonl")]
    console.print(
        f"{len(witnesses)} of {len(faults)} faults; {kinds.count('replacement')} replacements and "
        f"{kinds.count('restart')} restarts inside; drivers ended with {codes}"
    )
    if len(witnesses) < len(faults):
        raise ConfigError(
            f"chaos: {disturbed} ended after {len(witnesses)} of {len(faults)} faults. Give it more "
            "train.num_steps, or fewer --num-faults."
        )
    if not is_exact(config, {process.device for process in processes}):
        console.print("the run is over; on GPUs, and where rollouts run ahead, no two learn the same weights")
        return 0
    if weights_of(clean) != weights_of(disturbed):
        where = first_difference(clean, disturbed)
        raise NumericsError(f"chaos: {disturbed} learned other weights than {clean}; {where}.")
    console.print("both learned the same weights, to the byte")
    return 0


def folder_of(config: TrainConfig, which: str) -> Path:
    return Path(config.run.dir, f"{config.run.name}-{which}").absolute()


def run_to_end(
    command: str, config: TrainConfig, folder: Path, work: Path, console: Console, *, most_drivers: int
) -> list[int]:
    """Run and resume until the run is done. Returns the drivers' exit codes; that of a killed driver is negative."""
    settings = work / f"{folder.name}.yaml"
    write_text(settings, dump_config(config))
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        resumes = any(folder.glob("checkpoints/step_*"))
        child = [sys.executable, "-m", "rlhf.cli.chaos_child", str(work), str(folder), "train", command]
        flags = [str(settings), "--run.dir", str(folder.parent), "--run.name", folder.name]
        log = work / f"{folder.name}_{len(codes) + 1}.log"
        with log.open("wb") as output:
            process = subprocess.run(
                [*child, *flags, *(["--resume"] if resumes else [])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        codes.append(process.returncode)
        is_worth_another = codes[-1] < 0 or codes[-1] in RESUMABLE
        if codes[-1] and (not is_worth_another or len(codes) >= most_drivers):
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RlhfError(f"chaos: {folder.name} ended with code {codes[-1]}, see {log}: {' '.join(last)}")
        if codes[-1] < 0:
            torn = tear(folder, read_rows(work / WITNESSES))
            console.print(f"  the driver was killed{torn}; it is started again")
    return codes


def tear(folder: Path, witnesses: Sequence[Mapping[str, Json]]) -> str:
    """Damage the newest checkpoint, if the last fault was of this kind and there is an older checkpoint."""
    found = sorted(folder.glob("checkpoints/step_*"), key=lambda path: int(path.name[5:]))
    if not witnesses or witnesses[-1]["kind"] != "tear" or len(found) < 2:
        return ""
    files = sorted(path for path in found[-1].rglob("*") if path.is_file())
    victim = random.Random(str(witnesses[-1]["number"])).choice(files)
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size // 2)
    return f" and {victim.relative_to(folder)} cut in half"


def draw(options: ChaosConfig, processes: Sequence[str], phases: Sequence[str]) -> list[Fault]:
    """Each process in each phase, in random order, repeatedly; kinds alternate where they apply."""
    chance, moments = random.Random(options.chaos_seed), random.Random(f"moments-{options.chaos_seed}")
    cells = list(product([*processes, DRIVER], phases))
    chance.shuffle(cells)
    for_driver = [str(kind) for kind in options.kinds if kind != "stop"]  # no process would continue it
    for_others = [str(kind) for kind in options.kinds if kind != "tear"]
    faults = []
    for number, (process, phase) in enumerate(islice(cycle(cells), options.num_faults)):
        possible = (for_driver if process == DRIVER else for_others) or ["kill"]
        kind = chance.choice(possible)
        faults.append(
            Fault(
                number=number,
                kind=kind,
                process=process,
                phase=phase,
                apart_s=options.apart_s,
                delay_s=moments.uniform(0.0, options.delay_s),
            )
        )
    return faults


def phases_of(work: Path, clean: Path) -> list[str]:
    """The phases of a run, if they were recorded; else all phases of its kind of run."""
    watched = work / "phases.json"
    if watched.exists():
        return list(json.loads(watched.read_text(encoding="utf-8")))
    is_online = any(clean.glob("rollouts/*.jsonl"))
    return ["generate", "score", "log_probs", "learn", "sync", "checkpoint"] if is_online else ["learn", "checkpoint"]


def is_exact(config: TrainConfig, devices: set[str]) -> bool:
    """Whether two runs with one seed are equal bit for bit."""
    return devices == {"cpu"} and config.max_lag == 0


def weights_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of the trained model."""
    return {file.name: sha256_of(file) for file in sorted((folder / "model").glob("*.safetensors"))}


def first_difference(clean: Path, disturbed: Path) -> str:
    """Where the metrics of two runs first differ."""
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (disturbed, clean))
    for one, other in zip(ours, theirs, strict=False):
        for name in sorted(one.keys() & other.keys()):
            if not name.startswith(TIMED) and one[name] != other[name]:
                return f"first at step {one.get('step')}: {name} {one[name]}, not {other[name]}"
    return f"{len(ours)} steps recorded, not {len(theirs)}" if len(ours) != len(theirs) else "all metrics agree"


def table(faults: Sequence[Fault], witnesses: Sequence[Mapping[str, Json]]) -> Table:
    """Which fault hit which process, and where it was noticed."""
    seen = {row["number"]: row for row in witnesses}
    shown = Table("fault", "process", "phase", "noticed in")
    for fault in faults:
        row = seen.get(fault.number)
        shown.add_row(fault.kind, fault.process, fault.phase, f"{row['wait']} (pid {row['pid']})" if row else "not met")
    return shown
