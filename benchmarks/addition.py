"""A model made on the spot learns two-digit addition: to about one half by SFT, to nine tenths and more by GRPO.

    python -m benchmarks.addition [--seed 0] [--folder runs/benchmarks/addition]

Two ordinary commands run, `rlhf train sft` and `rlhf train grpo`, with every part an actor of its own and rollouts by
vLLM; the reward is the exact-match rule. The 8,100 problems are split by chance: 512 are
held out from both. What is printed is the share of held-out problems answered right, sampled at temperature 1 as in
rollouts, and greedily.
"""

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.tables import show
from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import generate
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine
from rlhf.types import RolloutRequest, Sampling

NUM_HELD_OUT = 512
VOCAB_SIZE = 259
"""Bytes and three special tokens: every digit is a token."""
MAX_ANSWER_TOKENS = 4
"""Three digits and the end."""

Problem = tuple[int, int]


def settings(folder: Path, seed: int) -> dict[str, dict[str, object]]:
    """Flags of both commands."""
    common: dict[str, object] = {
        "run.dir": folder,
        "run.seed": seed,
        "checkpoint.every_steps": 1000,
        "checkpoint.keep": 1,
    }
    return {
        "sft": {
            **common,
            "run.name": "sft",
            "policy.model": folder / "base",
            "policy.lr": 1e-3,
            "data.path": folder / "known.jsonl",
            "data.max_tokens": 16,
            "policy.lr_schedule": "constant",
            "train.num_steps": 430,
            "train.batch_size": 256,
        },
        "grpo": {
            **common,
            "run.name": "grpo",
            "policy.model": folder / "sft" / "model",
            "policy.lr": 4e-4,
            "reward.rules": "exact-match",
            "data.path": folder / "known.jsonl",
            "data.label_key": "response",
            "data.eval_path": folder / "held_out.jsonl",
            "eval.every_steps": 20,
            "rollout.batch_size": 128,
            "rollout.group_size": 8,
            "rollout.max_prompt_tokens": 8,
            "rollout.max_response_tokens": MAX_ANSWER_TOKENS,
            "rollout.max_num_seqs": 512,
            "train.num_steps": 110,
            "train.batch_size": 512,
            "log.rollouts": False,
        },
    }


def make_world(folder: Path, seed: int) -> list[Problem]:
    """Write the problems, a tokenizer and an untrained model; returns the held-out problems."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(problems)
    held_out, known = problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:]
    for name, part in (("held_out", held_out), ("known", known)):
        rows = [{"prompt": asked(a, b), "response": str(a + b)} for a, b in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([], VOCAB_SIZE, folder / "base")
    num = make_llama(folder / "base", vocab_size=VOCAB_SIZE, hidden_size=128, num_layers=3, context=32, seed=seed)
    print(f"{len(known)} problems to learn from, {len(held_out)} held out, {num:,} parameters")
    return held_out


def asked(a: int, b: int) -> str:
    return f"{a}+{b}="


def train(command: str, flags: Mapping[str, object]) -> float:
    """Run one command, and return its seconds."""
    words = ["train", command, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    print(f"rlhf {shlex.join(words)}", flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "rlhf.cli.main", *words], check=True)
    return time.monotonic() - start


def share_right(model: Path, problems: Sequence[Problem], temperature: float) -> float:
    """Share of the problems that the model's answer solves."""
    tokenizer = load_tokenizer(str(model))
    section = RolloutSection(engine="transformers", max_response_tokens=MAX_ANSWER_TOKENS, max_num_seqs=NUM_HELD_OUT)
    engine = TransformersRolloutEngine(EngineSpec(section=section, model=str(model), dtype="float32", device="cpu"))
    sampling = Sampling(max_tokens=MAX_ANSWER_TOKENS, temperature=temperature, stop_token_ids=tokenizer.stop_token_ids)
    prompts = [np.array(tokenizer.encode(asked(a, b)), dtype=np.int64) for a, b in problems]
    requests = [
        RolloutRequest(id=str(i), prompt_id=str(i), prompt_token_ids=prompt, seed=i, sampling=sampling)
        for i, prompt in enumerate(prompts)
    ]
    answers = [tokenizer.decode(rollout.token_ids.tolist()) for rollout in generate(engine, requests)]
    return float(np.mean([text.strip() == str(a + b) for text, (a, b) in zip(answers, problems, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/addition"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    start = time.monotonic()
    held_out = make_world(folder, args.seed)
    rows = []
    for command, flags in settings(folder, args.seed).items():
        seconds = train(command, flags)
        shares = [share_right(folder / command / "model", held_out, temperature) for temperature in (1.0, 0.0)]
        rows.append([f"after {command}", *(f"{share:.1%}" for share in shares), f"{seconds:.0f}"])
        print(*rows[-1], flush=True)
    minutes = (time.monotonic() - start) / 60
    show(
        f"Two-digit addition, held-out problems, seed {args.seed}: {minutes:.1f} minutes",
        ["", "right when sampled", "right when greedy", "seconds"],
        rows,
    )


if __name__ == "__main__":
    main()
