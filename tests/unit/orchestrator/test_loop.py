"""The loop with fakes: what must hold for every algorithm, and what has looked healthy elsewhere and was not."""

import json
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.algorithms.kto import KTO
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import KtoSection, PpoSection, SftSection
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeTrainEngine
from rlhf.errors import NumericsError, RlhfError
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.evaluation import Evaluation, SampleEvaluator
from rlhf.orchestrator.step.learning import Pretraining
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.types import (
    FloatArray,
    Head,
    PackedTokens,
    Role,
    Rollout,
    RolloutRequest,
    Sampling,
    StepReport,
    SyncReport,
)
from tests.unit.orchestrator.support import (
    TOKENIZER,
    Run,
    as_sampled,
    given_group,
    labeled_group,
    make_prompt,
    metrics_of,
    ppo_run,
    rm_run,
    sft_run,
    tables,
)

pytestmark = pytest.mark.timeout(60)


def events_of(run: Run) -> list[str]:
    return [json.loads(line)["text"] for line in (run.path / "events.jsonl").read_text().splitlines()]


def test_ppo_learns_what_is_rewarded(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=20, batch_size=16, num_epochs=1)
    run.set_train(batch_size=32, max_tokens_per_micro_batch=64)
    model = run.run()
    rewards = [row["reward/mean_all"] for row in metrics_of(run)]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])
    assert (np.load(model / "table.npy") == run.engines[Role.POLICY].table).all()
    assert f"model: {model}" in run.out.getvalue()
    assert json.loads((run.path / "status.json").read_text())["status"] == "done"


def test_the_same_loop_trains_a_policy_and_a_reward_model_on_given_data(tmp_path: Path) -> None:
    for run, name in ((sft_run(tmp_path / "sft"), "policy/loss"), (rm_run(tmp_path / "rm"), "reward/loss")):
        run.run()
        losses = [row[name] for row in metrics_of(run)]
        assert losses[-1] < 0.8 * losses[0]
        assert not list((run.path / "rollouts").iterdir())


def test_the_ratio_is_exactly_one_at_the_first_update(tmp_path: Path) -> None:
    """Old log-probs come from the very passes that training makes (A36)."""
    run = ppo_run(tmp_path / "a", num_steps=3, num_epochs=1)
    run.set_train(batch_size=100)
    run.run()
    assert all(row["policy/ratio_gap"] == 0 for row in metrics_of(run))
    engine = run.engines[Role.POLICY]
    assert len(engine.seen) > 3 * engine.num_ranks


class Packing(FakeTrainEngine):
    """Notes what each of its micro-batches holds."""

    def __init__(self, rollout: FakeRollout) -> None:
        super().__init__(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2, rollout=rollout)
        self.measured: list[list[int]] = []

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        self.measured += [[*batch.token_ids.tolist(), *batch.lengths.tolist()] for batch in batches]
        return super().forward(batches)


def test_old_log_probs_are_measured_in_the_packing_of_training(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=1, batch_size=8, num_epochs=1)
    engine = Packing(run.rollout)
    run.engines[Role.POLICY] = engine
    run.run()
    learned = [[*b.tokens.token_ids.tolist(), *b.tokens.lengths.tolist()] for b in engine.seen]
    assert len(engine.measured) > 2 * engine.num_ranks
    assert sorted(engine.measured) == sorted(learned)


def test_micro_batches_are_filled_with_what_is_learned_from(tmp_path: Path) -> None:
    """KTO scores each response beside another prompt too, and does not learn from that."""
    rows = [labeled_group(i, ["abcd"[i % 4]], [i % 2 == 1]) for i in range(8)]
    run = sft_run(tmp_path / "a", algorithm=KTO(KtoSection()), rows=rows, batch_size=8, num_steps=1)
    engine = Packing(run.rollout)
    run.engines[Role.POLICY] = engine
    run.set_train(batch_size=8, max_tokens_per_micro_batch=24)
    run.num_epochs = 1
    run.run()
    tokens = sum(len(batch.tokens.token_ids) for batch in engine.seen)
    assert len(engine.measured) == 4
    assert tokens == sum(len(row.prompt.token_ids) + 2 for row in rows)
    assert len(engine.seen) == 2


def test_two_runs_with_one_seed_are_the_same_run(tmp_path: Path) -> None:
    first, second = ppo_run(tmp_path / "a"), ppo_run(tmp_path / "b")
    first.run()
    second.run()
    assert tables(first) == tables(second)
    for name in ("rollouts/step_000006.jsonl", "rollouts/step_000001.jsonl"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    third = ppo_run(tmp_path / "c")
    third.seed = 6
    third.run()
    assert tables(third) != tables(first)


class OrderRecorder(FakeTrainEngine):
    """Notes the order of what happens to it, and takes its time over a sync."""

    def __init__(self, happened: list[str], rollout: FakeRollout) -> None:
        super().__init__(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, rollout=rollout)
        self.happened = happened

    def optim_step(self) -> StepReport:
        self.happened.append("update")
        return super().optim_step()

    def send_weights(self, version: int) -> SyncReport:
        threading.Event().wait(0.02)
        report = super().send_weights(version)
        self.happened.append(f"live {version}")
        return report

    def save(self, directory: Path) -> None:
        self.happened.append("save")
        super().save(directory)


class OrderRecordingRollout(FakeRollout):
    """Notes when it samples."""

    def __init__(self, happened: list[str]) -> None:
        super().__init__(TOKENIZER.num_tokens)
        self.happened = happened

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        self.happened.append("sample")
        return super().generate(requests)


def order_recorded_run(path: Path, **changes: object) -> tuple[Run, list[str]]:
    happened: list[str] = []
    run = ppo_run(path, **changes)  # type: ignore[arg-type]
    run.rollout = OrderRecordingRollout(happened)
    run.engines[Role.POLICY] = OrderRecorder(happened, run.rollout)
    return run, happened


def test_nothing_is_sampled_before_the_weights_it_should_come_from_are_live(tmp_path: Path) -> None:
    run, happened = order_recorded_run(tmp_path / "a", num_steps=5, checkpoint_every=100)
    run.run()
    order = [event for event in happened if event not in ("update", "save")]
    assert order == [word for step in range(5) for word in (f"live {step}", "sample")] + ["live 5"]
    assert {row["rollout/lag_max"] for row in metrics_of(run)} == {0}


def test_rollouts_may_run_ahead_within_the_bound(tmp_path: Path) -> None:
    run, _ = order_recorded_run(tmp_path / "a", num_steps=8, max_lag=2)
    run.run()
    lags = [row["rollout/lag_max"] for row in metrics_of(run)]
    assert max(lags) == 2
    assert lags[0] == 0
    for step in (6, 8):  # prompts that were drawn ahead are not part of what a checkpoint has seen
        state = json.loads((run.path / f"checkpoints/step_{step}/state.json").read_text())
        assert state["position"] == step * run.batch_size


class StaleSource:
    """Gives what was sampled from version 0, for ever."""

    def __init__(self) -> None:
        self.group = as_sampled(given_group(1, ["a", "b"], [1.0, 0.0]))

    def start(self, first_step: int, last_step: int, position: int, ahead: Collection[int] = ()) -> None: ...

    def take(self, step: int) -> GroupBatch:
        return GroupBatch(groups=(self.group,), position=step)

    def release(self) -> None: ...

    def close(self) -> None: ...


def test_too_old_rollouts_are_an_error(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", max_lag=1, source=StaleSource())
    with pytest.raises(RlhfError, match="step 3: r1-0 was sampled from weights of version 0, the policy is at 2"):
        run.run()


def test_denominators_are_of_the_whole_optimizer_step(tmp_path: Path) -> None:
    """However it is split over ranks and micro-batches, the update is the same (A3)."""
    learned = []
    for num_ranks, max_tokens in ((1, 10_000), (1, 8), (3, 8)):
        run = ppo_run(tmp_path / f"{num_ranks}-{max_tokens}", num_steps=2, num_ranks=num_ranks)
        run.set_train(max_tokens_per_micro_batch=max_tokens)
        run.run()
        learned.append(run.engines[Role.POLICY].table)
    np.testing.assert_allclose(learned[1], learned[0], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(learned[2], learned[0], rtol=1e-5, atol=1e-9)


def test_tails_of_any_size_train(tmp_path: Path) -> None:
    """One prompt, one response, three ranks: the others run padding (A2)."""
    run = ppo_run(tmp_path / "a", num_ranks=3, num_prompts=1, batch_size=1, group_size=1, num_steps=2)
    run.run()
    assert all(row["updates/applied"] == 4 for row in metrics_of(run))


def test_a_run_that_makes_no_update_is_an_error(tmp_path: Path) -> None:
    rows = [given_group(i, ["a", "b"], [1.0, 1.0]) for i in range(3)]  # no pair is ordered
    run = rm_run(tmp_path / "a", rows=rows, num_steps=2)
    with pytest.raises(NumericsError, match="2 steps made no update"):
        run.run()
    assert "selected nothing to learn from" in run.out.getvalue()
    assert json.loads((run.path / "status.json").read_text())["status"] == "failed"
    assert not run.path.joinpath("model").exists()


def test_every_prompt_of_an_epoch_is_used(tmp_path: Path) -> None:
    """Seven prompts, four a step: no tail is thrown away (A1)."""
    run = ppo_run(tmp_path / "a", num_steps=2)
    run.run()
    ids = [
        json.loads(line)["prompt_id"]
        for file in sorted((run.path / "rollouts").iterdir())
        for line in file.read_text().splitlines()[:: run.group_size]
    ]
    assert len(ids) == 8
    assert set(ids[:7]) == {f"p{i}" for i in range(7)}


def test_nothing_is_stored_for_a_role_that_does_not_learn_yet(tmp_path: Path) -> None:
    """The policy's first batch after the critic's warm-up is that step's own."""
    run = ppo_run(tmp_path / "a", num_steps=3, num_epochs=1, critic_warmup_steps=2)
    before = run.engines[Role.POLICY].table.copy()
    short = replace(run, num_steps=2, path=tmp_path / "b")
    short.run()
    assert run.engines[Role.POLICY].seen == []
    assert (run.engines[Role.POLICY].table == before).all()
    assert run.engines[Role.CRITIC].num_steps > 0

    other = ppo_run(tmp_path / "c", num_steps=3, num_epochs=1, critic_warmup_steps=2)
    other.run()
    tokens = sum(len(batch.tokens.token_ids) for batch in other.engines[Role.POLICY].seen if not batch.is_padding)
    answers = (other.path / "rollouts/step_000003.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in answers]
    assert tokens == sum(len(row["prompt"]) + row["num_tokens"] for row in rows)


def test_passes_end_early_when_the_algorithm_says_so(tmp_path: Path) -> None:
    section = PpoSection(target_kl=1e-9, num_epochs=5)
    run = ppo_run(tmp_path / "a", section=section, num_steps=2, num_epochs=5, seed=3)
    run.run()
    per_pass = -(-run.batch_size * run.group_size // run.train.batch_size)
    assert [row["updates/applied"] for row in metrics_of(run)] == [2 * per_pass] * 2


def test_later_passes_take_the_minibatches_in_another_order(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=1, num_ranks=1, batch_size=12, num_epochs=3)
    run.run()
    seen = [batch.denominators for batch in run.engines[Role.POLICY].seen]
    passes = [seen[i : i + len(seen) // 3] for i in range(0, len(seen), len(seen) // 3)]
    assert passes[0] != passes[1]
    assert passes[1] != passes[2]
    assert {*passes[0]} == {*passes[1]} == {*passes[2]}


@pytest.mark.parametrize(
    ("bad", "fails"), [({1}, False), ({1, 2, 3}, False), ({1, 2, 3, 4}, True), ({1, 3, 5, 7, 9}, False)]
)
def test_gradients_that_are_not_finite_are_skipped_counted_and_bounded(
    tmp_path: Path, bad: set[int], fails: bool
) -> None:
    run = sft_run(tmp_path / "a")
    run.engines[Role.POLICY] = FakeTrainEngine(
        np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, finite=lambda n: n not in bad
    )
    if fails:
        with pytest.raises(
            NumericsError, match="policy: 4 updates in a row had a gradient that was not finite"
        ) as error:
            run.run()
        assert error.value.exit_code == 6
    else:
        run.run()
        assert sum(row["updates/skipped"] for row in metrics_of(run)) == len(bad)
    assert len([text for text in events_of(run) if "gradient not finite" in text]) == len(bad)
    assert np.isfinite(run.engines[Role.POLICY].table).all()


def test_gradients_that_are_not_finite_are_bounded_over_launches(tmp_path: Path) -> None:
    """Three of four updates are skipped; each launch makes four steps."""
    num_asked = 0

    def is_finite(_: int) -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked % 4 == 0

    def launch(num_steps: int) -> None:
        run = sft_run(tmp_path / "a", num_steps=num_steps, num_epochs=1, checkpoint_every=1)
        run.engines[Role.POLICY] = FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, finite=is_finite)
        run.run(resume=num_steps > 4)

    for num_steps in (4, 8):
        launch(num_steps)
    with pytest.raises(NumericsError, match="policy: 11 of the last 14 updates"):
        launch(12)


def test_gradients_that_are_not_finite_now_and_then_are_bounded_too(tmp_path: Path) -> None:
    run = sft_run(tmp_path / "a", num_steps=60)
    run.engines[Role.POLICY] = FakeTrainEngine(
        np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, finite=lambda n: n % 5 != 0
    )
    with pytest.raises(NumericsError, match=r"policy: 11 of the last \d+ updates had a gradient .* At most 10 of 1000"):
        run.run()


def test_pretraining_text_goes_with_each_of_the_policys_minibatches(tmp_path: Path) -> None:
    texts = [given_group(i, ["h" * 3], [0.0]) for i in range(5)]
    run = ppo_run(tmp_path / "a", num_steps=2, num_epochs=1, critic_warmup_steps=1)
    run.pretraining = Pretraining(Order(texts, seed=0), SFT(SftSection()), batch_size=2)
    run.run()
    seen = run.engines[Role.POLICY].seen
    by_objective = {name: [b for b in seen if b.objective == name and not b.is_padding] for name in ("policy", "ptx")}
    assert {batch.denominators.examples for batch in by_objective["ptx"]} == {2.0}
    read_at = {name: {batch.tokens.temperature for batch in batches} for name, batches in by_objective.items()}
    assert read_at == {"policy": {None}, "ptx": {1.0}}  # whatever the responses are sampled at
    assert {batch.objective for batch in run.engines[Role.CRITIC].seen} == {"critic"}
    assert run.pretraining.rows.position == 2 * 3  # three minibatches, and none taken in the frozen step
    assert "ptx/loss" in metrics_of(run)[1]


def test_what_is_evaluated_is_what_is_saved(tmp_path: Path) -> None:
    """A21: the checkpoint beside an evaluation holds the weights that were evaluated."""
    happened: list[tuple[int, bytes]] = []
    run = ppo_run(tmp_path / "a", num_steps=4, checkpoint_every=1, evaluate_every=1, keep=10)

    class Spy:
        def evaluate(self, version: int) -> Evaluation:
            happened.append((version, run.rollout.table.tobytes()))
            return Evaluation(metrics={"eval/reward": 0.0})

    run.evaluator = Spy()
    run.run()
    assert [version for version, _ in happened] == [1, 2, 3, 4]
    for version, table in happened:
        with np.load(run.path / f"checkpoints/step_{version}/policy/engine.npz") as saved:
            assert saved["table"].tobytes() == table


def test_evaluation_happens_at_the_end_and_as_often_as_asked(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=5, evaluate_every=2)
    sampler = Sampler(run.rollout, FakeReward(), TOKENIZER)
    run.evaluator = SampleEvaluator(
        sampler, [make_prompt(i) for i in range(3)], Sampling(max_tokens=4, temperature=0), 1
    )
    run.run()
    assert [row["step"] for row in metrics_of(run) if "eval/reward" in row] == [2, 4, 5]
