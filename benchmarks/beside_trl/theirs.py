"""TRL's half: `python -m benchmarks.beside_trl.theirs FOLDER` trains what the case in FOLDER says, in one process.

Each method goes through TRL's own trainer with plain transformers, float32, and TRL's defaults but for what makes the
two sides the same: batch and lengths, a constant learning rate, AdamW's settings, no gradient checkpointing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import psutil
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from benchmarks.beside_trl.cases import Case, even_share, read_case
from benchmarks.beside_trl.figures import Figures

CONFIGS: dict[str, type[TrainingArguments]] = {
    "sft": SFTConfig,
    "rm": RewardConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "grpo": GRPOConfig,
    "online-dpo": OnlineDPOConfig,
}
TRAINERS = {
    "sft": SFTTrainer,
    "rm": RewardTrainer,
    "dpo": DPOTrainer,
    "kto": KTOTrainer,
    "grpo": GRPOTrainer,
    "online-dpo": OnlineDPOTrainer,
}
OUTCOMES = {"grpo": "reward", "online-dpo": "objective/scores"}


class Watch(TrainerCallback):
    """When steps ended, and what was logged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.time())

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.time())

    def on_log(self, *args: object, logs: dict[str, float], **kwargs: object) -> None:  # type: ignore[override]
        self.logs.append(dict(logs))


class Reward:
    """The reward function, which also notes how long answers are."""

    __name__ = "even_share"

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        self.lengths += [len(completion.split()) for completion in completions]
        return even_share(prompts, completions)


def make_arguments(case: Case, folder: Path) -> TrainingArguments:
    """The same batch, lengths, optimizer and precision as ours."""
    own: dict[str, dict[str, object]] = {
        "sft": {"max_length": 1024},
        "rm": {"max_length": 1024},
        "dpo": {"max_length": 1024, "precompute_ref_log_probs": True},
        "kto": {"max_length": 1024, "precompute_ref_log_probs": True},
        "grpo": {
            "num_generations": case.group_size,
            "max_completion_length": case.max_tokens,
            "temperature": 1.0,
            "beta": 0.0,
        },
        "online-dpo": {"max_new_tokens": case.max_tokens, "max_length": 1024, "temperature": 1.0, "beta": [0.1]},
    }
    per_device = case.shape.num_answers if case.method == "grpo" else case.num_rows_a_step
    kind: type[Any] = CONFIGS[case.method]
    arguments: TrainingArguments = kind(
        output_dir=str(folder / "trl"),
        max_steps=case.num_steps,
        per_device_train_batch_size=per_device,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=case.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own[case.method],
    )
    return arguments


def train(case: Case, folder: Path) -> Figures:
    watch, reward = Watch(), Reward()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rewards: dict[str, Callable[..., object]] = {"reward_funcs": reward} if case.group_size > 1 else {}
    trainer = TRAINERS[case.method](
        model=str(folder / "model"),
        args=make_arguments(case, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[watch],
        **rewards,
    )
    trainer.train()
    outcome = OUTCOMES.get(case.method, "loss")
    lengths = [min(length + 1, case.max_tokens) for length in reward.lengths]
    return Figures(
        step_seconds=[end - start for start, end in zip(watch.times[:-1], watch.times[1:], strict=True)],
        outcome=[log[outcome] for log in watch.logs if outcome in log],
        startup_s=watch.times[0] - psutil.Process().create_time(),
        length_mean=sum(lengths) / max(1, len(lengths)),
        length_max=max(lengths, default=0),
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "theirs.json").write_text(json.dumps(asdict(train(read_case(place), place))))
