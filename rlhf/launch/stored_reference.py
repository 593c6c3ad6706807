"""The reference of an offline run: started only if its log-probs are not on disk yet, and ended once they are."""

from dataclasses import replace
from pathlib import Path

from rlhf.actors.cluster import Cluster
from rlhf.actors.launch_spec import Workers, end_role
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.needs import Needs
from rlhf.config.commands import ReferencedConfig, TrainConfig
from rlhf.config.models import StoredReferenceSection, dtype_on
from rlhf.config.run import TrainSection
from rlhf.engines.base import Tokenizer
from rlhf.errors import PreemptedError
from rlhf.launch.engines import role_engine
from rlhf.launch.offline import held_out, offline_source
from rlhf.orchestrator.data import DataSplit
from rlhf.orchestrator.run.preemption import StopRequest, StopRequestedError
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.orchestrator.step.reference_store import ReferenceStore, reference_sequences
from rlhf.planning.roles import model_of
from rlhf.types import Json, Role, ScoredGroup, Signal

FOLDER = "reference-cache"
NOT_DECIDING = frozenset(
    {
        *("model", "trust_remote_code", "dtype"),
        *("num_nodes", "num_gpus_per_node", "zero_stage", "zero_hpz_partition_size", "offload_parameters", "cache_dir"),
    }
)
"""Settings of a reference that do not decide how it computes, or whose result the fingerprint holds instead: the
model's files, and the dtype on the device."""


def open_store(
    config: TrainConfig,
    groups: DataSplit[ScoredGroup] | None,
    tokenizer: Tokenizer,
    num_steps: int,
    device: str,
    records: Records,
    resume_from: ResumePoint | None,
) -> ReferenceStore | None:
    """The stored log-probs of the run's reference; None if the run has no reference whose log-probs can be stored."""
    # A separate algorithm: reading ahead must not change the state of the one that trains.
    algorithm = build_algorithm(config.algo)
    if groups is None or not isinstance(config, ReferencedConfig) or not stores(algorithm.needs):
        return None
    from rlhf.engines.models.fingerprint import model_fingerprint  # noqa: PLC0415  imports transformers

    section = config.reference
    fingerprint = model_fingerprint(
        model_of(section, Role.REFERENCE),
        store_settings(section, tokenizer.fingerprint(), device),
        where="reference.model",
        trust_remote_code=section.trust_remote_code,
    )
    root = Path(section.cache_dir) if section.cache_dir is not None else Path(config.run.dir, FOLDER)
    source = offline_source(config, groups.train, algorithm)
    resumed = None if resume_from is None else (resume_from.state.step + 1, resume_from.state.position)
    sequences = reference_sequences(source, num_steps, algorithm, held_out(config.eval, groups), resumed)
    store = ReferenceStore(root.absolute() / fingerprint[:32], sequences, config.train, repaired=records.repair)
    if store.is_complete:
        records.say(f"reference: read from {store.folder}; no reference is started")
    return store


def store_settings(section: StoredReferenceSection, tokenizer: str, device: str) -> dict[str, Json]:
    """Everything but the model's files that decides the log-probs of the reference; a new setting of models does so,
    unless it is named in `NOT_DECIDING`. `tokenizer` is a fingerprint."""
    deciding: dict[str, Json] = section.model_dump(mode="json", exclude=set(NOT_DECIDING))
    return deciding | {"tokenizer": tokenizer, "dtype": dtype_on(section.dtype, device), "device": device}


def stores(needs: Needs) -> bool:
    """Whether this algorithm's reference and its inputs never change, so that its log-probs can be stored."""
    return Signal.REF_LOG_PROBS in needs.signals and needs.ema_reference is None and not needs.online


def without_reference(needs: Needs) -> Needs:
    """The needs of a run that starts no reference."""
    return replace(needs, signals=needs.signals - {Signal.REF_LOG_PROBS})


def fill_store(
    store: ReferenceStore, train: TrainSection, cluster: Cluster, workers: Workers, records: Records, stop: StopRequest
) -> Workers:
    """Compute and store the missing log-probs, then end the reference. Returns the workers without it.

    Raises:
        PreemptedError: the run was asked to stop. What was computed is kept.
    """
    reference = role_engine(workers, Role.REFERENCE, train.step_timeout_s)
    try:
        with stop.safe_points():
            store.fill(reference, say=records.say, check=stop.check)
    except StopRequestedError:
        raise PreemptedError(
            "asked to stop before the first step: the reference's log-probs so far are kept; start the run again"
        ) from None
    return end_role(cluster, workers, Role.REFERENCE)
