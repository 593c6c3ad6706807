"""A model's tokenizer, based on transformers' fast tokenizers."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers

from rlhf.conversations.forms import Form, forms_for, write
from rlhf.conversations.lost import lost_messages, python_arguments
from rlhf.engines.models.byte_level import TokenBytes, is_byte_level, special_ids
from rlhf.engines.models.chat_template import Templates, cause_of, choose_template, require_one
from rlhf.engines.models.hub import require_found
from rlhf.engines.models.plain_tokenizer import FastTokenizer, read_plain_tokenizer
from rlhf.engines.models.turn_ends import Turn, special_texts, turn_ends, turn_marks
from rlhf.errors import DataError, ModelError
from rlhf.types import Json, Message, TokenIds

logger = logging.getLogger(__name__)

PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<unk>")
"""Pad tokens for a tokenizer that defines none, in order of preference."""


class HfTokenizer:
    """A fast tokenizer behind the Tokenizer protocol. Thread-safe: it uses the backend, which `encode`
    and `decode` do not change."""

    def __init__(
        self,
        tokenizer: FastTokenizer,
        *,
        stop_token_ids: Sequence[int] = (),
        chat_template: Templates = None,
    ) -> None:
        """`chat_template` is used in place of the tokenizer's own."""
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ModelError("tokenizer: no EOS token, so that no response could end; set eos_token.")
        self._tokenizer = tokenizer
        self._templates = chat_template or tokenizer.chat_template
        self.has_chat_template = bool(self._templates)
        self._wants_parts = False
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        # A tokenizer file may contain the truncation that it was trained with, which would silently cut texts.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_token_id = eos
        self.pad_token_id = _choose_pad(tokenizer, eos)
        ends = turn_ends(self._render, tokenizer) if self.has_chat_template else []
        self.stop_token_ids = tuple(dict.fromkeys([eos, *stop_token_ids, *ends]))
        self._bytes: dict[bool, TokenBytes] | None = None
        """Where a table decodes: that with special tokens, and that without."""
        if is_byte_level(self._backend):
            left_out = {*self.stop_token_ids, *special_ids(self._backend)}
            self._bytes = {False: TokenBytes(self._backend), True: TokenBytes(self._backend, left_out)}
        stops = (token for number in self.stop_token_ids if (token := self._backend.id_to_token(number)))
        marks = turn_marks(self._render, tokenizer) if self.has_chat_template else []
        self.control_tokens = tuple(dict.fromkeys([*special_texts(tokenizer), *stops, *marks]))
        self._first = self._backend.encode("a", add_special_tokens=True).ids
        self._first = self._first[: self._first.index(self.encode("a")[0])]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. `add_special_tokens` adds what the model expects at the beginning (BOS), but nothing at
        the end, whatever the tokenizer's own setting, because a response follows."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._first, *ids] if add_special_tokens else ids

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, without cleaning up spaces. Stop tokens count as special."""
        if self._bytes is not None:
            return self._bytes[skip_special_tokens].decode(token_ids)
        stops = self.stop_token_ids if skip_special_tokens else ()
        kept = [token for token in np.asarray(token_ids, dtype=np.int64).tolist() if token not in stops]
        return self._backend.decode(kept, skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Json] = ()) -> str:
        """Apply the chat template to messages in the form of which it shows most: templates differ in what they read.
        Raises ModelError if there is none, DataError if it rejects the messages or fails on them."""
        best: tuple[int, int, str] | None = None
        used = Form()
        refusals: list[DataError] = []
        template = str(self._templates)
        for form in sorted(forms_for(messages, template), key=lambda form: form.parts != self._wants_parts):
            if best is not None and best[0] == 0 and replace(form, reasoning=used.reasoning) != used:
                continue  # all but thoughts is shown
            turns = [write(message, form) for message in messages]
            try:
                text = self._render(turns, add_generation_prompt=add_generation_prompt, tools=tools)
            except DataError as error:
                refusals.append(error)
                continue
            lost = lost_messages(messages, text)
            unsaid = sum(not one.thought for one in lost) + python_arguments(messages, text)
            # A template that takes contents for texts shows lists of parts as Python prints them.
            unsaid += sum(isinstance(turn["content"], list) and str(turn["content"]) in text for turn in turns)
            if best is None or (unsaid, len(lost)) < best[:2]:
                best, used = (unsaid, len(lost), text), form
            if unsaid == len(lost) == 0:
                break
        if best is None:
            raise refusals[0]
        self._wants_parts = used.parts
        return best[2]

    def fingerprint(self) -> str:
        """sha256 of vocabulary, special ids and the tokenizer's own chat template.

        A template that the config names is not part of it: models that were trained with it exchange the tokens that
        it makes.
        """
        tokenizer = self._tokenizer
        special = [self.eos_token_id, self.pad_token_id, tokenizer.bos_token_id, sorted(tokenizer.all_special_ids)]
        content = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False, tools: Sequence[Json] = ()) -> str:
        import jinja2  # noqa: PLC0415  slow to import, and texts need no template

        require_one(self._templates)
        try:
            text = self._tokenizer.apply_chat_template(
                list(turns),  # type: ignore[arg-type]
                chat_template=self._templates if isinstance(self._templates, str) else None,
                tools=list(tools) or None,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"tokenizer: the chat template, line {error.lineno}: {cause_of(error)}.") from error
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {cause_of(error)}.") from error
        except Exception as error:
            # A template may raise anything: it is the user's file, and so is what is wrong with it.
            raise DataError(f"the chat template fails: {cause_of(error)}.") from error
        return str(text)


def load_tokenizer(
    path: str,
    *,
    key: str = "policy.model",
    trust_remote_code: str | None = None,
    chat_template: str | None = None,
    template_key: str = "data.chat_template",
    plain: bool = False,
) -> HfTokenizer:
    """The tokenizer of a model folder or hub name.

    `key` is its config key, for errors; `trust_remote_code` is None or repo@commit; `chat_template` is the name of one
    of its templates, or a .jinja file, and `template_key` the key of that. A response stops at the EOS token, at those
    of generation_config.json, and at the tokens that end a turn of the chat template. With `plain`, transformers is
    not imported for files that need none of it (`plain_tokenizer.py`).
    Raises ModelError.
    """
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or folder.exists()
    if looks_local and not folder.is_dir():
        raise ModelError(f"{key}: {path} is no folder.")
    name = str(folder) if looks_local else path
    if not looks_local:
        require_found(path, key)
    try:
        generation: Path | None = folder / "generation_config.json"
        tokenizer: FastTokenizer | None = None
        if plain and looks_local and trust_remote_code is None:
            tokenizer = read_plain_tokenizer(folder)
        if tokenizer is None:
            tokenizer, generation = _by_transformers(name, path, key, trust_remote_code)
        return HfTokenizer(
            tokenizer,
            stop_token_ids=_stop_tokens(generation, key) if generation is not None and generation.exists() else (),
            chat_template=choose_template(tokenizer.chat_template, chat_template, key=template_key),
        )
    except ModelError:
        raise
    except BaseException as error:
        # The files may be anything, and so may what their readers raise; the Rust part's panics are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{key}: {path} {_explain(error, folder if looks_local else None)}") from error


def _by_transformers(
    name: str, path: str, key: str, trust_remote_code: str | None
) -> tuple[FastTokenizer, Path | None]:
    """A tokenizer as transformers reads it, and generation_config.json, if there is one. Raises ModelError for a
    tokenizer that is not fast, and whatever transformers raises."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415  takes seconds
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    revision = trust_remote_code.partition("@")[2] if trust_remote_code else ""
    tokenizer = AutoTokenizer.from_pretrained(
        name, trust_remote_code=trust_remote_code is not None, revision=revision or "main"
    )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{key}: {path} has no fast tokenizer (tokenizer.json).")
    try:
        file = cached_file(
            name, "generation_config.json", revision=revision or "main", _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        file = None
    return tokenizer, None if file is None else Path(file)


def _stop_tokens(file: Path, key: str) -> list[int]:
    """The end tokens of generation_config.json. Raises ModelError where it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{key}: {file} is no JSON object.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{key}: {file} is no JSON object.")
    stop = content.get("eos_token_id")
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stops):
        raise ModelError(f"{key}: {file}: eos_token_id must be a token id or a list of them (got {json.dumps(stop)}).")
    return stops


def _choose_pad(tokenizer: FastTokenizer, eos: int) -> int:
    """The pad token: the tokenizer's own, unless that is EOS; else the first of PAD_NAMES in the vocabulary; else EOS.

    Batches are packed and loss masks select the trained tokens, so EOS is trained whichever token is chosen.
    """
    own = tokenizer.pad_token_id
    if isinstance(own, int) and own != eos:
        return own
    vocabulary = tokenizer.get_vocab()
    pad = next((vocabulary[name] for name in PAD_NAMES if vocabulary.get(name, eos) != eos), eos)
    chosen = tokenizer.backend_tokenizer.id_to_token(pad)
    reason = "has no pad token" if own is None else "pads with EOS"
    logger.info("the tokenizer %s; %s is used, and EOS is still trained", reason, chosen)
    return pad


def _explain(error: BaseException, folder: Path | None) -> str:
    from huggingface_hub.errors import (  # noqa: PLC0415  slow to import
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return "is gated; log in with hf auth login."
        if isinstance(cause, LocalEntryNotFoundError):
            return "is no folder, and the hub cannot be reached."
        if isinstance(cause, RepositoryNotFoundError):
            return "is no folder, and the hub has no such model."
        cause = cause.__cause__ or cause.__context__
    if "trust_remote_code" in str(error):
        return "needs remote code; review it, then set trust_remote_code to repo@commit."
    if folder is not None and not (folder / "tokenizer.json").exists():
        return "has no tokenizer.json."
    return f"has a tokenizer that cannot be read ({cause_of(error)})."
