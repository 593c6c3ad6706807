"""Planned beside measured: GRPO on the CPU with models of three sizes, after a calibration by the middle one.

    python -m benchmarks.planning [--folder runs/benchmarks/planning] [--steps 8]

Each run is `rlhf train grpo` with the policy and a vLLM engine as actors of their own, on a model made on the spot. The
run of the middle size calibrates the plan (`rlhf plan --calibrate`); the table shows for every size what the plan then
says of memory and time, and what the run measured.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables import show
from rlhf.algorithms import build_algorithm
from rlhf.cli.calibrate import run_config, steps_of
from rlhf.cli.plan import config_json
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from rlhf.planning.calibration import NONE, Calibration, Measured, calibrated, measured
from rlhf.planning.cluster_shape import shape_of
from rlhf.planning.edits import edited
from rlhf.planning.hardware import GIB
from rlhf.planning.plan import PHASES, Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import place, shapes_of
from rlhf.planning.workload import workload

SIZES: Mapping[str, tuple[int, int]] = {"small": (256, 4), "middle": (512, 6), "large": (768, 10)}
"""Hidden size and layers."""
VOCAB_SIZE = 2048
REWARD = '''\
def score(prompts, responses, **columns):
    """The share of the letter e."""
    return [response.count("e") / max(1, len(response)) for response in responses]
'''


def prepare(folder: Path) -> None:
    """Models, prompts and a reward function."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = [f"tell me of the number {n} and what comes after it" for n in range(400)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (folder / "letters.py").write_text(REWARD)
    for name, (hidden, layers) in SIZES.items():
        train_tokenizer(texts, VOCAB_SIZE, folder / name)
        make_llama(folder / name, vocab_size=VOCAB_SIZE, hidden_size=hidden, num_layers=layers)


def train(folder: Path, size: str, steps: int) -> Path:
    """One run; returns its folder."""
    flags = {
        "policy.model": size,
        "data.path": "prompts.jsonl",
        "reward.function": "letters:score",
        "rollout.batch_size": 4,
        "rollout.group_size": 8,
        "rollout.max_prompt_tokens": 64,
        "rollout.max_response_tokens": 64,
        "rollout.kv_cache_gib": 0.25,
        "train.batch_size": 32,
        "train.num_steps": steps,
        "train.max_tokens_per_micro_batch": 1024,
        "checkpoint.every_steps": 1000,
        "run.name": f"run-{size}",
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "rlhf.cli.main", "train", "grpo", *words]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return folder / "runs" / f"run-{size}"


def planned(folder: Path, run: Path, calibration: Calibration) -> tuple[Plan, Measured]:
    """What a plan says of a run, and what the run says."""
    config = run_config(run)
    config = edited(config, {"policy.model": str(folder / str(config.models["policy"].model))})
    needs = build_algorithm(config.algo).needs
    found = measured(steps_of(run), PHASES, workload(config, needs).learned)
    shapes = shapes_of(config, needs, config_json)
    cluster = shape_of([], place(config, needs))
    return plan_run(config, needs, shapes, cluster, lengths=found.lengths, calibration=calibration), found


def row(size: str, plan: Plan, found: Measured) -> list[str]:
    """Planned, measured and their ratio: memory of both processes, and a step."""
    cells = [f"{size}, {plan.work.learned} x {plan.work.sequence_tokens:.0f} tokens"]
    for name, held in plan.processes.items():
        cells.append(f"{held / GIB:.2f} | {found.memory[name] / GIB:.2f} | {held / found.memory[name]:.2f}")
    cells.append(f"{plan.step_s:.2f} | {found.step_s:.2f} | {plan.step_s / found.step_s:.2f}")
    cells += [
        f"{plan.seconds[phase]:.2f} | {found.seconds.get(phase, 0.0):.2f}"
        for phase in ("generate", "log_probs", "learn")
    ]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/planning"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--again", action="store_true", help="plan again for runs that are there")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not args.again:
        prepare(folder)
        for size in SIZES:
            train(folder, size, args.steps)
    runs = {size: folder / "runs" / f"run-{size}" for size in SIZES}
    headings = ["planned | measured", "policy, GiB", "rollout, GiB", "step, s", "generate, s", "measure, s", "learn, s"]
    plan, found = planned(folder, runs["middle"], NONE)
    calibration = calibrated(found, plan)
    for title, used in (("as the sheets say", NONE), ("calibrated by the middle size", calibration)):
        show(title, headings, [row(size, *planned(folder, run, used)) for size, run in runs.items()])


if __name__ == "__main__":
    main()
