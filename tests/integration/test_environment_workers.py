"""Tools and environments in workers of a Ray cluster: episodes are spread over them, and outlive a lost one."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlhf.actors.cluster import Cluster
from rlhf.actors.environment_workers import EnvironmentsSpec, WorkerSessions, open_workers
from rlhf.config.run import ClusterSection
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.types import Rollout
from tests.unit.environments.playing import FOLDER, HERE, Play, call, says
from tests.unit.environments.support import make_request

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(ClusterSection(), namespace="test", log_folder=tmp_path_factory.mktemp("logs"))
    yield cluster
    cluster.close()


@dataclass(kw_only=True)
class Away:
    """A game whose environments and tools are in two workers."""

    game: Play
    note: Path
    """Where the process writes its id that waits to be killed."""
    replaced: list[str]
    """What was said of workers that were replaced."""

    def begin(self, place: str, *turns: str) -> "Future[Rollout]":
        """Begin an episode that waits in `place` until its process is killed."""
        self.note.unlink(missing_ok=True)
        self.replaced.clear()
        self.game.repairs.clear()
        self.game.row(place=place, note=str(self.note))
        self.game.engine.script = says(*turns or ("a",))
        (future,) = self.game.episodes.submit([make_request(self.game.prompt, f"{place} {time.monotonic()}")])
        return future

    def kill(self, victim: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process that waits, or the worker above it."""
        wait_for(self.note.exists)
        process = psutil.Process(int(self.note.read_text()))
        if victim == "worker":
            process = process.parents()[1]  # above the one that supervises the process
        os.kill(process.pid, how)

    def wait_for_replacement(self) -> str:
        wait_for(lambda: bool(self.replaced))
        return self.replaced[0]


@pytest.fixture(scope="module")
def away(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    replaced: list[str] = []

    def sessions(spec: WorldSpec, timeout_s: float) -> WorkerSessions:
        given = EnvironmentsSpec(world=spec, num_workers=2, num_processes=1, timeout_s=timeout_s)
        return open_workers(cluster, given, timeout_s=120, on_replaced=replaced.append)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.actors.environment_workers.PING_EVERY_S", 1.0)
        patch.setattr("rlhf.actors.environment_workers.PING_TIMEOUT_S", 25.0)
        game = Play(says("a"), "bad_tools:slow", environment="bad_tools:Victim", timeout_s=60.0, sessions=sessions)
        yield Away(game=game, note=tmp_path_factory.mktemp("notes") / "pid", replaced=replaced)
        game.episodes.close()


def test_episodes_are_spread_over_workers(away: Away, cluster: Cluster) -> None:
    away.game.row(place="nowhere", note="")
    futures = away.game.episodes.submit([make_request(away.game.prompt, f"n{n}") for n in range(40)])
    assert [episode_of(future).reward for future in futures] == [2.0] * 40
    # Below each worker a process that supervises one that runs the user's code.
    below = [psutil.Process(worker.pid).children(recursive=True) for worker in cluster.workers]
    assert [len(processes) for processes in below] == [2, 2]


@pytest.mark.parametrize("place", ["reset", "step", "reward"])
@pytest.mark.parametrize("victim", ["process", "worker"])
def test_an_environment_that_is_killed_begins_anew(away: Away, victim: str, place: str) -> None:
    future = away.begin(place)
    away.kill(victim)
    episode = episode_of(future)
    assert (episode.ending, episode.num_retries, episode.reward) == (Ending.TERMINATED, 1, 2.0)
    (told,) = [repair.text for repair in away.game.repairs]
    if victim == "process":
        where = f"turn {0 if place == 'reset' else 1}: {place}()"
        assert f"{where}: its process was killed by SIGKILL" in told
        return
    assert "environments: environment worker " in told
    assert "Replaced by environment worker " in away.wait_for_replacement()


@pytest.mark.parametrize("victim", ["process", "worker"])
def test_what_is_killed_while_environments_close_changes_nothing(away: Away, victim: str) -> None:
    episode = episode_of(away.begin("close"))
    away.kill(victim)
    assert (episode.num_retries, episode.reward) == (0, 2.0)
    futures = away.game.episodes.submit([make_request(away.game.prompt, f"next {n}") for n in range(4)])
    assert [episode_of(future).reward for future in futures] == [2.0] * 4
    if victim == "worker":
        away.wait_for_replacement()


def test_a_function_whose_worker_is_killed_is_called_once_more(away: Away) -> None:
    future = away.begin("nowhere", call("slow", note=str(away.note)), "a")
    away.kill("worker")
    episode = episode_of(future)
    assert episode.calls == {"slow": 1}
    # The environment may have been in the same worker; then the episode began anew.
    assert episode.num_failed_calls == 0
    assert episode.reward == 2.0
    away.wait_for_replacement()


def test_a_worker_that_is_stopped_is_replaced(away: Away) -> None:
    future = away.begin("step")
    away.kill("worker", signal.SIGSTOP)
    episode = episode_of(future)
    assert (episode.num_retries, episode.reward) == (1, 2.0)
    assert "did not reply for 25 s" in away.wait_for_replacement()


def test_code_that_a_node_cannot_load_is_refused(cluster: Cluster) -> None:
    cluster.clear()  # the names of workers are free again
    spec = EnvironmentsSpec(world=WorldSpec(tools=(f"{HERE}gone",)), num_workers=1, num_processes=1, timeout_s=9)
    with pytest.raises(ConfigError, match=f"{FOLDER}agent_tools has no gone"):
        open_workers(cluster, spec, timeout_s=60, on_replaced=None)


def episode_of(future: "Future[Rollout]") -> Episode:
    rollout = future.result(100)
    assert isinstance(rollout, EpisodeRollout)
    return rollout.episode


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
