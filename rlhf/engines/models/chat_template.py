"""Which chat template of a tokenizer is used, and what a failing one is."""

from pathlib import Path
from typing import TypeAlias

from rlhf.errors import ModelError

Templates: TypeAlias = str | dict[str, str] | None
"""A tokenizer's chat template, or several by name."""

SUFFIX = ".jinja"
MAX_CAUSE = 300
"""Characters of a foreign exception that are shown."""


def choose_template(own: Templates, asked: str | None, *, key: str = "data.chat_template") -> Templates:
    """The template that `asked` names: one of a tokenizer's `own`, or a .jinja file. None: the tokenizer's own.

    Raises ModelError where there is no such template; `key` is the setting, for its text.
    """
    if asked is None:
        return own
    if isinstance(own, dict) and asked in own:
        return own[asked]
    file = Path(asked).expanduser()
    if file.suffix != SUFFIX and not file.is_file():
        have = f"has {', '.join(sorted(own))}" if isinstance(own, dict) else "has no templates with names"
        raise ModelError(f'{key}: "{asked}" is no {SUFFIX} file, and the tokenizer {have}.')
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{key}: {file} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{key}: {file} is not UTF-8 at byte {error.start}.") from error
    if not text.strip():
        raise ModelError(f"{key}: {file} is empty.")
    return text


def require_one(templates: Templates) -> None:
    """Raise ModelError where nothing says which chat template renders messages."""
    if not templates:
        raise ModelError(
            "tokenizer: no chat template; set data.template=plain, or data.chat_template to a .jinja file with one."
        )
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise ModelError(
            f"tokenizer: {len(templates)} chat templates ({names}) and none is called default; set data.chat_template "
            "to one of them."
        )


def cause_of(error: BaseException) -> str:
    """An exception as the end of a sentence, on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return text[:MAX_CAUSE] or type(error).__name__
