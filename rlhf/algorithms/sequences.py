"""A prompt and a response as one sequence of tokens, with per-token arrays aligned to it."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.types import (
    Example,
    FinishReason,
    FloatArray,
    LearnedSequence,
    Prompt,
    Response,
    Rollout,
    ScoredGroup,
    Signal,
    TokenSequence,
)


def join(prompt: Prompt, response: Response) -> TokenSequence:
    """Prompt tokens, then exactly the response's tokens: none edited, none appended.

    Learned from are the tokens that the model wrote: none of an aborted response, and never the first token of a
    sequence or segment, which nothing predicts.
    """
    token_ids = np.concatenate([prompt.token_ids, response.token_ids]).astype(np.int64, copy=False)
    loss_mask = np.zeros(len(token_ids), dtype=np.bool_)
    if response.finish_reason is not FinishReason.ABORTED:
        loss_mask[len(prompt.token_ids) :] = True if response.loss_mask is None else response.loss_mask
        loss_mask[:1] = False
    starts = tuple(start for given in response.segment_starts if (start := len(prompt.token_ids) + given))
    for start in starts:
        loss_mask[start] = False
    return TokenSequence(
        token_ids=token_ids,
        loss_mask=loss_mask,
        segment_starts=starts,
        routed_experts=response.routed_experts if isinstance(response, Rollout) else None,
    )


def learned(sequence: TokenSequence, signals: Mapping[Signal, FloatArray] | None = None) -> LearnedSequence:
    """The sequence with what a loss reads of it."""
    return LearnedSequence(
        token_ids=sequence.token_ids,
        loss_mask=sequence.loss_mask,
        segment_starts=sequence.segment_starts,
        routed_experts=sequence.routed_experts,
        signals=signals or {},
    )


def num_own_tokens(prompt: Prompt, response: Response) -> int:
    """How many tokens of the response can be learned from: those that `join` marks."""
    if response.finish_reason is FinishReason.ABORTED or not len(response.token_ids):
        return 0
    is_own = response.loss_mask
    count = len(response.token_ids) if is_own is None else int(np.count_nonzero(is_own))
    is_first_own = not len(prompt.token_ids) and (is_own is None or bool(is_own[0]))
    return count - is_first_own


def is_empty(prompt: Prompt, response: Response) -> bool:
    """Whether the response holds no token to learn from: it has none, was aborted, or others wrote all of it."""
    return not num_own_tokens(prompt, response)


def after_prompt(prompt: Prompt, of_response: FloatArray) -> FloatArray:
    """[r] -> [n]: one number for each response token, aligned with prompt and response; 0 on the prompt."""
    aligned = np.zeros(len(prompt.token_ids) + len(of_response), dtype=np.float32)
    aligned[len(prompt.token_ids) :] = of_response
    return aligned


def sampler_log_probs(prompt: Prompt, response: Response) -> tuple[FloatArray, ...]:
    """The sampler's log-probs [n] aligned with prompt and response; empty where the response was not sampled."""
    return (after_prompt(prompt, response.log_probs),) if isinstance(response, Rollout) else ()


def version_of(response: Response) -> int | None:
    """The policy version that sampled the response; None where a data set gave it."""
    return response.weight_version if isinstance(response, Rollout) else None


def one_by_one(groups: Sequence[ScoredGroup]) -> list[Example]:
    """One example per response, in the groups' order."""
    return [
        Example(
            id=response.id,
            sequences=(join(group.prompt, response),),
            rewards=(reward.total,),
            sampler_log_probs=sampler_log_probs(group.prompt, response),
            truncated=(response.finish_reason is FinishReason.LENGTH,),
            weight_version=version_of(response),
            # A step may draw a prompt twice: the first response's id names its group, the prompt's would join two.
            group=group.responses[0].id,
            turns=tuple((len(group.prompt.token_ids) + end, earned) for end, earned in reward.turns),
            baseline=group.baseline,
        )
        for group in groups
        for response, reward in zip(group.responses, group.rewards, strict=True)
    ]
