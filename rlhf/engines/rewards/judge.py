"""Rewards from an LLM judge, behind a chat-completions endpoint (Zheng et al. 2023, arXiv:2306.05685)."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from rlhf.config.reward import JudgeSource
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.endpoint import BadReplyError, Endpoint
from rlhf.engines.rewards.rule import require_usable_row
from rlhf.engines.rewards.verdicts import (
    REMINDER,
    comparison_question,
    message_text,
    rubric_question,
    score_in,
    winner_in,
)
from rlhf.errors import RewardError
from rlhf.repair import Repaired
from rlhf.types import Json, Prompt, Reward, Rollout

T = TypeVar("T")


class RubricRequirement:
    """A rubric: the row's own, or that of the config."""

    def __init__(self, section: JudgeSource) -> None:
        self._section = section

    def row_problem(self, label: str | None, columns: Mapping[str, Json]) -> str | None:
        if self._section.mode == "pairwise" or self.rubric(columns):
            return None
        return f'has no rubric in its column "{self._section.rubric_key}"; set rubric of the source, or rubric_key'

    def rubric(self, columns: Mapping[str, Json]) -> str:
        own = columns.get(self._section.rubric_key)
        return own if isinstance(own, str) and own.strip() else self._section.rubric or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses to a prompt, by their indices among the prompt's competitors."""

    prompt: Prompt
    first: int
    second: int
    texts: tuple[str, ...]


class JudgeReward:
    """Scores by a judge. Thread-safe.

    pairwise: the adjacent responses of a call that belong to the same prompt are compared with each other. The judge
    sees each pair in both orders, so that a preference for a position gives both half a win. A response's reward is its
    mean win rate, in [0, 1]; equal texts tie without asking. A single response is compared with the row's label.
    rubric: each response gets a score within `scale`, which is mapped linearly to a reward in [0, 1].

    Outages are handled by `Endpoint`; a reply without exactly one verdict is requested again, `max_tries` tries in all.
    Raises DataError for a row without a rubric, RewardError if a response cannot be judged for another reason.
    """

    def __init__(self, section: JudgeSource, *, first_wait_s: float = 1.0, repaired: Repaired = log_repair) -> None:
        self._endpoint = Endpoint(section, first_wait_s=first_wait_s, repaired=repaired)
        self._section = section
        self._need = RubricRequirement(section)
        self._pool = ThreadPoolExecutor(section.max_concurrency, thread_name_prefix="reward-judge")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        for prompt in prompts:
            require_usable_row(self._need, self._section.label, prompt)
        scores = (
            self._rubric(prompts, responses) if self._section.mode == "rubric" else self._pairwise(prompts, responses)
        )
        return [Reward(total=score) for score in scores]

    def close(self) -> None:
        self._endpoint.stop()
        self._pool.shutdown(cancel_futures=True)
        self._endpoint.close()

    def _rubric(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        low, high = self._section.scale

        def judge(prompt: Prompt, response: str) -> float:
            question = rubric_question(
                prompt.text, response, prompt.label, self._need.rubric(prompt.metadata), self._section.scale
            )
            score = self._ask(question, prompt.id, lambda text: score_in(text, self._section.scale))
            return (score - low) / (high - low)

        return list(self._pool.map(judge, prompts, responses))

    def _pairwise(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        groups = list(_groups(prompts, responses))
        for prompt, texts in groups:
            if len(texts) == 1 and prompt.label is None:
                raise RewardError(
                    f"reward {self._section.label}: {prompt.id} has one response and no label to compare it with. Set "
                    "rollout.group_size to 2 or more, give rows a label, or use mode rubric."
                )
        comparisons = [
            Comparison(prompt=prompt, first=first, second=second, texts=competitors)
            for prompt, texts in groups
            for competitors in [_competitors(prompt, texts)]
            for first, second in pairs_of(len(competitors), self._section.opponents)
        ]
        wins = iter(self._pool.map(self._compare, comparisons))
        scores: list[float] = []
        for prompt, texts in groups:
            competitors = _competitors(prompt, texts)
            results: list[list[float]] = [[] for _ in competitors]
            for first, second in pairs_of(len(competitors), self._section.opponents):
                share = next(wins)
                results[first].append(share)
                results[second].append(1.0 - share)
            scores += [sum(shares) / len(shares) for shares in results[: len(texts)]]
        return scores

    def _compare(self, comparison: Comparison) -> float:
        """The share of the two orders in which the first response wins; a tie is half a win."""
        ours, theirs = comparison.texts[comparison.first], comparison.texts[comparison.second]
        if ours == theirs:
            return 0.5
        return (self._wins(comparison.prompt, ours, theirs) + 1.0 - self._wins(comparison.prompt, theirs, ours)) / 2

    def _wins(self, prompt: Prompt, shown_first: str, shown_second: str) -> float:
        question = comparison_question(prompt.text, shown_first, shown_second, self._section.criterion)
        return self._ask(question, prompt.id, winner_in)

    def _ask(self, question: str, prompt_id: str, verdict_in: Callable[[str], T]) -> T:
        """The verdict in the judge's reply; the judge has `max_tries` tries to give one."""
        try:
            return self._verdict(question, prompt_id, verdict_in)
        except RewardError as error:
            failure = error
        raise self._endpoint.without_token(failure)

    def _verdict(self, question: str, prompt_id: str, verdict_in: Callable[[str], T]) -> T:
        messages: list[Json] = [{"role": "user", "content": question}]
        failure: BadReplyError | None = None
        for _ in range(self._section.max_tries):
            if failure is not None:
                self._endpoint.tell(str(failure).removeprefix("reward.url: ").rstrip("."))
            try:
                text = message_text(self._endpoint.post(self._body(messages), [prompt_id]))
            except BadReplyError as error:
                failure = error
                continue
            try:
                return verdict_in(text)
            except BadReplyError as error:
                failure = error
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": REMINDER}]
        raise RewardError(f"{str(failure).rstrip('.')} on {prompt_id} ({self._section.max_tries} tries).") from failure

    def _body(self, messages: list[Json]) -> bytes:
        body: dict[str, Json] = {
            "model": self._section.model,
            "messages": messages,
            "temperature": self._section.temperature,
            "max_tokens": self._section.max_tokens,
        }
        return json.dumps(body).encode()


def _groups(prompts: Sequence[Prompt], responses: Sequence[str]) -> Iterator[tuple[Prompt, list[str]]]:
    """Adjacent responses to the same prompt."""
    for _, items in groupby(zip(prompts, responses, strict=True), key=lambda item: item[0].id):
        group = list(items)
        yield group[0][0], [response for _, response in group]


def _competitors(prompt: Prompt, texts: Sequence[str]) -> tuple[str, ...]:
    """The texts to compare: all responses, or a single response and the label."""
    return (*texts, prompt.label) if len(texts) == 1 and prompt.label is not None else tuple(texts)


def pairs_of(count: int, opponents: int | None) -> list[tuple[int, int]]:
    """Which of `count` competitors are compared: all pairs, or each with the next `opponents` / 2 around a ring, so
    that all have the same number of comparisons."""
    steps = count // 2 if opponents is None else min(count // 2, max(1, opponents // 2))
    met = [(index, (index + step) % count) for step in range(1, steps + 1) for index in range(count)]
    return list(dict.fromkeys((min(pair), max(pair)) for pair in met))
