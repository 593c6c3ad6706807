"""`rlhf example stories`: the model and the rows that the CPU configs of this project use, made on the spot."""

import json
import random
import shlex
import time
from pathlib import Path

from rlhf.cli.made_folder import clear_folder, run_command, train_command, write_config, write_rows
from rlhf.cli.stories import demonstrations, labeled, openings, pairs
from rlhf.config.tools import ExampleConfig
from rlhf.terminal import rich_console
from rlhf.types import Json

MARKER = "stories.json"
COMMAND = "example stories"
VOCAB_SIZE = 384
STORIES_EACH = 20
PAIRS_EACH = 4
SEQUENCE_TOKENS = 128


def run_example(config: ExampleConfig) -> int:
    """Make the data, train the model, say where they are. Returns the exit code.

    Raises:
        ConfigError: the folder exists and holds something else.
    """
    folder = Path(config.folder)
    console = rich_console()
    start = time.monotonic()
    make_stories(folder, config.seed)
    words = train_command("sft", folder / "sft.yaml")
    console.print(f"Stories, pairs and labels are in {folder}. A tiny Llama learns to write such stories:")
    console.rule(shlex.join(words))
    if code := run_command(words, COMMAND):
        return code
    model = folder / "sft" / "model"
    seconds = time.monotonic() - start
    console.print(f"Took {seconds:.0f} s. The model is in {model}. What to do with it:", soft_wrap=True)
    prompt = shlex.quote(openings()[0][0])
    for line in (
        f"rlhf generate {model} --max-tokens 64 --prompt {prompt}",
        f"rlhf data preferences --data.path {folder}/pairs.jsonl --tokenizer {model}",
        "rlhf train grpo configs/grpo_stories_cpu.yaml",
    ):
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    return 0


def make_stories(folder: Path, seed: int) -> None:
    """Write the rows, a tokenizer, the untrained model and the config that trains it."""
    from rlhf.engines.models.fresh_model import make_llama, train_tokenizer  # noqa: PLC0415  torch is slow to import

    clear_folder(folder, MARKER, COMMAND)
    (folder / MARKER).write_text(json.dumps({"seed": seed}))
    rng = random.Random(seed)
    shown, paired = demonstrations(STORIES_EACH, rng), pairs(PAIRS_EACH, rng)
    write_rows(folder / "demonstrations.jsonl", shown)
    write_rows(folder / "pairs.jsonl", paired)
    write_rows(folder / "labeled.jsonl", labeled(paired))
    write_rows(folder / "openings.jsonl", [{"prompt": opening} for opening, _ in openings()])
    train_tokenizer((row["prompt"] + row["response"] for row in shown), VOCAB_SIZE, folder / "base")
    make_llama(folder / "base", vocab_size=VOCAB_SIZE, hidden_size=128, num_layers=2, context=256, seed=seed)
    write_config(folder / "sft.yaml", sft_config(folder, seed))


def sft_config(folder: Path, seed: int) -> dict[str, Json]:
    """How the model is trained."""
    return {
        "run": {"name": "sft", "dir": str(folder), "seed": seed},
        "policy": {"model": str(folder / "base"), "lr": 3e-3},
        "data": {"path": str(folder / "demonstrations.jsonl"), "max_tokens": SEQUENCE_TOKENS},
        "train": {"num_steps": 100, "batch_size": 64},
        "checkpoint": {"every_steps": 1000, "keep": 1},
    }
