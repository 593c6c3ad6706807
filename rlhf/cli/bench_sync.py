"""`rlhf bench sync`: the weight sync of real actors on the current cluster, compared with the collectives alone."""

import json
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import median
from typing import cast

from rich.table import Table

from rlhf.actors.calls import Call
from rlhf.actors.cluster import Cluster
from rlhf.actors.groups import GroupEngine
from rlhf.actors.launch_spec import LaunchSpec
from rlhf.actors.launcher import Launcher
from rlhf.actors.ranks import join_ranks
from rlhf.actors.workers import CollectivesWorker
from rlhf.config.algo import SftSection
from rlhf.config.models import TrainedModelSection
from rlhf.config.tools import BenchConfig
from rlhf.engines.models.adapters import require_targets
from rlhf.engines.models.fresh_model import make_llama
from rlhf.engines.models.loading import inspect_model
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.launch.specs import make_engine_spec
from rlhf.planning.placement import Placement
from rlhf.planning.roles import model_of, place_models
from rlhf.terminal import rich_console, tell, write
from rlhf.types import Head, Role, SyncReport

LAYER_WIDTHS = 13
"""Parameters of one layer of a new model, in squares of its hidden size."""
LEAST_LAYERS = 6
HIDDEN_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
MEGA = 10**6
GIGA = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncTimes:
    """The sync of one model, in medians."""

    model: str
    dtype: str
    medium: str
    num_bytes: int
    num_buckets: int
    num_remote_calls: int
    sync_s: float
    gather_s: float = 0.0
    """All-gathers alone, one after the other."""
    send_s: float = 0.0
    """Broadcasts alone (on shared GPUs: copies)."""

    @property
    def share(self) -> float:
        """Of the collectives' speed, one after the other, that the sync keeps; above 1 where they overlap."""
        return (self.gather_s + self.send_s) / self.sync_s


def run_bench_sync(config: BenchConfig) -> int:
    """Measure each model, and print a table. Returns the exit code.

    Raises:
        ConfigError: the placement does not fit on the cluster.
        ModelError: the model cannot be loaded.
        RlhfError: a process did not start or was lost, or a sync failed.
    """
    if config.policy.model is not None:
        meta = inspect_model(config.policy, config.policy.model, Head.LOG_PROBS, where="policy.model", new_head=False)
        if config.policy.lora.rank:
            require_targets(meta, config.policy.lora, "policy.lora.targets")
    folder = Path(config.folder).absolute()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    models = [config.policy.model] if config.policy.model is not None else make_models(config, folder)
    placement = place_models({Role.POLICY: config.policy}, config.rollout, config.cluster.colocate)
    measured = []
    for model in models:
        tell([f"rlhf: {name_of(model)}: syncs, then the collectives alone"])
        with Cluster(config.cluster, "rlhf-bench", logs) as cluster:
            times = time_sync(config, cluster, placement, model)
        with Cluster(config.cluster, "rlhf-bench", logs) as cluster:
            measured.append(time_raw(config, cluster, placement, times))
    if config.as_json:
        write(json.dumps([asdict(times) | {"share": times.share} for times in measured]) + "\n")
    else:
        rich_console().print(table(config, measured))
    return 0


def make_models(config: BenchConfig, folder: Path) -> list[str]:
    """Llamas of about the given sizes, with random weights. Existing ones are used again."""
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    models = []
    for millions in config.sizes:
        model = folder / f"llama-{millions}m-{context}"
        if not model.exists():
            hidden, layers, vocabulary = shape_of(millions)
            part = model.with_name(f"{model.name}.part")
            make_llama(part, vocab_size=vocabulary, hidden_size=hidden, num_layers=layers, context=context)
            part.rename(model)
        models.append(str(model))
    return models


def shape_of(millions: int) -> tuple[int, int, int]:
    """Hidden size, number of layers and vocabulary of a Llama with about this many parameters: as wide as possible with
    at least six layers."""
    size = millions * MEGA
    widest = sqrt(size / (LAYER_WIDTHS * LEAST_LAYERS))
    hidden = max((width for width in HIDDEN_SIZES if width <= widest), default=HIDDEN_SIZES[0])
    vocabulary = min(8192, size // (8 * hidden))
    return hidden, max(1, round((size - vocabulary * hidden) / (LAYER_WIDTHS * hidden**2))), vocabulary


def name_of(model: str) -> str:
    """The last part of a folder or hub name."""
    return model.rstrip("/").rpartition("/")[2]


def time_sync(config: BenchConfig, cluster: Cluster, placement: Placement, model: str) -> SyncTimes:
    """Start the policy and the engines as a run does, and send the weights several times."""
    policy: TrainedModelSection = config.policy.model_copy(update={"model": model})
    engine = make_engine_spec(policy, config.rollout, placement, cluster.device, seed=0)
    launcher = Launcher(
        cluster,
        placement,
        script(policy, engine),
        start_timeout_s=config.cluster.start_timeout_s,
        collective_timeout_s=config.rollout.sync_timeout_s,
        on_replaced=None,
    )
    workers = launcher.launch(lambda _rewards: None)
    timeout_s = 4 * config.rollout.sync_timeout_s
    trainer = GroupEngine(workers.groups[Role.POLICY], Role.POLICY, step_timeout_s=timeout_s, sync_timeout_s=timeout_s)
    reports: list[SyncReport] = [trainer.send_weights(version) for version in range(config.repeats + 1)][1:]
    return SyncTimes(
        model=name_of(model),
        dtype=engine.dtype,
        medium=engine.sync_backend,
        num_bytes=reports[0].num_bytes,
        num_buckets=reports[0].num_buckets,
        num_remote_calls=reports[0].num_remote_calls,
        sync_s=median(report.seconds for report in reports),
    )


def script(policy: TrainedModelSection, engine: EngineSpec) -> LaunchSpec:
    """A policy that would learn, as a run's does, and its engines."""
    trained = TrainedModelSpec(
        section=policy,
        model=model_of(policy, Role.POLICY),
        head=Head.LOG_PROBS,
        algorithm=SftSection(),
        temperature=1.0,
        num_steps=1,
        seed=0,
    )
    return LaunchSpec(trained={Role.POLICY: trained}, engine=engine)


def time_raw(config: BenchConfig, cluster: Cluster, placement: Placement, times: SyncTimes) -> SyncTimes:
    """The collectives alone, with the same bytes in the same number of buckets, by workers in the same bundles."""
    slots = cluster.reserve(placement)
    trainers = slots[Role.POLICY]
    receivers = slots[Role.ROLLOUT] if times.medium != "ipc" else []
    calls = [
        cluster.start_worker(CollectivesWorker, slot, name=f"collectives rank {rank}", title="Collectives", env={})
        for rank, slot in enumerate([*trainers, *receivers])
    ]
    workers = cluster.wait_started(calls)
    join_ranks(
        [workers],
        calls=cluster.calls,
        device=cluster.device,
        start_timeout_s=config.cluster.start_timeout_s,
        collective_timeout_s=config.rollout.sync_timeout_s,
    )
    sizes = (times.num_bytes, times.num_buckets, len(trainers), config.repeats)
    results = cluster.calls.wait_all(
        [Call(worker=worker, ref=worker.handle.measure.remote(*sizes)) for worker in workers],
        phase="collectives",
        timeout_s=4 * config.rollout.sync_timeout_s * (config.repeats + 1),
    )
    seconds = cast(list[tuple[float, float]], results[0])
    gather_s, send_s = (median(column) for column in zip(*seconds, strict=True))
    return replace(times, gather_s=gather_s, send_s=send_s)


def table(config: BenchConfig, measured: list[SyncTimes]) -> Table:
    """One row for each model."""
    of_all = f"policy ranks: {config.policy.num_ranks}, engines: {config.rollout.num_engines}"
    title = f"{of_all}, medium: {measured[0].medium}, {measured[0].dtype}"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("model")
    for heading in ("MB", "buckets", "calls", "sync s", "GB/s", "gather s", "send s", "of raw"):
        shown.add_column(heading, justify="right")
    for one in measured:
        shown.add_row(
            one.model,
            f"{one.num_bytes / MEGA:,.1f}",
            str(one.num_buckets),
            str(one.num_remote_calls),
            f"{one.sync_s:.3f}",
            f"{one.num_bytes / one.sync_s / GIGA:.2f}",
            f"{one.gather_s:.3f}",
            f"{one.send_s:.3f}",
            f"{one.share:.0%}",
        )
    return shown
