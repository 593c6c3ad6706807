"""Responses paired with prompts that they do not answer, from which KTO estimates how far the policy is from the
reference."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.algorithms.sequences import join, sampler_log_probs, version_of
from rlhf.types import Example, FinishReason, Prompt, Response, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledResponse:
    """A response to a prompt, its score, and whether it is desirable."""

    prompt: Prompt
    response: Response
    score: float
    label: bool


def mismatch(prompts: Sequence[bytes]) -> list[int | None]:
    """For each response, by its prompt, the index of a response to another prompt; None where all prompts are one.

    Responses stand in a ring, sorted by prompt; the k-th response to a prompt gets the k-th after the prompt's own. So
    every response is used once where all prompts have equally many, and about equally often otherwise.
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


def with_mismatched(labeled: Sequence[LabeledResponse]) -> list[Example]:
    """One example for each response that holds a token to learn from: prompt and response, then, where there is one,
    the same prompt with a response to another prompt.

    The second sequence is cut to the length of the longest first one, which is known to fit the model.
    """
    joined = [(join(one.prompt, one.response), one) for one in labeled]
    non_empty = [(sequence, one) for sequence, one in joined if sequence.loss_mask.any()]
    longest = max((len(sequence) for sequence, _ in non_empty), default=0)
    partners = mismatch([one.prompt.token_ids.tobytes() for _, one in non_empty])
    examples = []
    for (sequence, one), partner in zip(non_empty, partners, strict=True):
        others = [] if partner is None else [cut(join(one.prompt, non_empty[partner][1].response), longest)]
        examples.append(
            Example(
                id=one.response.id,
                sequences=(sequence, *others),
                rewards=(one.score,),
                sampler_log_probs=sampler_log_probs(one.prompt, one.response),
                truncated=(one.response.finish_reason is FinishReason.LENGTH,),
                weight_version=version_of(one.response),
                label=one.label,
            )
        )
    return examples


def cut(sequence: TokenSequence, length: int) -> TokenSequence:
    """The first `length` tokens."""
    return TokenSequence(
        token_ids=sequence.token_ids[:length],
        loss_mask=sequence.loss_mask[:length],
        segment_starts=tuple(start for start in sequence.segment_starts if start < length),
    )
