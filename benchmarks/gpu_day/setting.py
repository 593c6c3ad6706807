"""Where the parts of the day run, and what they give."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rlhf.engines.models.fresh_model import make_llama, train_tokenizer

Figures: TypeAlias = Sequence[tuple[str, str]]
"""What was measured, and its value with a unit."""
TEXTS = [f"Story {number} of a cat, a dog and {number * 7} mice." for number in range(500)]
VOCABULARY = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where the parts run. `is_dry`: on a CPU, with tiny models, to test the parts themselves."""

    folder: Path
    num_gpus: int
    is_dry: bool

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if self.is_dry else "cuda"

    @property
    def dtype(self) -> str:
        """What the parts compute in."""
        return "bfloat16"

    def model(self, *, small: bool = False) -> Path:
        """The folder of a random Llama, made on first use: 0.5 B parameters, or 10 M if `small`; in a dry run tiny."""
        size = "tiny" if self.is_dry else "small" if small else "half"
        vocab_size, hidden_size, num_layers = {
            "tiny": (VOCABULARY, 64, 2),
            "small": (VOCABULARY, 256, 12),
            "half": (32768, 1280, 24),
        }[size]
        folder = self.folder / size
        if not (folder / "config.json").exists():
            train_tokenizer(TEXTS, VOCABULARY, folder)
            make_llama(
                folder,
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                num_layers=num_layers,
                head_dim=64 if size == "half" else 32,
                context=4096,
            )
        return folder
