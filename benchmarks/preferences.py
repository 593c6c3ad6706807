"""What each loss on pairs learns, on pairs of a tiny model's own stories and on real ones.

    RLHF_TEST_DATA=FOLDER python -m benchmarks.preferences [dpo simpo kto ...] [--seeds 1] [--hh]

Stories: the model answers each opening 128 times, a rule (the joy of configs/stories/rewards.py) says which answers are
better, and `rlhf train dpo --loss ...` and `rlhf train kto` learn from the pairs of four fifths of the openings. The
table has the accuracy on the pairs of the others, and the rule's mean score of fresh answers to all openings by the
model before and after. --hh trains on all dialogues of the HH pairs that fit the model's context (longer answers are
cut; longer prompts dropped) once, with DPO.

A loss without a reference ranks a pair by the policy's log-probs, as its own metric does; KTO, whose own metrics know
no pairs, by the log-ratio to the untrained model.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.tables import show
from rlhf.config.rollout import RolloutSection
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine
from rlhf.types import PackedTokens

Pair = dict[str, str]

ROOT = Path(__file__).parents[1]
OPENINGS = ROOT / "configs" / "stories" / "openings.jsonl"
RULE = "configs.stories.rewards:joy"
METHODS = (
    *("dpo", "cdpo", "rdpo", "ipo", "hinge", "apo-zero", "apo-down", "rpo", "r-dpo", "ln-dpo", "discopop"),
    *("simpo", "slic", "orpo", "cpo"),
    "kto",
)
NUM_SAMPLES = 128
PAIRS_PER_OPENING = 12
NUM_FRESH = 8
OTHER: dict[str, dict[str, object]] = {
    **{loss: {"policy.lr": 1e-3} for loss in ("ipo", "simpo", "apo-zero", "apo-down", "discopop")},
    "slic": {"policy.lr": 1e-3, "algo.loss.delta": 10.0},
    "orpo": {"algo.loss.beta": 20.0},
    "cpo": {"policy.lr": 1e-3, "algo.loss.nll_coef": 0.03},
    "rpo": {"algo.loss.nll_coef": 0.1},
    "kto": {"train.num-epochs": 6},
}
"""What a loss needs beside the defaults to learn from this little: those whose gradient is small a larger step or
more of them, those that mix in the likelihood of chosen less of it, or more of the preference."""
STORIES: dict[str, object] = {
    "policy.lr": 3e-4,
    "data.max-tokens": 160,
    "train.batch-size": 32,
    "train.num-epochs": 3,
}


def rlhf(*arguments: object) -> None:
    """Run the command. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "rlhf.cli.main", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def as_flags(values: Mapping[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def sample(model: Path, out: Path, num_samples: int, seed: int) -> list[dict[str, object]]:
    """Answers to every opening, scored."""
    lengths = {"max-tokens": 64, "max-prompt-tokens": 64}
    flags = {"data.path": OPENINGS, "out": out, "reward.function": RULE, "num-samples": num_samples, "seed": seed}
    rlhf("sample", model, *as_flags({**flags, **lengths, "engine": "transformers"}))
    return [json.loads(line) for line in out.read_text().splitlines()]


def score(model: Path, folder: Path, seed: int) -> float:
    """The rule's mean score of fresh answers."""
    rows = sample(model, folder / f"{model.parent.name}-{seed}.jsonl", NUM_FRESH, 1000 + seed)
    return sum(score_of(row) for row in rows) / len(rows)


def score_of(row: Mapping[str, object]) -> float:
    reward = row["reward"]
    assert isinstance(reward, int | float)
    return float(reward)


def make_pairs(rows: list[dict[str, object]]) -> list[Pair]:
    """The best answers of each opening against its worst: the k-th best against the k-th worst, where they differ."""
    by_prompt = defaultdict(list)
    for row in rows:
        by_prompt[str(row["prompt"])].append(row)
    pairs = []
    for prompt, answers in by_prompt.items():
        ranked = sorted(answers, key=score_of, reverse=True)
        for good, bad in list(zip(ranked, reversed(ranked), strict=True))[:PAIRS_PER_OPENING]:
            if score_of(good) > score_of(bad) and good["response"] != bad["response"]:
                pairs.append(dict(prompt=prompt, chosen=str(good["response"]), rejected=str(bad["response"])))
    return pairs


def write_pairs(pairs: list[Pair], folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Split by opening, every fifth held out, into known.jsonl and held_out.jsonl."""
    openings = {prompt: index for index, prompt in enumerate(dict.fromkeys(pair["prompt"] for pair in pairs))}
    known = [pair for pair in pairs if openings[pair["prompt"]] % 5]
    held_out = [pair for pair in pairs if openings[pair["prompt"]] % 5 == 0]
    for name, part in (("known", known), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    return known, held_out


def train(folder: Path, method: str, name: str, flags: Mapping[str, object]) -> list[dict[str, float]]:
    """The figures of each step of `rlhf train`."""
    command = ["kto"] if method == "kto" else ["dpo", "--loss", method]
    quiet = {"log.tensorboard": "false", "run.dir": folder, "run.name": name}
    rlhf("train", *command, *as_flags({**flags, **quiet}))
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def ranked_right(model: Path, base: Path, pairs: list[Pair]) -> float:
    """Share of the pairs whose better answer has the larger log-ratio of `model` to `base`."""
    tokenizer = load_tokenizer(str(base))
    section = RolloutSection(engine="transformers")
    engines = [
        TransformersRolloutEngine(EngineSpec(section=section, model=str(m), dtype="float32", device="cpu"))
        for m in (model, base)
    ]
    prompts = [tokenizer.encode(pair["prompt"]) for pair in pairs]

    def log_ratios(side: str) -> list[float]:
        answers = [
            tokenizer.encode(pair["prompt"] + pair[side])[len(prompt) :]
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
        whole = [np.array([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        packed = [PackedTokens(token_ids=ids, lengths=np.array([len(ids)])) for ids in whole]
        ours, theirs = (engine.score(packed) for engine in engines)
        return [float((a - b)[-len(answer) :].sum()) for a, b, answer in zip(ours, theirs, answers, strict=True)]

    chosen, rejected = log_ratios("chosen"), log_ratios("rejected")
    return sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(pairs)


def stories(model: Path, folder: Path, methods: list[str], num_seeds: int) -> None:
    known, held_out = write_pairs(make_pairs(sample(model, folder / "samples.jsonl", NUM_SAMPLES, 0)), folder)
    before = score(model, folder, 0)
    data = {"policy.model": model, "data.path": folder / "known.jsonl", "data.eval-path": folder / "held_out.jsonl"}
    rows = []
    for method in methods:
        for seed in range(num_seeds):
            name = f"{method}-{seed}"
            last = train(folder, method, name, {**STORIES, **data, "run.seed": seed, **OTHER.get(method, {})})[-1]
            trained = folder / name / "model"
            accuracy = ranked_right(trained, model, held_out) if method == "kto" else last["eval/accuracy"]
            rows.append([method, str(seed), f"{accuracy:.3f}", f"{score(trained, folder, seed):.3f}"])
            print(*rows[-1], flush=True)
    title = f"{len(known)} pairs of stories, {len(held_out)} held out; rule's score before: {before:.3f}"
    show(title, ["method", "seed", "held-out accuracy", "score after"], rows)


def dialogues(model: Path, data: Path, folder: Path) -> None:
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    flags = {
        "policy.model": model,
        "policy.lr": 1e-4,
        "data.path": data,
        "data.eval-fraction": 0.1,
        "data.max-tokens": context,
        "data.overlong": "truncate",
        "data.max-bad-rows": 100,
        "train.batch-size": 32,
        "eval.max-prompts": 1000,
    }
    steps = train(folder, "dpo", "hh", flags)
    losses = [step["policy/loss"] for step in steps]
    assert all(math.isfinite(loss) for loss in losses)
    last = steps[-1]
    dropped = {reason: sum(s[f"pairs/{reason}"] for s in steps) for reason in ("tied", "identical", "empty")}
    title = f"HH pairs: {last['data/position']:.0f} rows once, {dropped} dropped as pairs, {len(steps)} steps"
    figures = [f"{losses[0]:.4f}", f"{sum(losses[-10:]) / 10:.4f}", f"{last['eval/accuracy']:.3f}"]
    show(
        title,
        ["loss", "first", "last ten", "held-out accuracy", "pairs"],
        [["dpo", *figures, f"{last['eval/num_pairs']:.0f}"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; none: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--hh", action="store_true", help="train on the HH pairs instead")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown method {', '.join(unknown)}; have {', '.join(METHODS)}")
    if "RLHF_TEST_DATA" not in os.environ:
        parser.error("set RLHF_TEST_DATA to the folder that holds models/stories260k and data/hh-rlhf")
    given = Path(os.environ["RLHF_TEST_DATA"])
    model = given / "models" / "stories260k"
    with tempfile.TemporaryDirectory() as name:
        if args.hh:
            dialogues(model, given / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz", Path(name))
        else:
            stories(model, Path(name), args.methods or list(METHODS), args.seeds)


if __name__ == "__main__":
    main()
