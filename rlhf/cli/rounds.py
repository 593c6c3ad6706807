"""`rlhf rounds`: sample, choose and train in rounds, through disk.

sft is expert iteration (ReST: Gulcehre et al. 2023; RAFT without thresholds), dpo is iterative DPO (Xiong et al. 2023).
Every stage is an ordinary command in a process of its own, whose memory is free when it ends; one whose finished output
is there is not done again.

FOLDER/  config.yaml  round_1/ (sample.yaml  samples.jsonl  data.jsonl  train/)  round_2/ ...  rounds.json

After the last round its model samples once more, into the folder of the round that would come next.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml
from rich.table import Table

from rlhf.config.loading.layers import flattened
from rlhf.config.loading.load import dump_config
from rlhf.config.tools import RoundsConfig, SampleConfig, SamplingConfig
from rlhf.errors import ConfigError, RlhfError
from rlhf.orchestrator.data.curation import describe
from rlhf.orchestrator.data.samples import is_finished, read_samples
from rlhf.orchestrator.run.files import checkpoint_errors, write_json, write_text
from rlhf.orchestrator.run.run_directory import Status
from rlhf.terminal import rich_console, tell
from rlhf.types import Json

SEEDS = 2**63
FREE = {"num_rounds", "debug"}
"""Settings that may change when rounds are continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round's folder and its two models: the policy that samples, and the model that its training starts from."""

    number: int
    folder: Path
    policy: str
    start: str
    reference: str

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "train"

    @property
    def is_trained(self) -> bool:
        """Whether the round's training is finished."""
        try:
            status = json.loads((self.run / "status.json").read_text(encoding="utf-8"))["status"]
        except (OSError, ValueError, KeyError):
            return False
        return bool(status == Status.DONE)


def run_command(arguments: Sequence[str]) -> int:
    """Run `rlhf ARGUMENTS` in a process of its own and return its exit code. SIGTERM is passed on."""
    process = subprocess.Popen([sys.executable, "-m", "rlhf.cli.main", *arguments])

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal interrupted it too
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


def run_rounds(config: RoundsConfig, run: Callable[[Sequence[str]], int] = run_command) -> int:
    """Do every stage that is not done yet, and show the mean reward of each round. `run` runs one `rlhf` command.

    Returns the exit code: that of the stage that failed, or 0.

    Raises:
        ConfigError: the folder holds rounds with other settings.
    """
    folder = Path(config.folder)
    console = rich_console()
    claim(folder, config)
    for one in rounds(config):
        for name, arguments in stages(config, one):
            console.rule(f"round {one.number}: {name}")
            console.print(f"rlhf {' '.join(arguments)}", markup=False, highlight=False, soft_wrap=True)
            code = run(arguments)
            if code:
                tell(
                    [
                        f"rlhf: error: round {one.number}: {name} ended with code {code}. "
                        "The same command continues from there."
                    ]
                )
                return code
    rows = [summary(one) for one in rounds(config)]
    write_json(folder / "rounds.json", {"rounds": list(rows)})
    console.print(table(rows))
    console.print(f"The last model is in {list(rounds(config))[-1].policy}", soft_wrap=True)
    return 0


def claim(folder: Path, config: RoundsConfig) -> None:
    """Write the settings to the folder, or check that they are the ones in it."""
    file = folder / "config.yaml"
    if file.exists():
        before = dict(flattened(yaml.safe_load(file.read_text(encoding="utf-8"))))
        now = dict(flattened(yaml.safe_load(dump_config(config))))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key[0] not in FREE]
        if changed:
            raise ConfigError(
                [
                    f"{'.'.join(map(str, key))}: {json.dumps(before.get(key))} in {file}, "
                    f"now {json.dumps(now.get(key))}. Choose another --folder, or the same settings."
                    for key in changed
                ]
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--folder: {folder} exists and holds no rounds. Choose another.")
    with checkpoint_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(file, dump_config(config))


def rounds(config: RoundsConfig) -> Iterator[Round]:
    """The rounds in order, and the one after the last, which only samples."""
    assert config.model is not None, "checked by the config's loader"
    policy = config.model
    for number in range(1, config.num_rounds + 2):
        one = Round(
            number=number,
            folder=Path(config.folder) / f"round_{number}",
            policy=policy,
            start=policy if config.start_from == "previous" else config.model,
            reference=policy if config.reference == "previous" else config.model,
        )
        yield one
        policy = str(one.run / "model")


def stages(config: RoundsConfig, one: Round) -> Iterator[tuple[str, list[str]]]:
    """The commands that this round still needs; the next one is generated when the one before it is done."""
    if not is_finished(one.samples):
        yield "sample", ["sample", str(sample_file(config, one))]
    if one.number > config.num_rounds:
        return
    if not one.data.exists():
        yield "curate", ["curate", *curation(config, one.number), str(one.samples), "--out", str(one.data)]
    if not one.is_trained:
        yield "train", training(config, one)


def sample_file(config: RoundsConfig, one: Round) -> Path:
    """Write the round's settings for `rlhf sample`. Each round has its own seeds."""
    sampling = config.model_dump(include=set(SamplingConfig.model_fields))
    seed = (config.seed + one.number - 1) % SEEDS
    settings = SampleConfig(**sampling | {"seed": seed}, model=one.policy, out=str(one.samples))
    file = one.folder / "sample.yaml"
    with checkpoint_errors(file):
        one.folder.mkdir(parents=True, exist_ok=True)
    write_text(file, dump_config(settings))
    return file


def curation(config: RoundsConfig, number: int) -> list[str]:
    """How the round chooses: pairs for DPO; for SFT, responses above the round's threshold, else the best of each
    prompt."""
    kept = ["--keep-truncated"] if config.keep_truncated else []
    if config.method == "dpo":
        return ["pairs", "--min-margin", str(config.min_margin), *kept]
    most = ["--max-per-prompt", str(config.max_per_prompt)] if config.max_per_prompt is not None else []
    for flag, bounds in (("--threshold", config.thresholds), ("--quantile", config.quantiles)):
        if bounds:
            return ["rejection", flag, str(bounds[min(number, len(bounds)) - 1]), *most, *kept]
    return ["best-of-n", *most, *kept]


def training(config: RoundsConfig, one: Round) -> list[str]:
    """The round's `rlhf train`. Prompts were written as the model saw them, so no template is applied again."""
    assert config.method is not None, "checked by the config's loader"
    arguments = ["train", config.method, *([config.train] if config.train is not None else [])]
    arguments += ["--policy.model", one.start]
    if config.method == "dpo":
        arguments += ["--reference.model", one.reference]
    arguments += ["--data.path", str(one.data), "--data.prompt-format", "{prompt}", "--data.template", "auto"]
    arguments += ["--run.dir", str(one.folder), "--run.name", one.run.name]
    has_checkpoint = any((one.run / "checkpoints").glob("step_*"))
    return [*arguments, "--resume"] if has_checkpoint else arguments


def summary(one: Round) -> dict[str, Json]:
    """Statistics of the policy's samples, and the number of rows made of them."""
    facts: dict[str, Json] = dict(describe(read_samples(str(one.samples))))
    rows = one.data.read_bytes().count(b"\n") if one.data.exists() else None
    return {"round": one.number, "policy": one.policy, "rows": rows, **facts}


def table(rows: Sequence[dict[str, Json]]) -> Table:
    """One row for each policy."""
    shown = Table(title="Samples of each round's policy")
    for heading in ("round", "mean reward", "mean of the best", "truncated", "responses", "rows trained on"):
        shown.add_column(heading, justify="right")
    for row in rows:
        last = row is rows[-1]
        shown.add_row(
            "after the last" if last else str(row["round"]),
            f"{_number(row['reward']):.4g}",
            f"{_number(row['best_reward']):.4g}",
            f"{_number(row['truncated']):.0%}",
            f"{_number(row['answers']):.0f}",
            "" if last else str(row["rows"]),
        )
    return shown


def _number(value: Json) -> float:
    if not isinstance(value, int | float):
        raise RlhfError(f"rounds: not a number: {value}")
    return float(value)
