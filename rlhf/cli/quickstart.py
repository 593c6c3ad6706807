"""`rlhf quickstart`: the three steps of RLHF on a model of a million parameters, in minutes, on a laptop.

Everything is made on the spot: a corpus, preferences, a tokenizer, a tiny Llama. Then the ordinary commands run, each
shown as it would be typed: `rlhf train sft`, then rm, then ppo. A table at the end says what was learned.
"""

import json
import random
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf.cli.made_folder import clear_folder, run_command, train_command, write_config, write_rows
from rlhf.cli.zoo import Question, all_questions, demonstrations, preferences, true_score
from rlhf.config.rollout import RolloutSection
from rlhf.config.tools import QuickstartConfig
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.terminal import rich_console
from rlhf.types import Json, PackedTokens, Rollout, RolloutRequest, Sampling

FORMAT = "Visitor: {prompt}\nKeeper:"
NUM_HELD_OUT = 16
NUM_JUDGED = 8
"""Sampled responses to each held-out question."""
MAX_ANSWER_TOKENS = 48
MARKER = "zoo.json"
STAGES = ("sft", "rm", "ppo")


def stage_configs(folder: Path, seed: int) -> dict[str, dict[str, Json]]:
    """The config of each step, as a user would write it."""
    run: dict[str, Json] = {"dir": str(folder / "runs"), "seed": seed}
    text: dict[str, Json] = {"prompt_format": FORMAT, "max_tokens": 128}
    model = {stage: str(folder / "runs" / stage / "model") for stage in ("sft", "rm")}
    return {
        "sft": {
            "run": run | {"name": "sft"},
            "policy": {"model": str(folder / "base"), "lr": 2e-3},
            "data": text | {"path": str(folder / "demonstrations.jsonl")},
            "train": {"num_steps": 150, "batch_size": 64},
            "checkpoint": {"every_steps": 1000, "keep": 1},
        },
        "rm": {
            "run": run | {"name": "rm"},
            "reward": {"model": model["sft"], "lr": 1e-3},
            "data": text | {"path": str(folder / "preferences.jsonl"), "eval_fraction": 0.1},
            "train": {"num_steps": 40, "batch_size": 32},
            "checkpoint": {"every_steps": 1000, "keep": 1},
        },
        "ppo": {
            "run": run | {"name": "ppo"},
            "policy": {"model": model["sft"], "lr": 3e-4},
            "critic": {"lr": 1e-3},
            "reward": {"model": model["rm"]},
            "data": text | {"path": str(folder / "prompts.jsonl")},
            "train": {"num_steps": 30, "batch_size": 32},
            "rollout": {
                "batch_size": 64,
                "max_prompt_tokens": 64,
                "max_response_tokens": MAX_ANSWER_TOKENS,
            },
            "algo": {"kl": {"coef": 0.1}, "normalize_rewards": True, "num_epochs": 2},
            "checkpoint": {"every_steps": 20, "keep": 1},
            "log": {"sample_every_steps": 10},
        },
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """A model's responses to the held-out questions, measured."""

    greedy: list[str]
    """Its greedy response to each question."""
    true_score: float
    length: float
    kl: float
    """KL to the model after SFT, in nats a response."""


def run_quickstart(config: QuickstartConfig) -> int:
    """Make the data, run the three steps, show what they changed. Returns the exit code: that of the step that failed,
    which has printed its error.

    Raises:
        ConfigError: the folder exists and holds something else.
    """
    folder, seed = Path(config.folder), config.seed
    console = rich_console()
    start = time.monotonic()
    held_out = make_zoo(folder, seed)
    console.print(f"A zoo keeper's world is in {folder}: demonstrations, preferences, a tokenizer and a tiny Llama.")
    for stage, settings in stage_configs(folder, seed).items():
        path = folder / f"{stage}.yaml"
        write_config(path, settings)
        command = train_command(stage, path)
        console.rule(f"[bold]{STAGES.index(stage) + 1} of {len(STAGES)}[/bold]: {shlex.join(command)}")
        if code := run_command(command, "quickstart"):
            return code
    report(folder, held_out, seed, console)
    console.print(f"Took {(time.monotonic() - start) / 60:.1f} minutes. Everything is in {folder}.")
    return 0


def make_zoo(folder: Path, seed: int) -> list[Question]:
    """Write the data and the untrained model; returns the questions that are not in the training data."""
    from rlhf.engines.models.fresh_model import make_llama, train_tokenizer  # noqa: PLC0415  torch is slow to import

    clear_folder(folder, MARKER, "quickstart")
    rng = random.Random(seed)
    questions = all_questions()
    rng.shuffle(questions)
    held_out, known = questions[:NUM_HELD_OUT], questions[NUM_HELD_OUT:]
    (folder / MARKER).write_text(json.dumps({"seed": seed, "held_out": [question.text for question in held_out]}))
    shown = demonstrations(known, 24, rng)
    write_rows(folder / "demonstrations.jsonl", [with_space(row) for row in shown])
    write_rows(folder / "preferences.jsonl", [with_space(row) for row in preferences(known, 16, rng)])
    write_rows(folder / "prompts.jsonl", [{"prompt": question.text} for question in known])
    texts = [FORMAT.format(prompt=row["prompt"]) + " " + row["response"] for row in shown]
    texts += [FORMAT.format(prompt=question.text) for question in held_out]
    vocab_size = 512
    train_tokenizer(texts, vocab_size, folder / "base")
    make_llama(folder / "base", vocab_size=vocab_size, hidden_size=128, num_layers=3, context=256, seed=seed)
    return held_out


def with_space(row: Mapping[str, str]) -> dict[str, str]:
    """A row whose answers start with the space that follows "Keeper:"."""
    return {key: value if key == "prompt" else f" {value}" for key, value in row.items()}


def report(folder: Path, held_out: Sequence[Question], seed: int, console: Console) -> None:
    """The final table, three responses before and after, and where the model is."""
    models = {stage: folder / "runs" / stage / "model" for stage in ("sft", "ppo")}
    before, after = (judge(models[stage], models["sft"], held_out, seed) for stage in ("sft", "ppo"))
    rewards = [
        json.loads(line)["reward/mean_all"]
        for line in (folder / "runs" / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    table = Table(title="Held-out questions: what PPO changed")
    for heading in ("", "after SFT", "after PPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    measures = {
        "true score, 0 to 1 (no model saw this rule)": (before.true_score, after.true_score),
        "reward (by the reward model; first and last step)": (rewards[0], rewards[-1]),
        "KL to the SFT model, nats a response": (before.kl, after.kl),
        "length, tokens": (before.length, after.length),
    }
    for name, values in measures.items():
        table.add_row(name, *(f"{value + 0.0:.2f}" for value in values))
    console.print(table)
    for question, old, new in list(zip(held_out, before.greedy, after.greedy, strict=True))[:3]:
        console.print(f"[bold]Visitor:[/bold] {question.text}")
        console.print(f"  after SFT:{old}")
        console.print(f"  after PPO:{new}")
    page = folder / "runs" / "ppo" / "report.html"
    console.print(f"The report of PPO, to open in a browser: {page.absolute()}", soft_wrap=True)
    console.print(f"The model is in {models['ppo']}. Talk to it:")
    prompt = shlex.quote(held_out[0].text)
    console.print(f"  rlhf generate {models['ppo']} --max-tokens {MAX_ANSWER_TOKENS} --prompt {prompt}", soft_wrap=True)


def judge(model: Path, origin: Path, questions: Sequence[Question], seed: int) -> Verdict:
    """Let `model` respond to each question once greedily and several times by sampling, and measure the samples."""
    from rlhf.engines.base import generate  # noqa: PLC0415
    from rlhf.engines.models.tokenizer import load_tokenizer  # noqa: PLC0415
    from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine  # noqa: PLC0415  torch is slow to import

    tokenizer = load_tokenizer(str(model))
    prompts = [np.array(tokenizer.encode(FORMAT.format(prompt=q.text)), dtype=np.int64) for q in questions]
    section = RolloutSection(engine="transformers", max_response_tokens=MAX_ANSWER_TOKENS, max_num_seqs=128)

    def answers(temperature: float, num_samples: int) -> list[Rollout]:
        sampling = Sampling(
            max_tokens=MAX_ANSWER_TOKENS, temperature=temperature, stop_token_ids=tokenizer.stop_token_ids
        )
        engine = TransformersRolloutEngine(EngineSpec(section=section, model=str(model), dtype="float32", device="cpu"))
        return generate(
            engine,
            [
                RolloutRequest(
                    id=f"{index}/{sample}",
                    prompt_id=str(index),
                    prompt_token_ids=prompt,
                    seed=seed + sample,
                    sampling=sampling,
                )
                for index, prompt in enumerate(prompts)
                for sample in range(num_samples)
            ],
        )

    sampled = answers(1.0, NUM_JUDGED)
    texts = [tokenizer.decode(rollout.token_ids) for rollout in sampled]
    repeated = [question for question in questions for _ in range(NUM_JUDGED)]
    reference = TransformersRolloutEngine(EngineSpec(section=section, model=str(origin), dtype="float32", device="cpu"))
    sequences = [
        np.concatenate([prompts[int(rollout.prompt_id)], rollout.token_ids]).astype(np.int64) for rollout in sampled
    ]
    scored = reference.score([PackedTokens(token_ids=ids, lengths=np.array([len(ids)])) for ids in sequences])
    gaps = [
        float(rollout.log_probs.sum() - log_probs[-len(rollout.token_ids) :].sum())
        for rollout, log_probs in zip(sampled, scored, strict=True)
    ]
    return Verdict(
        greedy=[tokenizer.decode(rollout.token_ids) for rollout in answers(0.0, 1)],
        true_score=float(np.mean([true_score(q, text) for q, text in zip(repeated, texts, strict=True)])),
        length=float(np.mean([len(rollout.token_ids) for rollout in sampled])),
        kl=round(float(np.mean(gaps)), 3),
    )
