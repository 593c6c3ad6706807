"""What `docker/` holds is well-formed, as far as that can be known without an engine: linted, valid by its schemas, and
safe by its own words."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from pydantic import TypeAdapter

from rlhf.algorithms import build_algorithm
from rlhf.config.commands import PpoConfig
from rlhf.config.loading.load import load_config
from rlhf.planning.roles import place

DOCKER = Path(__file__).parents[2] / "docker"
TOOLS = Path(sys.executable).parent
Tree = dict[str, object]


def read(name: str) -> Tree:
    return TypeAdapter(Tree).validate_python(yaml.safe_load((DOCKER / name).read_text(encoding="utf-8")))


def at(tree: object, path: str) -> object:
    """A value by its dotted path."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else TypeAdapter(Tree).validate_python(tree)[key]
    return tree


def told(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted(DOCKER.glob("Dockerfile.*")), ids=lambda file: file.name)
def test_a_dockerfile_has_no_lint(file: Path) -> None:
    assert told(TOOLS / "hadolint", file) == ""


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && sudo apt-get install git\n")
    assert "DL3004" in told(TOOLS / "hadolint", tmp_path / "Dockerfile")


def test_what_a_dockerfile_copies_is_there() -> None:
    for file in DOCKER.glob("Dockerfile.*"):
        copied = [line.split()[1:-1] for line in file.read_text().splitlines() if line.startswith("COPY ")]
        assert copied
        for name in (name for names in copied for name in names):
            assert (DOCKER.parent / name).exists(), f"{file.name}: {name}"


def test_nccl_finds_the_libraries_of_rdma_in_the_gpu_image() -> None:
    """Without them it talks TCP between nodes."""
    words = set((DOCKER / "Dockerfile.gpu").read_text().split())
    assert {"ibverbs-providers", "libibverbs1", "librdmacm1"} <= words


def test_the_gpu_image_compiles_flash_attention_for_the_gpus_that_the_builder_names_or_not_at_all() -> None:
    """For all that it supports it takes hours, and an image without it computes the same."""
    text = (DOCKER / "Dockerfile.gpu").read_text()
    (step,) = re.findall(r"^RUN if .*?^    fi$", text, re.MULTILINE | re.DOTALL)
    script = (
        step.removeprefix("RUN ").replace("\\\n", "").replace("pip install", "echo $MAX_JOBS:$FLASH_ATTN_CUDA_ARCHS")
    )
    said = {
        archs: subprocess.run(
            ["sh", "-c", script], env={"FLASH_ATTN_CUDA_ARCHS": archs, "MAX_JOBS": "2"}, capture_output=True, text=True,
            timeout=10, check=True,
        ).stdout
        for archs in ("", "90")
    }  # fmt: skip
    assert said[""] == ""
    assert said["90"].startswith("2:90 ")
    assert "flash-attn.lock" in said["90"]
    assert 'ARG FLASH_ATTN_CUDA_ARCHS="80;90"' in text


def test_the_compose_file_is_valid() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    assert told(TOOLS / "check-jsonschema", *schema, DOCKER / "compose.yaml") == ""


def test_the_compose_cluster_asks_for_a_token_and_listens_on_this_machine_alone() -> None:
    compose = read("compose.yaml")
    for name in ("head", "worker", "job"):
        assert at(compose, f"services.{name}.environment.RAY_AUTH_MODE") == "token"
        assert at(compose, f"services.{name}.secrets") == ["ray_token"]
        assert at(compose, f"services.{name}.shm_size") == "2gb"
    assert str(at(compose, "services.job.entrypoint.0")) == "ray", "a driver outside the cluster's nodes cannot join"
    ports = at(compose, "services.head.ports")
    assert isinstance(ports, list)
    assert all(str(port).startswith("127.0.0.1:") for port in ports)
    assert all(
        "ports" not in TypeAdapter(Tree).validate_python(at(compose, f"services.{n}")) for n in ("worker", "job")
    )
    grace = str(at(compose, "services.worker.stop_grace_period")).removesuffix("s")
    assert float(grace) > PpoConfig().checkpoint.grace_s


PODS = ("headGroupSpec.template", "workerGroupSpecs.0.template")


@pytest.mark.parametrize("path", PODS)
def test_the_pods_of_the_ray_job_are_valid(path: str) -> None:
    template = TypeAdapter(Tree).validate_python(at(read("kuberay/rayjob.yaml"), f"spec.rayClusterSpec.{path}"))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod | {"spec": {"containers": "none"}}, "1.33", strict=True)


def ray_job_config() -> PpoConfig:
    """What the job's entrypoint trains, with the config that its ConfigMap is made of."""
    words = shlex.split(str(at(read("kuberay/rayjob.yaml"), "spec.entrypoint")))
    assert words[3] == "/config/ppo.yaml"
    config = load_config("ppo", [str(DOCKER.parent / "configs" / "ppo.yaml"), *words[4:]], {})
    assert isinstance(config, PpoConfig)
    return config


def test_the_ray_job_finds_its_files_on_the_claim_and_its_gpus() -> None:
    """A pod's working directory is empty."""
    config = ray_job_config()
    paths = [config.run.dir, config.data.path, *(section.model for section in config.models.values() if section.model)]
    assert len(paths) >= 4
    mounts = at(read("kuberay/rayjob.yaml"), f"spec.rayClusterSpec.{PODS[1]}.spec.containers.0.volumeMounts")
    assert isinstance(mounts, list)
    claimed = {str(at(mount, "mountPath")) for mount in mounts if at(mount, "name") == "runs"}
    assert claimed == {"/runs"}
    for path in paths:
        assert str(path).startswith("/runs"), path
    assert config.cluster.device == "cuda"
    job = read("kuberay/rayjob.yaml")
    given = int(str(at(job, f"spec.rayClusterSpec.{PODS[1]}.spec.containers.0.resources.limits")["nvidia.com/gpu"]))  # type: ignore[index]
    replicas = at(job, "spec.rayClusterSpec.workerGroupSpecs.0.replicas")
    assert place(config, build_algorithm(config.algo).needs).num_devices == given * int(str(replicas))


def test_the_ray_job_asks_for_a_token_and_waits_for_the_checkpoint() -> None:
    job = read("kuberay/rayjob.yaml")
    assert at(job, "spec.rayClusterSpec.authOptions.mode") == "token"
    words = str(at(job, "spec.entrypoint")).split()
    assert words[:3] == ["rlhf", "train", "ppo"]
    grace = ray_job_config().checkpoint.grace_s
    for path in PODS:
        seconds = at(job, f"spec.rayClusterSpec.{path}.spec.terminationGracePeriodSeconds")
        assert isinstance(seconds, int)
        assert seconds > grace
        volumes = at(job, f"spec.rayClusterSpec.{path}.spec.volumes")
        assert isinstance(volumes, list)
        assert any(at(volume, "emptyDir.medium") == "Memory" for volume in volumes if "emptyDir" in volume)
