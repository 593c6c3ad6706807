"""Extracts the final answer from a response. Every function takes time linear in the text."""

import re
from collections.abc import Callable, Mapping

from rlhf.config.reward import Extraction
from rlhf.engines.rewards.numerals import last_number_text

OPEN, CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
HASH = "####"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\[\\{}]|[{}]")


def with_think_tag(prompt: str, response: str) -> str:
    """The response, preceded by the <think> that a chat template may have put at the end of the prompt."""
    return OPEN + response if prompt.rstrip().endswith(OPEN) else response


def after_thinking(prompt: str, response: str) -> str | None:
    """The part of a response after its thinking; all of it if there is none. None if the thinking never ended."""
    _, closed, after = response.rpartition(CLOSE)
    if closed:
        return after
    return None if OPEN in with_think_tag(prompt, response) else response


def find_answer(text: str, how: Extraction) -> str | None:
    """The final answer, stripped; None if there is none. An answer whose mark is opened and never closed is empty: it
    was cut off."""
    return marked(text) if how == "auto" else EXTRACTORS[how](text)


def reference_answer(label: str, how: Extraction) -> str:
    """The answer in a row's label, which may be a worked solution: extracted by its marks, else the whole label."""
    found = find_answer(label, how)
    return label.strip() if found is None else found


def marked(text: str) -> str | None:
    """The answer by its marks, which may be nested: <answer>, then \\boxed{}, then ####."""
    found = False
    for extract in (in_tag, in_box, after_hash):
        inner = extract(text)
        if inner is not None:
            text, found = inner, True
    return text if found else None


def in_tag(text: str) -> str | None:
    """The content of the last <answer>."""
    _, opened, rest = text.rpartition(ANSWER_OPEN)
    if not opened:
        return None
    inside, closed, _ = rest.partition(ANSWER_CLOSE)
    return inside.strip() if closed else ""


def in_box(text: str) -> str | None:
    """The content of the last \\boxed{}, which may contain braces."""
    start = next((match.end() for match in reversed(list(BOX.finditer(text)))), None)
    if start is None:
        return None
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()].strip()
    return ""


def after_hash(text: str) -> str | None:
    """The rest of the line after the last ####."""
    _, found, rest = text.rpartition(HASH)
    return rest.strip().partition("\n")[0].strip() if found else None


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "tag": in_tag,
    "boxed": in_box,
    "hash": after_hash,
    "last-number": last_number_text,
    "whole": str.strip,
}
