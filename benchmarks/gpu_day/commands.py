"""The parts that are commands of this package: they need Ray, and vLLM on GPUs."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.gpu_day.setting import TEXTS, Figures, Setting
from rlhf.cli.calibrate import compared, run_config, steps_of
from rlhf.planning.hardware import GIB

REWARD = '''\
def length(prompts, responses, **columns):
    """The share of letters before n, which differs between almost any two responses."""
    return [sum(letter < "n" for letter in response) / (1 + len(response)) for response in responses]
'''
METHODS: Mapping[str, Mapping[str, int]] = {
    "ppo": {},
    "grpo": {"rollout.group_size": 4},
    "online-dpo": {},
    "online-kto": {"rollout.group_size": 4},
}
LINES = 3
"""Of what a command printed last, in an error."""


def rlhf(words: Sequence[object], folder: Path) -> str:
    """Run a command of ours, and return what it printed. Raises RuntimeError with its last lines."""
    command = [sys.executable, "-m", "rlhf.cli.main", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " | ".join((done.stdout + done.stderr).strip().splitlines()[-LINES:])
        raise RuntimeError(f"rlhf {words[0]}: exit code {done.returncode}: {last}")
    return done.stdout


def doctor(setting: Setting) -> Figures:
    """What `rlhf doctor` says of the machine."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.cli.main", "doctor"], capture_output=True, text=True, check=False
    )
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return [("exit code", str(done.returncode)), ("lines", str(len(lines))), ("last", lines[-1] if lines else "")]


def weight_sync(setting: Setting) -> Figures:
    """`rlhf bench sync`: policy and engine on the same GPU by CUDA IPC, or on two GPUs by NCCL."""
    sizes = "1" if setting.is_dry else "500"
    words = ["bench", "sync", "--sizes", sizes, "--repeats", "1" if setting.is_dry else "5", "--json"]
    if setting.is_dry:
        words += ["--rollout.engine", "transformers"]
    elif setting.num_gpus == 1:
        words += ["--colocate", "all", "--rollout.gpu-memory-utilization", "0.3"]
    (times,) = json.loads(rlhf(words, setting.folder).strip().splitlines()[-1])
    return [
        ("medium", times["medium"]),
        ("speed", f"{times['num_bytes'] / times['sync_s'] / 1e9:.2f} GB/s"),
        ("share of the collectives' speed", f"{times['share']:.0%}"),
    ]


def method(name: str, setting: Setting) -> Figures:
    """A run of `rlhf train NAME`: tokens a second, MFU, the phases of a step, and memory beside the plan."""
    folder, steps = setting.folder, 4 if setting.is_dry else 20
    (folder / "letters.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    size = 4 if setting.is_dry else 64
    flags: dict[str, object] = {
        "run.name": name,
        "policy.model": setting.model(),
        "policy.lr": 1e-5,
        "data.path": "prompts.jsonl",
        "data.template": "plain",
        "reward.function": "letters:length",
        "rollout.batch_size": size,
        "rollout.max_prompt_tokens": 64,
        "rollout.max_response_tokens": 8 if setting.is_dry else 512,
        # Online KTO learns from all responses of a step at once.
        "train.batch_size": size * (METHODS[name]["rollout.group_size"] if name == "online-kto" else 1),
        "train.num_steps": steps,
        "checkpoint.every_steps": 1000,
        "log.sample_every_steps": 0,
        **METHODS[name],
    }
    if setting.is_dry:
        flags["rollout.engine"] = "transformers"
    else:
        flags |= {"cluster.device": "cuda", "rollout.engine": "vllm", "train.max_tokens_per_micro_batch": 16384}
    if setting.num_gpus == 1 and not setting.is_dry:
        flags |= {"cluster.colocate": "[all]", "rollout.gpu_memory_utilization": 0.4}
    rlhf(["train", name, *(word for key, value in flags.items() for word in (f"--{key}", value))], folder)
    run = folder / "runs" / name
    return figures_of(run)


def figures_of(run: Path) -> Figures:
    """What a run measured, in medians of its steps without the first."""
    steps = steps_of(run)[1:]

    def middle(metric: str) -> float:
        values = [step.get(metric) for step in steps]
        return median([float(value) for value in values if isinstance(value, int | float)] or [0.0])

    step_s = middle("time/step")
    phases = ("generate", "score", "log_probs", "learn", "sync")
    shares = ", ".join(f"{phase} {middle(f'time/{phase}') / step_s:.0%}" for phase in phases)
    plan, found = compared(run_config(run), run, None)
    memory = ", ".join(
        f"{roles} {plan.processes[roles] / GIB:.1f} | {held / GIB:.1f}"
        for roles, held in found.memory.items()
        if roles in plan.processes
    )
    figures = [
        ("step", f"{step_s:.2f} s ({shares})"),
        ("tokens a second", f"{middle('throughput/tokens_per_s'):,.0f}"),
        ("mismatch of sampler and trainer", f"{middle('mismatch/log_prob'):.2e} nats"),
        ("memory, planned | measured, GiB", memory),
    ]
    return [
        *figures,
        *([("MFU of a step", f"{middle('throughput/mfu'):.1%}")] if "throughput/mfu" in steps[-1] else []),
    ]


def gpu_tests(setting: Setting) -> Figures:
    """`pytest tests/gpu`. Without a GPU each of its tests is skipped."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(root / "tests" / "gpu")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or ["no output"]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("; ".join([*failed, lines[-1]]))
    return [("result", lines[-1].strip("= "))]
