"""Reward 1 for a program that passes its unit tests in a sandbox."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence

from rlhf.config.reward import CodeSource
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.answers import after_thinking
from rlhf.engines.rewards.rule import require_usable_row
from rlhf.engines.rewards.sandbox import open_sandbox
from rlhf.errors import RewardError
from rlhf.repair import Repaired
from rlhf.types import Json, Prompt, Reward, Rollout

FENCE = re.compile(r"^```(?:python|py|python3)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


class CodeRequirement:
    """Rows that contain tests."""

    def __init__(self, tests_key: str | None) -> None:
        self._key = tests_key

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        if self.tests(label, columns):
            return None
        where = "label" if self._key is None else f'column "{self._key}"'
        return f"has no tests in its {where}, need Python text or a list of texts"

    def tests(self, label: str | None, columns: Mapping[str, Json]) -> str:
        """The row's tests as one program; empty if there are none."""
        value = columns.get(self._key) if self._key is not None else _listed(label)
        parts = value if isinstance(value, list) else [value]
        texts = [part for part in parts if isinstance(part, str)]
        return "\n".join(texts).strip() if len(texts) == len(parts) else ""


class CodeReward:
    """1.0 if the program in the response (the last fenced block, else the whole text) runs to its end together with the
    row's tests, else 0.0.

    A program has run to its end if the line after the tests, with a random marker, was printed: an early exit does not
    count. Raises DataError for a row without tests, RewardError if the sandbox fails on a program that does nothing.
    """

    def __init__(self, section: CodeSource, *, repaired: Repaired = log_repair) -> None:
        self._name = section.label
        self._need = CodeRequirement(section.tests_key)
        self._sandbox = open_sandbox(section, repaired)
        self._check_sandbox()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        for prompt in prompts:
            require_usable_row(self._need, self._name, prompt)
        if not responses:
            return []
        tests = [self._need.tests(prompt.label, prompt.metadata) for prompt in prompts]
        programs = [program_in(prompt.text, text) for prompt, text in zip(prompts, responses, strict=True)]
        scores = self._run(list(zip(programs, tests, strict=True)))
        if not any(scores):
            self._check_sandbox()
        return [Reward(total=score) for score in scores]

    def close(self) -> None:
        self._sandbox.close()

    def _run(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        markers = [secrets.token_hex(16) for _ in pairs]
        whole = [
            f'{code}\n\n\n{tests}\n\n\nprint("\\n{mark}")\n' for (code, tests), mark in zip(pairs, markers, strict=True)
        ]
        return self._sandbox.run(whole, markers)

    def _check_sandbox(self) -> None:
        """Raise RewardError if the sandbox itself fails."""
        if self._run([("pass", "pass")]) != [1.0]:
            raise RewardError(
                f"reward {self._name}: the sandbox failed on a program that does nothing; run it by hand."
            )


def program_in(prompt: str, response: str) -> str:
    """The last fenced block after the thinking, else all text after the thinking."""
    text = after_thinking(prompt, response) or ""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text


def _listed(label: str | None) -> Json:
    """A label, parsed if it is a JSON list."""
    if label is None or not label.lstrip().startswith("["):
        return label
    try:
        value: Json = json.loads(label)
    except ValueError:
        return label
    return value
