"""A response of several segments: each goes through the model as if it were alone, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhf.algorithms.sequences import join, one_by_one
from rlhf.engines.models.attention import PACKED_SDPA  # noqa: F401  registers the kernel
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import PackedPass, SinglePasses, own_pace
from rlhf.orchestrator.step.batching import MicroBatchLimits, pack_tokens, plan_batches, unpack_tokens
from rlhf.types import Example, FinishReason, Head, Prompt, Reward, Rollout, ScoredGroup
from tests.families import tiny_family

CPU = torch.device("cpu")
PROMPT = Prompt(id="p", token_ids=np.array([11, 12, 13]), text="")
OWN = np.array([True, True, False, False, False, True, True, True, False, False, True])
"""A turn; then a segment of a prompt and a turn; then another one."""
SEGMENTED = Rollout(
    id="segmented",
    prompt_id="p",
    token_ids=np.array([21, 22, 31, 32, 33, 34, 35, 36, 41, 42, 43]),
    finish_reason=FinishReason.STOP,
    loss_mask=OWN,
    segment_starts=(2, 8),
    log_probs=np.zeros(11, dtype=np.float32),
    weight_version=0,
)
WHOLE = Rollout(
    id="whole",
    prompt_id="p",
    token_ids=np.array([51, 52]),
    finish_reason=FinishReason.STOP,
    log_probs=np.zeros(2, dtype=np.float32),
    weight_version=0,
)
CONTEXTS = [[11, 12, 13, 21, 22], [31, 32, 33, 34, 35, 36], [41, 42, 43]]


def examples() -> list[Example]:
    reward = Reward(total=1.0)
    group = ScoredGroup(prompt=PROMPT, responses=(SEGMENTED, WHOLE), texts=("", ""), rewards=(reward, reward))
    return one_by_one([group])


def log_probs_of(model: PreTrainedModel, context: list[int]) -> torch.Tensor:
    """Of a context's tokens by the model's own forward; 0 at the first one."""
    ids = torch.tensor(context)
    known = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
    return torch.cat([known.new_zeros(1), known[:, 0]])


@pytest.mark.parametrize("tokens_a_pass", [1, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_each_segment_is_read_alone(family: str, tokens_a_pass: int) -> None:
    """Log-probs and gradients are those of the segments as sequences of their own."""
    model = tiny_family(family, attention="eager").eval()
    made = examples()
    (own,) = made[0].sequences[0].loss_mask.nonzero()
    expected = torch.cat([log_probs_of(model, context) for context in CONTEXTS])[torch.from_numpy(own)]
    beside = log_probs_of(model, [11, 12, 13, 51, 52])[3:]
    wanted = torch.autograd.grad(expected.sum() + beside.sum(), list(model.parameters()), allow_unused=True)
    packed_model = PackedModel(model, Head.LOG_PROBS, LogitsRule(temperature=1.0, chunk_tokens=4))
    packed_model.passes = PackedPass() if family == "llama" else SinglePasses(own_pace)
    plan = plan_batches(made, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=tokens_a_pass))
    outputs = [packed_model(PackedInput.from_numpy(packed, CPU))[0] for packed in pack_tokens(plan, made)]
    said = unpack_tokens(plan, made, [output.detach().numpy() for output in outputs])[0][0]
    np.testing.assert_allclose(said[own], expected.detach().numpy(), atol=1e-5)
    loss = torch.cat(outputs).sum()
    for ours, theirs in zip(
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), wanted, strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_heads_predict_no_token_from_the_segment_before() -> None:
    made = examples()
    (packed,) = pack_tokens(plan_batches(made, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1000)), made)
    places = [*range(5), *range(6), *range(3), *range(5)]
    assert packed.position_ids.tolist() == places
    inputs = PackedInput.from_numpy(packed, CPU)
    assert inputs.predicted.tolist() == [n for n, place in enumerate(places) if place]
    assert (inputs.lengths, inputs.num_sequences, inputs.last.tolist()) == ([5, 6, 3, 5], 2, [13, 18])


def test_the_first_token_of_a_segment_is_never_learned_from() -> None:
    """Nothing predicts it, whatever the mask of the response says."""
    sequence = join(PROMPT, SEGMENTED)
    assert sequence.segment_starts == (5, 11)
    everything = Rollout(
        id="",
        prompt_id="p",
        token_ids=SEGMENTED.token_ids,
        finish_reason=FinishReason.STOP,
        segment_starts=(0, 2),
        log_probs=np.zeros(11, dtype=np.float32),
        weight_version=0,
    )
    assert join(PROMPT, everything).loss_mask.tolist() == [False] * 4 + [True, False] + [True] * 8
    assert join(Prompt(id="p", token_ids=np.zeros(0, dtype=np.int64), text=""), everything).segment_starts == (2,)
