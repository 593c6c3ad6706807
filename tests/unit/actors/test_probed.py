"""After the first sync each engine must say what the policy says, and an error names the side that is wrong.

Real engines and models; only Ray is not there: a handle's remote call runs at once.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.actors.calls import Call, Worker
from rlhf.actors.engine_group import EngineGroup
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.actors.probed import ProbedPolicy
from rlhf.actors.rollout import RolloutPool
from rlhf.actors.waiting import RemoteCalls
from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import PassReport, generate
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import PackedPass
from rlhf.engines.models.router_replay import RouterReplay
from rlhf.engines.models.routers import routers_of
from rlhf.engines.models.self_test import Examination
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.transformers_engine import TransformersRolloutEngine
from rlhf.engines.training.examined import probe_policy
from rlhf.engines.weight_sync.probe import PolicyProbe, probe_tolerance, require_agreement
from rlhf.errors import NumericsError, RlhfError, WorkerLostError
from rlhf.types import (
    FloatArray,
    Head,
    PackedTokens,
    Role,
    Rollout,
    RolloutRequest,
    Sampling,
    SyncReport,
    TrainBatch,
)
from tests.families import tiny_family
from tests.tiny_models import make_family, make_policy

CPU = torch.device("cpu")

# Importing DeepSpeed warns.
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Handle:
    """An actor's handle, without an actor."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return type("Method", (), {"remote": staticmethod(method)})


class LocalGroup(WorkerGroup):
    """Workers of this process."""

    def __init__(self, *workers: Worker) -> None:
        super().__init__(workers, RemoteCalls())

    def subset(self, workers: Sequence[Worker]) -> WorkerGroup:
        return LocalGroup(*workers)

    def wait(self, calls: Sequence[Call], *, phase: str, timeout_s: float) -> list[object]:
        return [call.ref for call in calls]

    def _run(
        self, workers: Sequence[Worker], submit: Submit, phase: str, timeout_s: float, peers: Sequence[Worker]
    ) -> list[object]:
        return [submit(rank, worker.handle) for rank, worker in enumerate(workers)]


class LocalEngines(EngineGroup):
    """Rollout engines of this process, all of which reply but for those in `dead`."""

    def __init__(self, *workers: Worker) -> None:
        super().__init__(workers, RemoteCalls(), end=lambda _: None, start=self._none, connect=self._note)
        self.dead: list[Worker] = []
        self.connections: list[list[str]] = []

    def subset(self, workers: Sequence[Worker]) -> WorkerGroup:
        return LocalGroup(*workers)

    def add(self, started: Worker) -> None:
        """Another engine, as in the place of a lost one."""
        self.workers = (*self.workers, started)
        self._places[started.name] = threading.RLock()

    def _none(self, _lost: Worker, error: RlhfError) -> Worker:
        raise error

    def _note(self, workers: Sequence[Worker]) -> None:
        self.connections.append([one.name for one in workers])

    def _silent(self, workers: Sequence[Worker], timeout_s: float) -> list[tuple[Worker, RlhfError]]:
        return [(one, WorkerLostError(f"{one.name} died")) for one in workers if one in self.dead]


def worker(name: str, target: object) -> Worker:
    return Worker(handle=Handle(target), name=name, node="here", node_id="0", pid=1)


class Policy:
    """A rank of the policy, whose weights are those of the folder: no weights are sent."""

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        rule = LogitsRule(chunk_tokens=64)
        self.packed_model = PackedModel(model, Head.LOG_PROBS, rule)
        self.self_test = Examination(
            packed_model=self.packed_model, asked="auto", dtype=torch.float32, device=CPU, where="policy.model",
            agree=float, pace=int,
        ).run()  # fmt: skip
        self.sent: list[int] = []

    def forward_backward(self, role: Role, batches: Sequence[TrainBatch]) -> PassReport:
        return PassReport()

    def send_weights(self, role: Role, version: int) -> SyncReport:
        self.sent.append(version)
        return SyncReport(version=version, digest="", num_bytes=0, seconds=0.0, num_buckets=0, num_remote_calls=0)

    def probe(self, role: Role, packed: PackedTokens) -> PolicyProbe:
        @torch.no_grad()
        def forward() -> FloatArray:
            said: FloatArray = self.packed_model(PackedInput.from_numpy(packed, CPU))[0].numpy()
            return said

        return probe_policy(forward, self.packed_model, self.self_test, 1.0, CPU)


class Engine:
    """A rollout engine whose rollouts pass through `damage`."""

    def __init__(self, folder: Path, damage: Callable[[Rollout], Rollout] = lambda rollout: rollout) -> None:
        spec = EngineSpec(section=RolloutSection(), model=str(folder), dtype="float32", device="cpu")
        self._engine, self._damage = TransformersRolloutEngine(spec), damage
        self.num_probes = 0
        self._asked: Sequence[RolloutRequest] = ()

    def location(self) -> None:
        """Alive."""

    def submit(self, pool: str, requests: Sequence[RolloutRequest]) -> None:
        self.num_probes += 1
        self._asked = requests

    def collect(self, pool: str) -> list[Rollout]:
        return [self._damage(rollout) for rollout in generate(self._engine, self._asked)]


def engine_workers(*engines: Engine) -> LocalEngines:
    return LocalEngines(*(worker(f"rollout engine {index}", engine) for index, engine in enumerate(engines)))


def probed(policy: Policy, *engines: Engine, group: LocalEngines | None = None) -> ProbedPolicy:
    requests = [
        RolloutRequest(
            id=f"probe/{index}", prompt_id="p", prompt_token_ids=np.arange(5, 9 + index), seed=index,
            sampling=Sampling(max_tokens=6),
        )
        for index in range(4)
    ]  # fmt: skip
    return ProbedPolicy(
        LocalGroup(worker("policy rank 0", policy)),
        engines=group or engine_workers(*engines),
        pool=lambda chosen: RolloutPool(chosen, generate_timeout_s=60.0, control_timeout_s=60.0),
        requests=requests,
        step_timeout_s=60.0,
        sync_timeout_s=60.0,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy(folder)


def test_right_engines_are_probed_once(folder: Path, policy: Policy) -> None:
    engines = [Engine(folder), Engine(folder)]
    sender = probed(policy, *engines)
    for version in range(3):
        assert sender.send_weights(version).version == version
    assert [engine.num_probes for engine in engines] == [1, 1]


def test_a_new_engine_gets_the_live_version_at_once_and_alone(folder: Path, policy: Policy) -> None:
    policy.sent = []
    group, new = engine_workers(Engine(folder), Engine(folder)), Engine(folder)
    sender = probed(policy, group=group)
    sender.send_weights(3)
    assert group.connections == [], "connected at the start"
    started = worker("rollout engine 2", new)
    group.add(started)
    assert sender.introduce(started).result(0) is None
    assert policy.sent == [3, 3]
    assert new.num_probes == 1
    sender.send_weights(4)
    assert group.connections == [["rollout engine 2"], [f"rollout engine {index}" for index in range(3)]]
    assert new.num_probes == 1
    assert sender.introduce(started).done(), "it serves the live version already"
    assert policy.sent == [3, 3, 4]


def test_in_the_middle_of_a_step_a_new_engine_waits_for_the_next_version(folder: Path, policy: Policy) -> None:
    policy.sent = []
    group, new, other = engine_workers(Engine(folder)), Engine(folder), Engine(folder)
    sender = probed(policy, group=group)
    sender.send_weights(0)
    sender.forward_backward([cast(TrainBatch, None)])
    workers = [worker("rollout engine 1", new), worker("rollout engine 2", other)]
    for started in workers:
        group.add(started)
    futures = [sender.introduce(started) for started in workers]
    assert not any(future.done() for future in futures)
    assert policy.sent == [0], "weights in the middle of a step are no version"
    group.dead = [workers[1]]
    sender.send_weights(1)
    assert futures[0].result(0) is None
    with pytest.raises(WorkerLostError, match=r"weight sync of version 1: rollout engine 2 .* was lost before it"):
        futures[1].result(0)
    assert group.connections == [["rollout engine 0", "rollout engine 1"]]
    assert (new.num_probes, other.num_probes) == (1, 0)


def test_a_new_engine_that_computes_something_else_is_refused(folder: Path, policy: Policy, tmp_path: Path) -> None:
    group = engine_workers(Engine(folder))
    sender = probed(policy, group=group)
    sender.send_weights(0)
    started = worker("rollout engine 1", Engine(make_policy(tmp_path / "other", seed=1)))
    group.add(started)
    with pytest.raises(NumericsError, match=r"^rollout engine 1: version 0: "):
        sender.introduce(started)


def test_an_engine_with_other_weights_is_named(folder: Path, policy: Policy, tmp_path: Path) -> None:
    other = Engine(make_policy(tmp_path / "other", seed=1))
    message = (
        r"^rollout engine 1: version 0: its log-probs of its own samples differ .* by [\d.]+ nats \(at most 0\.001\), "
        r"and the policy agrees with itself to .*: the weights arrived, but this engine computes something else"
    )
    with pytest.raises(NumericsError, match=message):
        probed(policy, Engine(folder), other).send_weights(0)


def test_log_probs_that_are_no_numbers_agree_with_nothing(folder: Path, policy: Policy) -> None:
    def unknown(rollout: Rollout) -> Rollout:
        log_probs = rollout.log_probs.copy()
        log_probs[-1] = np.nan
        return replace(rollout, log_probs=log_probs)

    with pytest.raises(NumericsError, match=r"^rollout engine 0: .* by nan nats"):
        probed(policy, Engine(folder, unknown)).send_weights(0)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_policy_is_probed_with_the_experts_that_the_engine_used(shift: int, tmp_path: Path) -> None:
    """Those of the neighbor token are others."""
    make_family(tmp_path, "qwen3_moe")
    policy = Policy(tmp_path)
    RouterReplay(policy.packed_model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    said: list[torch.Tensor] = []
    for router in routers_of(model):
        router.module.register_forward_hook(lambda module, inputs, outputs: said.append(outputs[-1]))

    def recorded(rollout: Rollout) -> Rollout:
        said.clear()
        prompt = np.arange(5, 9 + int(rollout.id.rpartition("/")[2]))
        model(torch.tensor(np.concatenate([prompt, rollout.token_ids]))[None])
        experts = torch.stack(said, dim=1).numpy().astype(np.uint8)
        return replace(rollout, routed_experts=np.roll(experts, shift, axis=0))

    sender = probed(policy, Engine(tmp_path, recorded))
    if not shift:
        sender.send_weights(0)
        return
    with pytest.raises(NumericsError, match=r"^rollout engine 0: .* engine computes something else"):
        sender.send_weights(0)


def test_a_policy_that_computes_wrong_is_named_instead_of_the_engine(tmp_path: Path) -> None:
    """Packed sequences of an OPT see each other."""
    tiny_family("opt").save_pretrained(tmp_path)
    policy, engine = Policy(tmp_path), Engine(tmp_path)
    probed(policy, engine).send_weights(0)
    policy.packed_model.passes = PackedPass()
    message = r"^policy: version 1: its log-probs of packed sequences differ .*: the trainer computes wrong"
    with pytest.raises(NumericsError, match=message):
        probed(policy, engine).send_weights(1)


def test_a_policy_whose_log_probs_are_no_numbers_is_named() -> None:
    fine, bad = np.zeros(3, np.float32), np.array([0.0, np.nan, 0.0], np.float32)
    for log_probs, alone in ((bad, fine), (fine, bad)):
        with pytest.raises(NumericsError, match=r"^policy: version 2: .* by nan nats"):
            require_agreement("e", 2, fine, PolicyProbe(log_probs=log_probs, alone=alone, tolerance=1.0))


@pytest.mark.parametrize(
    ("noise", "temperature", "tolerance"), [(1e-6, 1.0, 1e-3), (0.05, 1.0, 0.4), (0.05, 0.5, 0.8), (0.05, 2.0, 0.4)]
)
def test_the_tolerance_follows_from_the_policys_noise(noise: float, temperature: float, tolerance: float) -> None:
    assert probe_tolerance(noise, temperature) == pytest.approx(tolerance)
