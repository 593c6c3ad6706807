"""Trackers of metrics: a file, TensorBoard, and optionally Weights & Biases and MLflow."""

import importlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf.config.rules.trackers import tracker_problems
from rlhf.config.run import LogSection
from rlhf.engines.base import Tracker
from rlhf.errors import ConfigError
from rlhf.orchestrator.run.files import append_json
from rlhf.types import Json

QUEUE_SIZE = 1000
CLOSE_TIMEOUT_S = 10.0


class JsonLines:
    """metrics.jsonl: one line a step, there as soon as the step is done. The file is opened for each line, because
    going back to a checkpoint replaces it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        plain = {name: _plain(value) for name, value in metrics.items()}
        append_json(self._path, {"step": step, "time": time.time(), **plain})

    def close(self) -> None:
        """Nothing is left open."""


class TensorBoard:
    """TensorBoard's event files."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer  # noqa: PLC0415  slow to import, and no check writes

        self._writer = Writer(str(folder))

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run."""

    def __init__(self, project: str, name: str, config: Mapping[str, Json]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project=project, name=name, config=dict(config))

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        self._run.log(numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlFlow:
    """An MLflow run."""

    def __init__(self, uri: str, name: str, config: Mapping[str, Json]) -> None:
        mlflow = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name("rlhf")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("rlhf")
        self._run_id: str = self._client.create_run(experiment_id, run_name=name).info.run_id
        self._client.log_dict(self._run_id, dict(config), "config.json")

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        for name, value in numbers(metrics).items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class BestEffort:
    """A tracker that may be slow or unreachable: it runs in a thread of its own and never delays or fails a step.

    The thread consumes: metrics from a bounded queue (full: dropped and counted). Produces: calls of the tracker,
    which it makes itself, since that may need the network. Waits for: metrics. Unblocked by: `log`, `close`.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        warn: Callable[[str], None],
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self._name = name
        self._close_timeout_s = close_timeout_s
        self._make = make
        self._warn = warn
        self._waiting: queue.Queue[tuple[int, Mapping[str, Json]] | None] = queue.Queue(QUEUE_SIZE)
        self._num_dropped = 0
        self._is_broken = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        if self._is_broken:
            return
        try:
            self._waiting.put_nowait((step, metrics))
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        if self._is_broken:
            return
        try:
            self._waiting.put(None, timeout=self._close_timeout_s)
        except queue.Full:
            self._num_dropped += QUEUE_SIZE
        self._thread.join(self._close_timeout_s)
        if self._num_dropped or self._thread.is_alive():
            self._warn(f"{self._name}: did not keep up; some metrics are only in metrics.jsonl")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (item := self._waiting.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as error:
            # The boundary to an external service: the run goes on without it.
            self._is_broken = True
            self._warn(f"{self._name}: {type(error).__name__}: {error}; metrics are only in metrics.jsonl from here on")


def require_trackers(section: LogSection) -> None:
    """Raise ConfigError where a chosen tracker's package or key is missing."""
    if problems := [f"{problem.keys[0]}: {problem.text}" for problem in tracker_problems(section, os.environ)]:
        raise ConfigError(problems)


def make_trackers(
    section: LogSection,
    *,
    metrics_path: Path,
    tensorboard_folder: Path,
    name: str,
    config: Mapping[str, Json],
    warn: Callable[[str], None],
) -> list[Tracker]:
    """The trackers that the config asks for."""
    require_trackers(section)
    trackers: list[Tracker] = [JsonLines(metrics_path)]
    if section.tensorboard:
        trackers.append(BestEffort("tensorboard", lambda: TensorBoard(tensorboard_folder), warn))
    if (project := section.wandb_project) is not None:
        trackers.append(BestEffort("wandb", lambda: WeightsAndBiases(project, name, config), warn))
    if (uri := section.mlflow_uri) is not None:
        trackers.append(BestEffort("mlflow", lambda: MlFlow(uri, name, config), warn))
    return trackers


def numbers(metrics: Mapping[str, Json]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _plain(value: Json) -> Json:
    """JSON has no NaN and no infinity: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
