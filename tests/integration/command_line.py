"""Runs of the real `rlhf` command on models of a few thousand weights, and what a run leaves behind."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from ipaddress import IPv6Address, ip_address
from itertools import count
from pathlib import Path

import psutil
import torch

from rlhf.cli.chaos import TIMED
from rlhf.cli.chaos_child import Fault
from rlhf.cli.chaos_child import run as run_chaos_child
from rlhf.cli.main import main
from rlhf.engines.process.open_names import OF_PYTHON, OF_VLLM, SHARED_MEMORY
from tests.integration.forked_command import run_forked
from tests.tiny_models import make_policy, make_reward_model

START_TIMEOUT_S = 400.0
"""Longest wait for the first steps: a minute on an idle machine of two cores."""
RUN_TIMEOUT_S = 500.0
STARTING_S = 30.0
"""Most that a process takes from its start to the semaphores that it was given."""
MARK = "RLHF_TEST_RUN"

CONFIG = """\
policy: {model: policy, lr: 1.0e-3}
critic: {lr: 1.0e-3}
reward:
  sources:
    - {type: model, model: scorer}
    - {type: function, function: taste:vowels, weight: 0.5, timeout_s: 300}
data: {path: prompts.jsonl, eval_fraction: 0.15, template: plain}
rollout: {batch_size: 4, max_prompt_tokens: 16, max_response_tokens: 8, kv_cache_gib: 0.1}
train: {num_steps: 6, batch_size: 2}
checkpoint: {every_steps: 3, grace_s: 120}
log: {tensorboard: false, sample_every_steps: 0}
"""

TASTE = '''\
"""A reward function that can be held in the middle of a step, so that a test meets the run there."""

import time
from pathlib import Path

hold = Path(__file__).with_name("hold")
calls = 0


def vowels(prompts, responses, **columns):
    """The share of vowels. The call whose number stands in the file `hold` (1 is the probe) waits until it is gone."""
    global calls
    calls += 1
    if hold.exists() and calls == int(hold.read_text()):
        hold.with_name("held").touch()
        while hold.exists():
            time.sleep(0.05)
    return [sum(c in "aeiou" for c in response) / max(1, len(response)) for response in responses]
'''


def write_workplace(folder: Path) -> None:
    """A user's folder: two models, prompts, demonstrations, preferences, a config and a reward function."""
    make_policy(folder / "policy")
    make_reward_model(folder / "scorer")
    prompts = [f"say {word} {number}" for word in ("red", "green", "blue") for number in range(10)]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_rows(folder / "demonstrations.jsonl", [{"prompt": prompt, "response": "yes " * 3} for prompt in prompts])
    write_rows(folder / "preferences.jsonl", [{"prompt": p, "chosen": "a" * 6, "rejected": "z" * 5} for p in prompts])
    (folder / "ppo.yaml").write_text(CONFIG)
    (folder / "taste.py").write_text(TASTE)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder after its command ended, and what the command said."""

    folder: Path
    code: int
    output: str

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def weights(self) -> str:
        """sha256 of the model's file."""
        return hashlib.sha256((self.model / "model.safetensors").read_bytes()).hexdigest()

    def optimizer_states(self, role: str) -> object:
        """Weights and moments of a role, of one rank, as its last checkpoint holds them."""
        (file,) = (self.folder / "checkpoints").glob(f"step_6/{role}/deepspeed/*.pt")
        held = torch.load(file, weights_only=False)
        assert held["optimizer"]["state"], file
        return held["module"], held["optimizer"]

    @property
    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.folder)

    @property
    def figures(self) -> list[dict[str, float]]:
        """The metrics that are the same in every run with one seed."""
        return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in self.metrics]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(kw_only=True)
class Driver:
    """A running `rlhf train`. Its processes carry `mark` in their environment, but for those of a joined cluster."""

    process: subprocess.Popen[bytes]
    workplace: Path
    folder: Path
    log: Path
    mark: str
    _seen: set[psutil.Process] = field(default_factory=set)

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> Run:
        code = self.process.wait(timeout_s)
        return Run(folder=self.folder, code=code, output=self.log.read_text())

    def wait_until_held(self) -> None:
        """Wait until the reward function stands still."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (self.workplace / "held").exists():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"the reward function was not reached:\n{self.log.read_text()}"
            time.sleep(0.1)

    def release(self) -> None:
        """Let the reward function go on."""
        (self.workplace / "hold").unlink(missing_ok=True)
        (self.workplace / "held").unlink(missing_ok=True)

    def processes(self) -> set[psutil.Process]:
        """Every process of this run that is alive: descendants, and those that have the run's mark. What was seen once
        is remembered, whatever becomes of its parent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            self._seen |= {own, *own.children(recursive=True)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    self._seen.add(process)
        return {process for process in self._seen if is_alive(process)}

    def kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class CommandLine:
    """`rlhf` in a user's folder. Kills what is left of its runs when closed."""

    def __init__(self, workplace: Path) -> None:
        self.workplace = workplace
        self._drivers: list[Driver] = []
        self._marks = (f"{os.getpid()}-{number}" for number in count())

    def start(
        self, *arguments: str, name: str, hold_at: int | None = None, environment: Mapping[str, str] | None = None
    ) -> Driver:
        """Start `rlhf train ARGUMENTS --run.name NAME`; at call `hold_at` its reward function waits to be released. One
        at a time is held."""
        if hold_at is not None:
            (self.workplace / "hold").write_text(str(hold_at))
        mark = next(self._marks)
        log = self.workplace / f"{mark}-{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf.cli.main", "train", *arguments, "--run.name", name],
                cwd=self.workplace,
                env={**(environment or clean_environment()), MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        folder = self.workplace / "runs" / name
        driver = Driver(process=process, workplace=self.workplace, folder=folder, log=log, mark=mark)
        self._drivers.append(driver)
        return driver

    def run(self, *arguments: str, name: str, environment: Mapping[str, str]) -> Run:
        """A run that must succeed, from its start to its end. `environment` is that of the tests' cluster."""
        run = self._run(main, ["train", *arguments, "--run.name", name], name, environment)
        assert run.code == 0, run.output
        return run

    def run_with_faults(
        self, *arguments: str, name: str, environment: Mapping[str, str], faults: Sequence[Fault]
    ) -> Run:
        """A run into which `faults` are injected, from its start to its end, whatever that is."""
        work = self.workplace / f"{name}-faults"
        work.mkdir()
        (work / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]))
        folders = [str(work), str(self.workplace / "runs" / name)]
        return self._run(run_chaos_child, [*folders, "train", *arguments, "--run.name", name], name, environment)

    def _run(
        self, command: Callable[[list[str]], int], arguments: list[str], name: str, environment: Mapping[str, str]
    ) -> Run:
        log = self.workplace / f"{next(self._marks)}-{name}.log"
        code = run_forked(
            command, arguments, folder=self.workplace, environment=environment, log=log, timeout_s=RUN_TIMEOUT_S
        )
        return Run(folder=self.workplace / "runs" / name, code=code, output=log.read_text())

    def close(self) -> None:
        for driver in self._drivers:
            driver.kill_all()


def clean_environment() -> dict[str, str]:
    """This process's environment without what changes a run's numbers or joins it to somebody's cluster."""
    return {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    }


def listening_sockets(processes: set[psutil.Process]) -> dict[int, str]:
    """Inodes of the TCP sockets on which `processes` listen, with who and where."""
    listening = {inode: address for inode, address in all_listening()}
    found = {}
    for process in processes:
        for link in opened(process):
            inode = int(link[8:-1]) if link.startswith("socket:[") else -1
            if inode in listening:
                found[inode] = f"{process.name()} (pid {process.pid}) on {listening[inode]}"
    return found


def all_listening() -> Iterator[tuple[int, str]]:
    """Every listening TCP socket of the machine: inode and address."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].rsplit(":")
                yield int(fields[9]), f"{readable(address)}:{int(port, 16)}"


def readable(address: str) -> str:
    """An address of /proc/net, whose bytes are in the machine's order in groups of four."""
    groups = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    found = ip_address(b"".join(groups))
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)


def shared_memory(processes: set[psutil.Process]) -> set[Path]:
    """Files in shared memory that `processes` have open or mapped, or that carry a pid of theirs in their names."""
    links = {link for process in processes for link in (*opened(process), *mapped(process))}
    pids = {str(process.pid) for process in processes}
    # A number of its own: a name made by chance may have that of any process among its digits.
    named = {path for path in SHARED_MEMORY.rglob("*") if not pids.isdisjoint(re.findall(r"[0-9a-zA-Z]+", path.name))}
    return named | {Path(link) for link in links if link.startswith(f"{SHARED_MEMORY}/") and Path(link).exists()}


def abandoned() -> set[Path]:
    """Shared memory of Python and vLLM, and sockets in the folder for temporary files, that no process of the machine
    uses: what ended without removing its own. Tests that run beside this one use theirs, but for semaphores on their
    way to a process that starts, which nobody has open for a while."""
    found, deadline = unused(), time.monotonic() + STARTING_S
    while found and time.monotonic() < deadline:
        time.sleep(0.5)
        found &= unused()
    return found


def unused() -> set[Path]:
    """What of these nobody has open now."""
    shared = {path for path in SHARED_MEMORY.iterdir() if path.name.startswith((OF_PYTHON, OF_VLLM, "sem.mp-"))}
    sockets = {path for path in Path(tempfile.gettempdir()).iterdir() if path.is_socket()}
    if not shared | sockets:
        return set()
    links = {link for process in psutil.process_iter() for link in (*opened(process), *mapped(process))}
    bound = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    return {path for path in shared | sockets if str(path) not in links | bound and path.exists()}


def opened(process: psutil.Process) -> list[str]:
    links = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(str(entry.readlink()))
    return links


def mapped(process: psutil.Process) -> list[str]:
    try:
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except OSError:
        return []
    return [line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and f"{SHARED_MEMORY}/" in line]
