"""What a rank's checkpoint holds and what it refuses, with a writer of shards in DeepSpeed's place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf.engines.training.checkpoint import load_training_state, require_all_seen, save_training_state
from rlhf.engines.training.ema_reference import EmaCopy
from rlhf.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing DeepSpeed warns

SHARD = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(torch.nn.Module):
    """A trained layer, and a frozen one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = torch.nn.Linear(2, 2, bias=False)
        self.frozen = torch.nn.Linear(2, 2, bias=False)
        self.frozen.requires_grad_(False)
        self.tied = self.frozen


class Writer:
    """Writes one file."""

    def save(self, state_dict: dict[str, object], path: str) -> None:
        torch.save(state_dict, path)


class Engine:
    """The parts of DeepSpeed's engine that a checkpoint needs."""

    def __init__(self, module: torch.nn.Module | None = None, stage: int = 3) -> None:
        self.module = module or Model()
        self.checkpoint_engine = Writer()
        self._stage = stage
        self.asked: list[object] = []

    def zero_optimization_stage(self) -> int:
        return self._stage

    def save_checkpoint(self, directory: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        self.asked += [save_latest, exclude_frozen_parameters]
        folder = Path(directory) / tag
        folder.mkdir(exist_ok=True)
        weights = self.module.state_dict()
        self.checkpoint_engine.save({"module": weights, "step": 3}, str(folder / SHARD))
        self.checkpoint_engine.save({"optimizer": torch.ones(2)}, str(folder / "optimizer.pt"))
        self._copy_recovery_script(directory)

    def _copy_recovery_script(self, directory: str) -> None:
        (Path(directory) / "zero_to_fp32.py").write_text("")

    def load_checkpoint(self, directory: str, *, tag: str, load_module_strict: bool) -> tuple[str | None, object]:
        self.asked.append(load_module_strict)
        file = Path(directory) / tag / SHARD
        return (str(file) if file.exists() else None), {}


def save(engine: Engine, folder: Path, **more: Any) -> None:
    save_training_state(cast(Any, engine), folder, **{"num_steps": 7, "copy": None, **more})


def load(engine: Engine, folder: Path, copy: EmaCopy | None = None) -> int:
    return load_training_state(cast(Any, engine), folder, copy=copy)


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    return Engine()


def change_state(folder: Path, **values: object) -> None:
    file = folder / "state.json"
    state = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))


def test_steps_and_randomness_come_back(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "a/policy"
    save(engine, folder)
    expected = torch.rand(3)
    assert load(engine, folder) == 7
    assert torch.equal(torch.rand(3), expected)
    state = {"num_steps": 7, "num_ranks": 1, "zero_stage": 3, "expert_parallel_size": 1}
    assert json.loads((folder / "state.json").read_text()) == state
    assert {path.name for path in folder.iterdir()} == {"deepspeed", "random_state_0.safetensors", "state.json"}


def test_experts_on_other_ranks_are_refused(engine: Engine, tmp_path: Path) -> None:
    save(engine, tmp_path)
    change_state(tmp_path, expert_parallel_size=None)  # an older checkpoint
    assert load(engine, tmp_path) == 7
    change_state(tmp_path, expert_parallel_size=2)
    with pytest.raises(CheckpointError, match="saved with expert_parallel_size 2, now 1"):
        load(engine, tmp_path)


def test_frozen_weights_are_not_written_under_any_name(engine: Engine, tmp_path: Path) -> None:
    save(engine, tmp_path)
    held = torch.load(tmp_path / "deepspeed" / SHARD)
    assert set(held["module"]) == {"trained.weight"}
    assert held["step"] == 3
    assert "optimizer" in torch.load(tmp_path / "deepspeed/optimizer.pt")
    load(engine, tmp_path)
    assert engine.asked == [False, True, False], "no `latest`, no frozen weights, and not all weights are there"
    whole = Engine(torch.nn.Linear(2, 2))
    save(whole, tmp_path / "whole")
    load(whole, tmp_path / "whole")
    assert whole.asked == [False, True, True]


def test_the_writer_is_the_engines_own_again(engine: Engine, tmp_path: Path) -> None:
    own = engine.checkpoint_engine.save
    save(engine, tmp_path)
    assert engine.checkpoint_engine.save == own
    engine._copy_recovery_script(str(tmp_path))
    assert (tmp_path / "zero_to_fp32.py").exists()


def test_other_frozen_weights_are_refused(engine: Engine, tmp_path: Path) -> None:
    save(engine, tmp_path)
    with torch.no_grad():
        cast(Model, engine.module).trained.weight.add_(1)
    load(engine, tmp_path)
    with torch.no_grad():
        cast(Model, engine.module).frozen.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="saved with other frozen weights than those that are loaded"):
        load(engine, tmp_path)
    file = tmp_path / "random_state_0.safetensors"
    save_file({"cpu": load_file(file)["cpu"]}, file)
    assert load(engine, tmp_path) == 7, "one from before the digest was written"


def test_another_number_of_ranks_or_no_shards_are_refused(engine: Engine, tmp_path: Path) -> None:
    save(engine, tmp_path)
    change_state(tmp_path, num_ranks=2)
    with pytest.raises(CheckpointError, match=r"saved on 2 ranks, now 1\."):
        load(engine, tmp_path)
    change_state(tmp_path, num_ranks=1)
    (tmp_path / "deepspeed" / SHARD).unlink()
    with pytest.raises(CheckpointError, match="holds no shards of this model"):
        load(engine, tmp_path)


@pytest.mark.parametrize(
    ("saved", "is_sharded", "now", "refused"),
    [
        (3, False, 3, None),
        (2, True, 3, 2),
        (None, True, 3, None),
        (None, True, 2, None),
        (None, True, 0, 2),
        (None, False, 0, None),
    ],
)
def test_another_stage_is_refused(
    saved: int | None, is_sharded: bool, now: int, refused: int | None, tmp_path: Path
) -> None:
    """Older checkpoints do not say their stage, but their files do."""
    engine = Engine(stage=now)
    save(engine, tmp_path)
    change_state(tmp_path, zero_stage=saved)
    if is_sharded:
        (tmp_path / "deepspeed/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("")
    if refused is None:
        assert load(engine, tmp_path) == 7
    else:
        with pytest.raises(CheckpointError, match=f"laid out by ZeRO stage {refused}, now {now}"):
            load(engine, tmp_path)


def test_what_could_not_be_written_is_an_error_after_all_was_tried(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state_dict: dict[str, object], path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.checkpoint_engine, "save", full)
    with pytest.raises(CheckpointError) as caught:
        save(engine, tmp_path)
    assert str(caught.value).startswith(f"checkpoint: {tmp_path}: cannot be written (rank 0: disk full")
    assert SHARD in str(caught.value), "the first error"
    assert (tmp_path / "random_state_0.safetensors").exists()


def test_a_folder_in_the_way_is_an_error(engine: Engine, tmp_path: Path) -> None:
    for name in ("random_state_0.safetensors", "state.json"):
        folder = tmp_path / name.partition(".")[0]
        (folder / name).mkdir(parents=True)
        with pytest.raises(CheckpointError, match=r"cannot be written \(rank 0: "):
            save(engine, folder)


def test_the_reference_is_saved_and_loaded_with_the_policy(engine: Engine, tmp_path: Path) -> None:
    class Copy:
        folders: tuple[Path, ...] = ()

        def save(self, directory: Path) -> None:
            self.folders += (directory / "saved",)

        def load(self, directory: Path) -> None:
            self.folders += (directory / "loaded",)

    copy = cast(EmaCopy, Copy())
    save(engine, tmp_path, copy=copy)
    load(engine, tmp_path, copy=copy)
    assert cast(Copy, copy).folders == (tmp_path / "saved", tmp_path / "loaded")


def test_ranks_whose_files_are_elsewhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "random_state_1.safetensors").write_text("")
    require_all_seen(tmp_path, 0)
    with pytest.raises(CheckpointError, match=r"does not hold what rank 0, 2 wrote: set run\.dir"):
        require_all_seen(tmp_path, 3)
