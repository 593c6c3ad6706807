"""Answers beside prompts that they do not answer: what KTO measures the policy's distance from the reference by."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.algorithms.sequences import after_prompt, join
from rlhf.types import Example, FinishReason, FloatArray, Prompt, Rollout, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An answer, its score, and the threshold from which on it is good. `sampler_log_probs` are one number a token,
    by what sampled it; None where the answer was given."""

    prompt: Prompt
    rollout: Rollout
    score: float
    threshold: float
    sampler_log_probs: FloatArray | None = None


def mismatch(prompts: Sequence[bytes]) -> list[int | None]:
    """For each answer, by its prompt, the index of an answer to another prompt; None where all prompts are one.

    Answers stand in a ring, sorted by prompt; the k-th answer to a prompt gets the k-th after the prompt's own. So
    every answer serves once where all prompts have equally many, and about equally often otherwise.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(index)
    ring = [index for members in by_prompt.values() for index in members]
    partners: list[int | None] = [None] * len(prompts)
    end = 0
    for members in by_prompt.values():
        end += len(members)
        num_others = len(ring) - len(members)
        for k, index in enumerate(members if num_others else ()):
            partners[index] = ring[(end + k % num_others) % len(ring)]
    return partners


def with_mismatched(judged: Sequence[Judged]) -> list[Example]:
    """One example an answer that holds a token to learn from: prompt and answer, then the same prompt with an answer
    to another prompt, where there is one.

    The second sequence is cut to the length of the longest first one, which the model is known to take.
    """
    whole = [(join(one.prompt, one.rollout), one) for one in judged]
    spoken = [(sequence, one) for sequence, one in whole if sequence.loss_mask.any()]
    longest = max((len(sequence) for sequence, _ in spoken), default=0)
    partners = mismatch([one.prompt.token_ids.tobytes() for _, one in spoken])
    examples = []
    for (sequence, one), partner in zip(spoken, partners, strict=True):
        others = [] if partner is None else [cut(join(one.prompt, spoken[partner][1].rollout), longest)]
        sampled = one.sampler_log_probs
        examples.append(
            Example(
                id=one.rollout.id,
                sequences=(sequence, *others),
                rewards=(one.score,),
                sampler_log_probs=() if sampled is None else (after_prompt(one.prompt, sampled),),
                truncated=(one.rollout.finish_reason is FinishReason.LENGTH,),
                weight_version=one.rollout.weight_version,
                baseline=one.threshold,
            )
        )
    return examples


def cut(sequence: TokenSequence, length: int) -> TokenSequence:
    """The first `length` tokens."""
    return TokenSequence(token_ids=sequence.token_ids[:length], loss_mask=sequence.loss_mask[:length])
