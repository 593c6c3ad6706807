"""Rewards from a service: POST {ids, prompts, responses}, reply {ids, scores}."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlhf.config.reward import HttpSource
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.endpoint import BadReplyError, Endpoint, start_of
from rlhf.engines.rewards.scores import checked_scores, listed
from rlhf.errors import RewardError
from rlhf.repair import Repaired
from rlhf.types import Json, Prompt, Reward, Rollout


class HttpReward:
    """Scores by a service. Thread-safe.

    Outages are handled by `Endpoint`; after a malformed reply the request is sent once more. Raises ConfigError if the
    address or its token cannot be used, RewardError if the service fails.
    """

    def __init__(self, source: HttpSource, *, first_wait_s: float = 1.0, repaired: Repaired = log_repair) -> None:
        self._endpoint = Endpoint(source, first_wait_s=first_wait_s, repaired=repaired)
        self._source = source
        self._pool = ThreadPoolExecutor(source.max_concurrency, thread_name_prefix="reward-http")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        size = self._source.batch_size

        def score_from(start: int) -> list[float]:
            end = start + size
            return self._score(prompts[start:end], responses[start:end], rollouts[start:end])

        scored = self._pool.map(score_from, range(0, len(responses), size))
        return [Reward(total=score) for scores in scored for score in scores]

    def close(self) -> None:
        self._endpoint.stop()
        self._pool.shutdown(cancel_futures=True)
        self._endpoint.close()

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[float]:
        ids = [rollout.id for rollout in rollouts]
        prompt_ids = [prompt.id for prompt in prompts]
        body: dict[str, Json] = {
            "ids": list(ids),
            "prompts": [prompt.text for prompt in prompts],
            "responses": list(responses),
        }
        for tries_left in (1, 0):
            try:
                return self._ask(body, ids, prompt_ids)
            except RewardError as error:
                failure = error
            if not tries_left or not isinstance(failure, BadReplyError):
                break
            self._endpoint.tell(str(failure).removeprefix("reward.url: ").rstrip("."))
        raise self._endpoint.without_token(failure)

    def _ask(self, body: dict[str, Json], ids: Sequence[str], prompt_ids: Sequence[str]) -> list[float]:
        content = self._endpoint.post(json.dumps(body).encode(), prompt_ids)
        scores = _scores_by_id(content, ids)
        try:
            return checked_scores(scores, prompt_ids, where="reward.url")
        except RewardError as error:
            raise BadReplyError(str(error)) from error


def _scores_by_id(content: bytes, ids: Sequence[str]) -> list[Json]:
    """The scores in the order of `ids`, whatever the order of the reply."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadReplyError(f'reward.url: reply is not JSON (starts "{start_of(content)}").') from error
    given, scores = (reply.get("ids"), reply.get("scores")) if isinstance(reply, dict) else (None, None)
    if not isinstance(given, list) or not isinstance(scores, list):
        raise BadReplyError('reward.url: reply is not of the form {"ids": [...], "scores": [...]}.')
    if len(scores) != len(ids):
        raise BadReplyError(f"reward.url: got {len(scores)} scores for {len(ids)} samples ({listed(ids)}).")
    by_id = {name: score for name, score in zip(given, scores, strict=False) if isinstance(name, str)}
    if len(given) != len(ids) or set(by_id) != set(ids):
        wrong = next((name for name in ids if name not in by_id), "one too many")
        raise BadReplyError(f"reward.url: reply does not echo the ids ({wrong}).")
    return [by_id[name] for name in ids]
