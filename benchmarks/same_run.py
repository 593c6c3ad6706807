"""Whether a change of the code changed any number: six-step runs of every method, at a base revision and now.

    RLHF_TEST_DATA=FOLDER python -m benchmarks.same_run --base REV [--only ppo,grpo] [--keep FOLDER] [--lock FILE]

Every method runs twice on CPU in float32 with the same seed and the same input files: with the code of `--base`, taken
out of git into a folder of its own, and with the working tree. The table says for each method whether these are the
same, bit for bit, and where they are not, how many differ and which one is the first:

- weights: the tensors of the exported model;
- optimizer: the tensors and numbers in the last checkpoint of every role: its weights, moments and counts. Tensors are
  compared and not files, because a pickle also holds names and versions;
- metrics: every value in metrics.jsonl as it is written there, under its new name, but for those of wall-clock time and
  memory.

The exit code is 1 if anything differs or a run fails. Config keys and metrics that were renamed are known by the tables
with which their old names are still read; metrics that were dropped or added are at the top of this file. With `--keep`
the results of the base revision are stored and used again by later calls. Those of the working tree are used again with
`--again` only: after a change of the tables alone nothing needs to run.

The runs use vLLM, with one engine where a case says nothing else, strictly on-policy, and DeepSpeed ZeRO-3 on two
ranks where a case says so. On one machine such runs are deterministic without any further setting: each request has its
own seed, and collectives add in a fixed order. Runs on machines with different numbers of cores are not comparable: the
number of threads differs.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.tables import show
from rlhf.config.renamed import RENAMED_KEYS
from rlhf.orchestrator.run.metrics_file import RENAMED_METRICS

ROOT = Path(__file__).parents[1]
DROPPED_METRICS: tuple[str, ...] = ("tricks/",)
"""Metrics of the base revision that are no longer written. "NAME/" stands for all that begin with it."""
ADDED_METRICS: tuple[str, ...] = (
    *("policy/clip_frac", "reward/std", "repairs/count"),
    *("rollout/under_way", "rollout/waiting", "rollout/expired"),
)
"""Metrics that the base revision does not write of every method, as above."""
TIMED_METRICS = ("time", "throughput/", "memory/", "sync/seconds")
"""Prefixes of metrics that depend on the machine's speed and memory, under their old and new names."""

UNSEEDED = "random_state_"
"""Files of a checkpoint that begin so are not compared: they hold the global generator of a rank, which no computation
draws from and which starts at a random seed."""
REFERENCE_CACHE = "reference-cache"
"""Log-probs of the reference that runs in one folder share. Each run here measures its own."""

MOST_NAMED = 3
"""Other metrics or tensors that differ which a cell of the table names."""

NUM_STEPS = 6
RUN_TIMEOUT_S = 1200.0
CHANGES_RUNS = ("OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
"""Environment variables that change the numbers of a run or join it to a cluster. RLHF__* override the config."""
Config = dict[str, object]
COMMON: Config = {
    "train.num_steps": NUM_STEPS,
    "run.seed": 7,
    "checkpoint.every_steps": 3,
    "cluster.device": "cpu",
    "log.tensorboard": False,
    "log.sample_every_steps": 0,
    "eval.every_steps": 3,
}
POLICY: Config = {
    **COMMON,
    "policy.model": "{stories}",
    "policy.dtype": "float32",
    "policy.zero_stage": 3,
    "policy.lr": 3e-4,
}
REWARD: Config = {
    **COMMON,
    "reward.model": "{stories}",
    "reward.dtype": "float32",
    "reward.lr": 3e-4,
}
TWO_RANKS: Config = {"policy.num_gpus_per_node": 2}
ONLINE: Config = {
    **POLICY,
    "reward.function": "story_rewards:joy",
    "data.path": "{inputs}/openings.jsonl",
    "data.eval_fraction": 0.1,
    "rollout.engine": "vllm",
    "rollout.enforce_eager": True,
    "rollout.kv_cache_gib": 0.25,
    "rollout.batch_size": 8,
    "rollout.num_samples": 4,
    "rollout.max_prompt_tokens": 64,
    "rollout.max_response_tokens": 32,
}
GIVEN: Config = {"data.path": "{inputs}/pairs.jsonl", "data.eval_fraction": 0.2, "data.max_tokens": 160}
SOURCES = [
    {"type": "model", "model": "{inputs}/scorer"},
    {"type": "function", "function": "story_rewards:joy", "weight": 0.5},
]
CASES: Mapping[str, Config] = {
    "ppo": {
        **{key: value for key, value in ONLINE.items() if key != "reward.function"},
        **TWO_RANKS,
        "reward.sources": SOURCES,
        "rollout.num_samples": 2,
        "critic.lr": 1e-3,
        "train.batch_size": 8,
        "algo.num_epochs": 2,
        "algo.kl.coef": 0.01,
    },
    "grpo": {**ONLINE, **TWO_RANKS, "train.batch_size": 16},
    "online-dpo": {**ONLINE, **TWO_RANKS, "train.batch_size": 8},
    "grpo-2-engines": {**ONLINE, "rollout.num_engines": 2, "train.batch_size": 16},
    "grpo-3-engines": {**ONLINE, "rollout.num_engines": 3, "train.batch_size": 16},
    "online-kto": {**ONLINE, "train.batch_size": 32},
    "sft": {**POLICY, **GIVEN, "data.path": "{inputs}/demonstrations.jsonl", "train.batch_size": 16},
    "rm": {**REWARD, **GIVEN, "train.batch_size": 8},
    "dpo": {**POLICY, **TWO_RANKS, **GIVEN, "train.batch_size": 8},
    "kto": {**POLICY, **GIVEN, "train.batch_size": 16},
    "prm": {**REWARD, **GIVEN, "data.path": "{inputs}/steps.jsonl", "train.batch_size": 8},
}
"""The config of each case, with the keys of the base revision. A case is a method, or one of `METHOD_OF`."""
METHOD_OF = {"grpo-2-engines": "grpo", "grpo-3-engines": "grpo"}


@dataclass(frozen=True, kw_only=True)
class Revision:
    """One state of the code, and where its runs go."""

    name: str
    code: Path
    runs: Path
    renamed_keys: Mapping[str, str]


class RunFailedError(Exception):
    """A run ended with an error."""


def main() -> int:
    options = read_options()
    unknown = set(options.only) - CASES.keys()
    if unknown:
        sys.exit(f"same_run: no method {', '.join(sorted(unknown))} (have {', '.join(CASES)}).")
    commit = git("rev-parse", "--verify", f"{options.base}^{{commit}}").decode().strip()
    with tempfile.TemporaryDirectory(prefix="same-run-") as temporary:
        scratch = Path(temporary)
        kept = options.keep.resolve() if options.keep else scratch
        base = Revision(name="base", code=scratch / "code", runs=kept / commit[:12], renamed_keys={})
        tree = Revision(name="now", code=ROOT, runs=kept / f"now-{ROOT.name}", renamed_keys=RENAMED_KEYS)
        base.code.mkdir()
        subprocess.run(["tar", "-x", "-C", base.code], input=git("archive", commit), check=True)
        inputs = base.runs / "inputs"
        if not inputs.exists():
            write_inputs(base.code / "configs" / "stories", scratch / "inputs")
            shutil.copytree(scratch / "inputs", inputs)
        rows = []
        for method in options.only or CASES:
            row = [method]
            try:
                before = result_of(base, method, inputs, options.lock, reuse=True)
                after = result_of(tree, method, inputs, options.lock, reuse=options.again)
                row += compare(before, after)
            except (RunFailedError, subprocess.TimeoutExpired) as error:
                print(error, file=sys.stderr)
                row += ["run failed"] * 3
            rows.append(row)
            print(" | ".join(row), flush=True)
    show(f"{options.base} and the working tree", ["method", "weights", "optimizer", "metrics"], rows)
    return int(any(not cell.startswith("same") for row in rows for cell in row[1:]))


def read_options() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="revision to compare the working tree with")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="methods, separated by commas")
    parser.add_argument("--keep", type=Path, help="folder that keeps the results for later calls")
    parser.add_argument("--again", action="store_true", help="compare the results of the last call with --keep again")
    parser.add_argument("--lock", type=Path, help="file to lock during each run, where others use the machine too")
    return parser.parse_args()


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, stdout=subprocess.PIPE).stdout


def write_inputs(stories: Path, folder: Path) -> None:
    """Write the rows, the reward function and the reward model that both revisions read: those of the base revision."""
    folder.mkdir()
    shutil.copy(stories / "rewards.py", folder / "story_rewards.py")
    for name in ("openings.jsonl", "pairs.jsonl"):
        shutil.copy(stories / name, folder / name)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    demonstrations = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    steps = []
    for index, pair in enumerate(pairs):
        order = [(pair["chosen"], True), (pair["rejected"], False)][:: 1 if index % 2 else -1]
        texts, labels = zip(*order, strict=True)
        steps.append({"prompt": pair["prompt"], "completions": texts, "labels": labels})
    for name, rows in (("demonstrations.jsonl", demonstrations), ("steps.jsonl", steps)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_pretrained(stories_model(), num_labels=1, dtype=torch.float32)
    scorer.save_pretrained(folder / "scorer")
    AutoTokenizer.from_pretrained(stories_model()).save_pretrained(folder / "scorer")


def stories_model() -> str:
    if "RLHF_TEST_DATA" not in os.environ:
        sys.exit("same_run: set RLHF_TEST_DATA to the folder that holds models/stories260k.")
    return str(Path(os.environ["RLHF_TEST_DATA"]).resolve() / "models" / "stories260k")


def result_of(revision: Revision, method: str, inputs: Path, lock: Path | None, *, reuse: bool) -> Path:
    """Run a method at a revision and return the run's folder.

    Args:
        reuse: take a finished run of the same config that is there already.

    Raises:
        RunFailedError: the run ended with an error.
    """
    config = config_of(revision, method, inputs)
    folder, finished = revision.runs / method, revision.runs / f"{method}.json"
    if reuse and finished.exists() and finished.read_text() == config:
        print(f"{method}, {revision.name}: stored", flush=True)
        return folder
    finished.unlink(missing_ok=True)
    for stale in (folder, revision.runs / REFERENCE_CACHE):
        shutil.rmtree(stale, ignore_errors=True)
    revision.runs.mkdir(parents=True, exist_ok=True)
    config_file, log = revision.runs / f"{method}.yaml", revision.runs / f"{method}.log"
    config_file.write_text(config)
    with held(lock), log.open("wb") as output:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.cli.main", "train", METHOD_OF.get(method, method), str(config_file)],
            cwd=revision.code,
            env=environment_of(revision, inputs),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        print(f"{method}, {revision.name}: {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RunFailedError(f"{method}, {revision.name}: exit code {done.returncode}. The end of its output:\n{last}")
    finished.write_text(config)
    return folder


def config_of(revision: Revision, method: str, inputs: Path) -> str:
    """The config file of a run: JSON, which is YAML too."""
    nested: dict[str, dict[str, object]] = {}
    flat = {**CASES[method], "run.name": method, "run.dir": str(revision.runs)}
    for old, value in flat.items():
        *sections, key = revision.renamed_keys.get(old, old).split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[key] = value  # type: ignore[assignment]
    return json.dumps(nested, indent=2).replace("{stories}", stories_model()).replace("{inputs}", str(inputs))


def environment_of(revision: Revision, inputs: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in CHANGES_RUNS and not k.startswith("RLHF__")}
    return {**kept, "PYTHONPATH": f"{revision.code}{os.pathsep}{inputs}", "CUDA_VISIBLE_DEVICES": ""}


@contextlib.contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Hold the lock on a file, if there is one to hold."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compare(before: Path, after: Path) -> list[str]:
    """The table's cells for one method: weights, optimizer, metrics."""
    last = Path("checkpoints") / f"step_{NUM_STEPS}"
    old = {renamed(name): text for name, text in without(DROPPED_METRICS, metrics_of(before)).items()}
    new = metrics_of(after)
    expected = old.keys() | without(ADDED_METRICS, new).keys()
    return [
        difference(dict(tensors_under(before / "model")), dict(tensors_under(after / "model"))),
        difference(dict(tensors_under(before / last)), dict(tensors_under(after / last))),
        difference(old, {name: text for name, text in new.items() if name in expected}),
    ]


def difference(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """`same (N values)`, or how many values differ and the first one."""
    differing = [name for name in before if name not in after or describe(before[name]) != describe(after[name])]
    differing += [name for name in after if name not in before]
    if not before:
        return "differs: the base has no values"
    if not differing:
        return f"same ({len(before)})"
    first = differing[0]
    others = sorted({name.partition(" at ")[0] for name in differing} - {first.partition(" at ")[0]})
    more = f"; also {', '.join(others[:MOST_NAMED])}{', ...' * (len(others) > MOST_NAMED)}" if others else ""
    changed = how(before.get(first), after.get(first))
    return f"differs: {len(differing)} of {len(before)}, first {first}: {changed}{more}"


def how(old: object, new: object) -> str:
    """In which way one value differs. None is a value that is not there."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (old.dtype, old.shape) == (new.dtype, new.shape):
            return f"by up to {(old.double() - new.double()).abs().max().item():.3g}"
        return f"{old.dtype} {list(old.shape)}, now {new.dtype} {list(new.shape)}"
    shown = ["a tensor" if isinstance(value, torch.Tensor) else str(value)[:60] for value in (old, new)]
    return f"{shown[0]}, now {shown[1]}"


def describe(value: object) -> object:
    """What two values that are the same have in common: type, shape and bits of a tensor, text of anything else."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous()
        return str(value.dtype), tuple(value.shape), whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(value)


def tensors_under(folder: Path) -> Iterator[tuple[str, object]]:
    """Every tensor and number in the safetensors and torch files of a folder, by file and place in it."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.name.startswith(UNSEEDED):
            continue
        if file.suffix == ".safetensors":
            yield from leaves(load_file(file), name)
        elif file.suffix == ".pt":
            yield from leaves(torch.load(file, map_location="cpu", weights_only=False), name)


def leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Tensors and numbers of nested containers. Texts and other objects say how a file was written, not what was
    learned."""
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    elif isinstance(value, torch.Tensor | int | float):
        yield name, value


def metrics_of(run: Path) -> dict[str, str]:
    """Every value of metrics.jsonl as it is written, by metric and step, without those of time and memory."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_float=str, parse_int=str) for line in lines]
    return {
        f"{name} at step {row['step']}": str(value)
        for row in rows
        for name, value in row.items()
        if not name.startswith(TIMED_METRICS)
    }


def renamed(name: str) -> str:
    """The present name of `METRIC at step N` of the base revision."""
    metric, at, step = name.partition(" at ")
    return RENAMED_METRICS.get(metric, metric) + at + step


def without(names: Iterable[str], metrics: Mapping[str, str]) -> dict[str, str]:
    """`METRIC at step N` -> value, but for the named metrics."""
    prefixes = tuple(name if name.endswith("/") else f"{name} at " for name in names)
    return {name: text for name, text in metrics.items() if not name.startswith(prefixes)}


if __name__ == "__main__":
    sys.exit(main())
