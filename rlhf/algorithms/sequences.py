"""A prompt and its answer as one run of tokens, with everything that is known aligned to it."""

from collections.abc import Sequence

import numpy as np

from rlhf.types import Example, FinishReason, FloatArray, Prompt, Rollout, ScoredGroup, TokenSequence


def join(prompt: Prompt, rollout: Rollout) -> TokenSequence:
    """Prompt tokens, then exactly the answer's tokens: none edited, none appended.

    Learned from are the tokens that the model wrote. An aborted answer teaches nothing, and a sequence's first token,
    which nothing predicts, neither.
    """
    token_ids = np.concatenate([prompt.token_ids, rollout.token_ids]).astype(np.int64, copy=False)
    loss_mask = np.zeros(len(token_ids), dtype=np.bool_)
    if rollout.finish_reason is not FinishReason.ABORTED:
        loss_mask[len(prompt.token_ids) :] = True if rollout.loss_mask is None else rollout.loss_mask
        loss_mask[:1] = False
    return TokenSequence(token_ids=token_ids, loss_mask=loss_mask)


def after_prompt(prompt: Prompt, of_answer: FloatArray) -> FloatArray:
    """Align one number a token of the answer with prompt and answer: 0 on the prompt."""
    aligned = np.zeros(len(prompt.token_ids) + len(of_answer), dtype=np.float32)
    aligned[len(prompt.token_ids) :] = of_answer
    return aligned


def one_by_one(groups: Sequence[ScoredGroup]) -> list[Example]:
    """One example an answer, in the groups' order."""
    return [
        Example(
            id=rollout.id,
            sequences=(join(group.prompt, rollout),),
            rewards=(reward.total,),
            sampler_log_probs=(after_prompt(group.prompt, rollout.log_probs),),
            truncated=(rollout.finish_reason is FinishReason.LENGTH,),
            weight_version=rollout.weight_version,
            # A step may draw a prompt twice: the first answer's id names its group, the prompt's would join two.
            group=group.rollouts[0].id,
            baseline=None if group.baseline is None else group.baseline.total,
        )
        for group in groups
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
    ]
