"""`rlhf plan --calibrate RUN`: what was planned next to what was measured, and the factors between them."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.algorithms import build_algorithm
from rlhf.cli.detect_cluster import detect_cluster
from rlhf.cli.plan import CALIBRATION, config_json
from rlhf.config.commands import METHODS, TrainConfig, method_name
from rlhf.config.loading.load import load_config
from rlhf.config.tools import CalibrateConfig
from rlhf.errors import ConfigError, DataError
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.planning.calibration import Measured, calibrated, measured
from rlhf.planning.hardware import GIB, parse_cluster
from rlhf.planning.plan import PHASES, Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import place, shapes_of
from rlhf.planning.workload import workload
from rlhf.terminal import rich_console
from rlhf.types import Json


def run_calibrate(options: CalibrateConfig) -> int:
    """Print the comparison and write the factors to the run's folder. Returns the exit code.

    Raises:
        ConfigError: there is no such run, or its config is of another version.
        DataError: it has too few steps.
    """
    if options.calibrate is None:
        raise ConfigError("calibrate: name the folder of a run.")
    folder = Path(options.calibrate)
    config = run_config(folder)
    plan, found = compared(config, folder, options.cluster)
    calibration = calibrated(found, plan)
    show(rich_console(), plan, found)
    calibration.write(folder / CALIBRATION)
    rich_console().print(f"kept in {folder / CALIBRATION}: rlhf plan {method_name(config)} ... --calibration {folder}")
    return 0


def run_config(folder: Path) -> TrainConfig:
    """The resolved config of a run. Raises ConfigError."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"calibrate: {folder} is not a run's folder: no config.yaml there.")
    problems: tuple[str, ...] = ()
    for name in METHODS:
        try:
            return load_config(name, [str(file)], {})
        except ConfigError as error:
            problems = min(problems, error.problems, key=len) if problems else error.problems
    raise ConfigError(problems)


def compared(config: TrainConfig, folder: Path, cluster: str | None) -> tuple[Plan, Measured]:
    """The plan of a run for the lengths that it had, and what it measured. Raises DataError."""
    algorithm = build_algorithm(config.algo)
    placement = place(config, algorithm.needs)
    shape = detect_cluster(config, placement) if cluster is None else parse_cluster(cluster)
    found = measured(steps_of(folder), PHASES, workload(config, algorithm.needs).learned)
    shapes = shapes_of(config, algorithm.needs, config_json)
    return plan_run(config, algorithm.needs, shapes, shape, lengths=found.lengths), found


def steps_of(folder: Path) -> list[dict[str, Json]]:
    """The lines of a run's metrics.jsonl. Raises DataError."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: not there; the run finished no step.")
    return read_metrics(file, rich_console(soft_wrap=True).print)


def show(console: Console, plan: Plan, found: Measured) -> None:
    """A row for each phase and each kind of process."""
    table = Table(title=f"planned for {plan.cluster}, and measured")
    for name in ("", "planned", "measured", "measured / planned"):
        table.add_column(name, justify="right" if name else "left")
    rows = [(f"{phase}, s", plan.seconds[phase], found.seconds[phase]) for phase in PHASES if phase in found.seconds]
    rows.append(("step, s", plan.step_s, found.step_s))
    held = plan.processes
    rows += [(f"{n}, GiB", held[n] / GIB, size / GIB) for n, size in found.memory.items() if n in held]
    for name, planned, real in rows:
        table.add_row(name, f"{planned:.3g}", f"{real:.3g}", f"{real / planned:.2f}" if planned else "")
    console.print(table)
