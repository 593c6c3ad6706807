"""What a run's processes find in their environment."""

import pytest

from rlhf.actors.environment import (
    OPENMP_SPINS,
    drop_expandable_segments,
    model_environment,
    rank_environment,
)
from rlhf.planning.placement import Shape, plan_placement
from rlhf.types import Role

ONE, TWO = (Shape(num_nodes=1, num_devices_per_node=n) for n in (1, 2))


@pytest.mark.parametrize(
    ("shapes", "colocate", "engines", "threads"),
    [
        ({Role.POLICY: ONE}, (), 0, "8"),
        ({Role.POLICY: TWO}, (), 0, "4"),
        ({Role.POLICY: TWO, Role.REFERENCE: TWO}, (), 0, "4"),
        ({Role.POLICY: TWO, Role.REFERENCE: TWO}, ("policy,reference",), 0, "4"),
        ({Role.POLICY: ONE, Role.ROLLOUT: ONE}, (), 4, "2"),
        ({Role.POLICY: ONE, Role.ROLLOUT: TWO}, (), 2, "2"),
        ({Role.POLICY: ONE, Role.ROLLOUT: ONE}, (), 1, "8"),
        ({Role.POLICY: Shape(num_nodes=1, num_devices_per_node=16)}, (), 0, "1"),
    ],
)
def test_cores_are_shared_by_what_works_at_once(
    shapes: dict[Role, Shape], colocate: tuple[str, ...], engines: int, threads: str
) -> None:
    placement = plan_placement(shapes, colocate, num_engines=engines)
    variables = model_environment(placement, "cpu", 8.0, {})
    assert variables == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": OPENMP_SPINS}


def test_what_the_user_has_set_stays() -> None:
    placement = plan_placement({Role.POLICY: ONE, Role.CRITIC: ONE}, ())
    variables = model_environment(placement, "cpu", 8.0, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7"})
    assert variables == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "3"}
    assert rank_environment(placement, "cpu", 8.0, {"PATH": "/bin"}) == {}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        chosen = {"OMP_NUM_THREADS": "3", name: "max_split_size_mb:512"}
        assert rank_environment(placement, "cuda", 8.0, chosen) == {"OMP_NUM_THREADS": "3"}


def test_on_gpus_ranks_have_their_share_of_the_cores() -> None:
    """For an optimizer on the host; engines keep the one thread that they want."""
    placement = plan_placement({Role.POLICY: TWO, Role.CRITIC: ONE, Role.ROLLOUT: ONE}, (), num_engines=8)
    assert model_environment(placement, "cuda", 8.0, {}) == {"DS_ACCELERATOR": "cuda"}
    expected = {"OMP_NUM_THREADS": "4", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert rank_environment(placement, "cuda", 8.0, {}) == expected


def test_ranks_that_share_gpus_with_engines_keep_memory_that_has_ipc_handles() -> None:
    placement = plan_placement({Role.POLICY: TWO, Role.ROLLOUT: ONE}, ("policy,rollout",), num_engines=2)
    assert rank_environment(placement, "cuda", 8.0, {}) == {"OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("expandable_segments:True", None),
        ("max_split_size_mb:512, expandable_segments:True", "max_split_size_mb:512"),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_engines_get_no_expandable_segments_from_their_node(given: str, left: str | None) -> None:
    """vLLM captures graphs of buffers that it shares by CUDA IPC handles, which such memory does not have."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environ = {name: given, "PATH": "/bin"}
        drop_expandable_segments(environ)
        assert environ == {"PATH": "/bin"} | ({name: left} if left else {})
