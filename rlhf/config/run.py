"""The run itself: name, length, batches, evaluation, checkpoints, logs, cluster and placement."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from rlhf.config.base import Section


class RunSection(Section):
    """Name, place and seed of the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder."""
    dir: str = "runs"
    """Folder that holds runs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides every random choice: the same seed is the same run."""


class TrainSection(Section):
    """How long and in which portions to learn."""

    num_steps: PositiveInt | None = None
    """Steps of the loop; without it, num_epochs over the data."""
    num_epochs: PositiveInt = 1
    """Passes over the data, when num_steps is not given."""
    batch_size: PositiveInt = 64
    """Examples in one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Most examples in one forward pass; without it, only tokens count."""
    max_tokens_per_micro_batch: PositiveInt = 4096
    """Most tokens packed into one forward pass; a longer example goes alone."""
    step_timeout_s: PositiveFloat = 1800.0
    """Longest wait for any one phase of training."""
    mismatch_warn: NonNegativeFloat = Field(0.1, allow_inf_nan=False)
    """Warn when sampler and trainer disagree by more than this, in mean nats a response token; 0 never."""
    mismatch_stop: NonNegativeFloat = Field(1.0, allow_inf_nan=False)
    """End the run when sampler and trainer disagree by more than this, in mean nats a response token; 0 never."""
    mismatch_band: float = Field(2.0, gt=1.0, allow_inf_nan=False)
    """Ratio of the trainer's and the sampler's probability of a token above which the token counts as outside the
    band, whichever of the two is larger."""


class EvalSection(Section):
    """Measuring on held-out rows."""

    every_steps: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only at the end, and only where there are held-out rows."""
    max_prompts: PositiveInt = 256
    """Held-out prompts or rows measured each time."""
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    """Sampling temperature of evaluation; 0 is greedy."""


class CheckpointSection(Section):
    """Saving and continuing."""

    every_steps: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Whole checkpoints kept; older ones go only after a newer one is verified."""
    resume: bool = False
    """Continue the run from its newest whole checkpoint."""
    accept_change: tuple[str, ...] = ()
    """Config keys that may differ from the checkpoint's when a run is continued; `data` accepts changed files."""
    grace_s: PositiveFloat = 25.0
    """Time to save in after a signal."""


TRACKER_PACKAGES = {"wandb_project": "wandb", "mlflow_uri": "mlflow"}
"""Setting of `log` that chooses a tracker -> the package that it needs."""


class LogSection(Section):
    """What is shown and recorded."""

    tensorboard: bool = True
    """Write TensorBoard files into the run's folder."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the package wandb, and WANDB_API_KEY in the environment."""
    mlflow_uri: str | None = None
    """MLflow tracking address; needs the package mlflow."""
    sample_every_steps: NonNegativeInt = 10
    """Steps between prints of a step's first sample; 0 never."""
    rollouts: bool = True
    """Write every sampled answer with its reward to rollouts/."""

    @field_validator("mlflow_uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and (urlsplit(uri).username or urlsplit(uri).password):
            raise ValueError("no credentials in the address; export MLFLOW_TRACKING_USERNAME and _PASSWORD.")
        return uri


class ClusterSection(Section):
    """The Ray cluster and where roles live on it."""

    address: str | None = None
    """Ray address; without it RAY_ADDRESS, else a cluster of this machine alone is started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device that models run on; auto takes GPUs where the cluster has them."""
    colocate: tuple[str, ...] = ()
    """Roles that share one group of devices: policy,reference; critic,reward; or all. Repeatable."""
    placement_timeout_s: PositiveFloat = 300.0
    """Longest wait for devices."""
    start_timeout_s: PositiveFloat = 600.0
    """Longest wait for processes to start and models to load."""
    allow_unauthenticated: bool = False
    """Join a cluster beyond this machine without token authentication (RAY_AUTH_MODE=token): only where nobody else
    reaches its network."""
    max_restarts: NonNegativeInt = 5
    """Times in a row, without a step saved in between, that a run whose workers died or stalled starts them again from
    its newest checkpoint; 0 ends the run instead, also where the lost ones only compute and could be replaced."""
    debug: bool = False
    """Show tracebacks."""
