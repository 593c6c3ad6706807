"""A tokenizer small enough to read, and helpers to write rows and read back complaints."""

import json
import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.engines.base import Tokenizer
from rlhf.errors import DataError, ModelError
from rlhf.orchestrator.data import DataSplit, load_groups
from rlhf.types import Json, Message, ScoredGroup, TokenIds

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


class LetterTokenizer:
    """One token a character, but for special tokens and `merges`. The template is ChatML where `chat` is set."""

    def __init__(self, *, chat: bool = False, merges: Sequence[str] = (), strips_history: bool = False) -> None:
        self.has_chat_template = chat
        self.eos_token_id = 1
        self.pad_token_id = 1
        self.stop_token_ids: tuple[int, ...] = (1, 3) if chat else (1,)
        self.control_tokens: tuple[str, ...] = SPECIAL
        self._chat = chat
        self._strips_history = strips_history
        self._units = [*SPECIAL, *merges]
        self._ids = {unit: index for index, unit in enumerate(self._units)}
        self._pattern = re.compile("|".join([*map(re.escape, self._units), "."]), re.DOTALL)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids = [self._ids[unit] if unit in self._ids else 100 + ord(unit) for unit in self._pattern.findall(text)]
        return [0, *ids] if add_special_tokens else ids

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool = True) -> str:
        texts = [self._units[token] if token < 100 else chr(token - 100) for token in token_ids]
        return "".join(text for text in texts if not (skip_special_tokens and text in SPECIAL))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Json] = ()) -> str:
        if not self._chat:
            raise ModelError("tokenizer: no chat template; set data.template=plain.")
        if messages[0].role == "tool":
            raise DataError("the chat template refuses the messages: no tool first.")
        contents = [turn.content for turn in messages]
        if self._strips_history:
            contents[:-1] = ["..." for _ in contents[:-1]]
        turns = [
            f"<|im_start|>{turn.role}\n{content}<|im_end|>\n" for turn, content in zip(messages, contents, strict=True)
        ]
        return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def fingerprint(self) -> str:
        return sha256(repr((self._units, self._chat)).encode()).hexdigest()


PLAIN: Tokenizer = LetterTokenizer()
CHAT: Tokenizer = LetterTokenizer(chat=True)


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_demonstrations(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    return load_groups(section, tokenizer, RowKind.DEMONSTRATIONS)


def load_preferences(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    return load_groups(section, tokenizer, RowKind.PREFERENCES)


def load_labeled(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    return load_groups(section, tokenizer, RowKind.LABELED)


def load_steps(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    return load_groups(section, tokenizer, RowKind.STEPS)


def load_texts(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    return load_groups(section, tokenizer, RowKind.TEXTS)


def section(path: Path | str, **keys: object) -> DataSection:
    return DataSection.model_validate({"path": str(path), **keys})


def complaints(error: pytest.ExceptionInfo[DataError]) -> list[str]:
    """The lines a user gets."""
    assert error.value.exit_code == 3
    return list(error.value.problems)
