"""What each loss on pairs learns, on pairs of a tiny model's own stories and on real ones.

    RLHF_TEST_DATA=FOLDER python benchmarks/preferences.py [--losses dpo,simpo] [--seeds 1] [--hh]

Stories: the model answers each opening 64 times, a rule (configs/stories/rewards.py) says which answers are better, and
`rlhf train dpo --loss ...` learns from the pairs of four fifths of the openings. Printed are the accuracy on the pairs
of the others, and the rule's mean score of fresh answers by the model before and after. --hh trains on all dialogues of
the HH pairs that fit the model's context (longer answers are cut; longer prompts dropped) once, with DPO.
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

from tables import show

ROOT = Path(__file__).parents[1]
OPENINGS = ROOT / "configs" / "stories" / "openings.jsonl"
RULE = "configs.stories.rewards:lipogram"
LOSSES = (
    *("dpo", "cdpo", "rdpo", "ipo", "hinge", "apo-zero", "apo-down", "rpo", "r-dpo", "ln-dpo", "discopop"),
    *("simpo", "slic", "orpo", "cpo"),
)
NUM_SAMPLES = 64
PAIRS_PER_OPENING = 10
NUM_FRESH = 8
LR = 3e-4
STORIES = {
    "policy.lr": LR,
    "data.eval-fraction": 0.2,
    "data.max-tokens": 160,
    "train.batch-size": 32,
    "train.num-epochs": 2,
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


def make_pairs(rows: list[dict[str, object]], path: Path) -> int:
    """The best answers of each opening against its worst: the k-th best against the k-th worst, where they differ."""
    by_prompt = defaultdict(list)
    for row in rows:
        by_prompt[str(row["prompt"])].append(row)
    pairs = []
    for prompt, answers in by_prompt.items():
        ranked = sorted(answers, key=score_of, reverse=True)
        for chosen, rejected in list(zip(ranked, reversed(ranked), strict=True))[:PAIRS_PER_OPENING]:
            if score_of(chosen) > score_of(rejected) and chosen["response"] != rejected["response"]:
                pairs.append({"prompt": prompt, "chosen": chosen["response"], "rejected": rejected["response"]})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return len(pairs)


def train(folder: Path, name: str, flags: Mapping[str, object]) -> list[dict[str, float]]:
    """The figures of each step of `rlhf train dpo`."""
    quiet = {"log.tensorboard": "false", "run.dir": folder, "run.name": name}
    rlhf("train", "dpo", *as_flags({**flags, **quiet}))
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def stories(model: Path, folder: Path, losses: list[str], num_seeds: int) -> None:
    num_pairs = make_pairs(sample(model, folder / "samples.jsonl", NUM_SAMPLES, 0), folder / "pairs.jsonl")
    before = score(model, folder, 0)
    rows = []
    for loss in losses:
        for seed in range(num_seeds):
            name = f"{loss}-{seed}"
            flags = {"loss": loss, "policy.model": model, "data.path": folder / "pairs.jsonl", "run.seed": seed}
            steps = train(folder, name, {**STORIES, **flags})
            last, after = steps[-1], score(folder / name / "model", folder, seed)
            figures = ("eval/accuracy", "eval/margin", "eval/loss", "eval/chosen_log_prob")
            rows.append([loss, str(seed), *(f"{last[figure]:.3f}" for figure in figures), f"{after:.3f}"])
            print(*rows[-1], flush=True)
    title = f"{num_pairs} pairs of stories; rule's score before: {before:.3f}"
    show(title, ["loss", "seed", "held-out accuracy", "margin", "loss", "chosen log-prob", "score after"], rows)


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
    steps = train(folder, "hh", flags)
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
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--hh", action="store_true", help="train on the HH pairs instead")
    args = parser.parse_args()
    given = Path(os.environ["RLHF_TEST_DATA"])
    model = given / "models" / "stories260k"
    with tempfile.TemporaryDirectory() as name:
        if args.hh:
            dialogues(model, given / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz", Path(name))
        else:
            stories(model, Path(name), args.losses.split(","), args.seeds)


if __name__ == "__main__":
    main()
