"""The experts that a rollout engine used reach the policy's passes, and no other model's."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.online_kto import OnlineKTO
from rlhf.algorithms.ppo import PPO
from rlhf.config.algo import GrpoSection, OnlineDpoSection, OnlineKtoSection, PpoSection
from rlhf.config.run import TrainSection
from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeTrainEngine
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.batching import MicroBatchLimits, pack_tokens, plan_batches
from rlhf.orchestrator.step.learning import Learner
from rlhf.orchestrator.step.token_scores import Models, plan_learning, plan_step, score_tokens
from rlhf.types import (
    Example,
    ExpertArray,
    FinishReason,
    FloatArray,
    Head,
    PackedTokens,
    Prompt,
    Reward,
    Role,
    Rollout,
    ScoredGroup,
    TokenSequence,
    TrainBatch,
)

ROUTERS, TOP_K = 3, 2
UNKNOWN = 255
TRAIN = TrainSection(batch_size=4, max_tokens_per_micro_batch=24)


class Watched(FakeTrainEngine):
    """Keeps what its passes got."""

    def __init__(self, head: Head) -> None:
        super().__init__(np.zeros(100), head)
        self.passed: list[PackedTokens] = []

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        self.passed += batches
        return super().forward(batches)

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self.passed += [batch.tokens for batch in batches]
        return super().forward_backward(batches)


def experts_of(token_ids: np.ndarray) -> ExpertArray:
    """Told from one another by the token."""
    return np.repeat(token_ids.astype(np.uint8), ROUTERS * TOP_K).reshape(-1, ROUTERS, TOP_K)


def group(number: int) -> ScoredGroup:
    rng = np.random.default_rng(number)
    prompt = Prompt(id=f"p{number}", token_ids=rng.integers(4, 90, 3), text="")
    responses = []
    for index in range(2):
        token_ids = rng.integers(4, 90, 4 + index)
        responses.append(
            Rollout(
                id=f"{number}/{index}",
                prompt_id=prompt.id,
                token_ids=token_ids,
                finish_reason=FinishReason.STOP,
                log_probs=np.zeros(len(token_ids), dtype=np.float32),
                weight_version=0,
                routed_experts=experts_of(np.concatenate([prompt.token_ids, token_ids])),
            )
        )
    rewards = (Reward(total=0.0), Reward(total=1.0 + number))
    return ScoredGroup(prompt=prompt, responses=tuple(responses), texts=("", ""), rewards=rewards)


@pytest.mark.parametrize(
    "algorithm",
    [
        GRPO(GrpoSection.model_validate({"kl": {"type": "fixed", "coef": 0.1}})),
        PPO(PpoSection()),
        OnlineDPO(OnlineDpoSection()),
        OnlineKTO(OnlineKtoSection()),
    ],
)
def test_the_policy_alone_gets_them(algorithm: Algorithm) -> None:
    trained = {role: Watched(head) for role, head in algorithm.needs.trains.items()}
    reference = Watched(Head.LOG_PROBS)
    models = Models(trained=trained, reference=reference)
    examples = algorithm.select([group(number) for number in range(4)])
    plan = plan_step(1, examples, models, TRAIN, seed=0)
    signals = score_tokens(algorithm.needs.signals, examples, plan, models, TRAIN)
    experiences = algorithm.credit(examples, signals)[0]
    length = RunLength(num_steps=1, examples_per_step=len(examples), batch_size=4)
    learner = Learner(trained, algorithm, TRAIN, length, seed=0, note=lambda *_, **__: None)
    learner.learn(1, experiences, plan_learning(plan, experiences, models, TRAIN))
    policy = trained.pop(Role.POLICY)
    assert policy.passed
    for packed in policy.passed:
        assert packed.routed_experts is not None
        known = (packed.routed_experts != UNKNOWN).all((1, 2))
        assert np.array_equal(packed.routed_experts[known], experts_of(packed.token_ids)[known])
        # KTO reads responses to other prompts, which nobody sampled.
        assert known.all() or isinstance(algorithm, OnlineKTO)
        assert known.any()
    others = [packed for engine in (*trained.values(), reference) for packed in engine.passed]
    assert others
    assert all(packed.routed_experts is None for packed in others)


def sequence(num_tokens: int, experts: ExpertArray | None) -> TokenSequence:
    return TokenSequence(
        token_ids=np.arange(num_tokens), loss_mask=np.ones(num_tokens, dtype=np.bool_), routed_experts=experts
    )


def packed_together(*sequences: TokenSequence) -> PackedTokens:
    example = Example(id="", sequences=sequences, rewards=(0.0,) * len(sequences))
    plan = plan_batches([example], MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=100))
    (packed,) = pack_tokens(plan, [example])
    return packed


def test_a_sequence_without_them_is_unknown_in_its_pack() -> None:
    known = experts_of(np.arange(3))
    packed = packed_together(sequence(2, None), sequence(3, known), sequence(1, None))
    assert packed.routed_experts is not None
    assert packed.routed_experts.dtype == np.uint8
    assert (packed.routed_experts[:2] == UNKNOWN).all()
    assert np.array_equal(packed.routed_experts[2:5], known)
    assert (packed.routed_experts[5:] == UNKNOWN).all()
    assert packed_together(sequence(2, None)).routed_experts is None


def test_those_of_other_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="not those of its tokens"):
        packed_together(sequence(2, experts_of(np.arange(3))))
