"""The run itself: name, length, batches, evaluation, checkpoints, logs, cluster and placement."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from rlhf.config.base import Section
from rlhf.config.path_text import PathText
from rlhf.config.reward.address import require_no_secrets


class RunSection(Section):
    """Name, folder and seed of the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder."""
    dir: PathText = "runs"
    """Folder that holds runs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of every random choice: the same seed repeats the run."""


class TrainSection(Section):
    """How long to train, and in which batches."""

    num_steps: PositiveInt | None = None
    """Steps of the training loop; if not given, num_epochs over the data."""
    num_epochs: PositiveInt = 1
    """Epochs over the data, if num_steps is not given."""
    batch_size: PositiveInt = 64
    """Mini-batch: examples in one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Micro-batch: most examples in one forward pass; if not given, only tokens are limited."""
    max_tokens_per_micro_batch: PositiveInt = 4096
    """Sequence packing: most tokens packed into one forward pass. A longer example is a micro-batch by itself."""
    fuse_old_log_probs: bool = True
    """Take the log-probs of the old policy from the pass that learns, if the algorithm allows it and each rollout batch
    is one optimizer step: one forward pass less, with the same results. false: always a pass of their own."""
    on_oom: Literal["halve", "stop"] = "halve"
    """When a model runs out of memory. halve: start again from the newest checkpoint with micro-batches of half as many
    tokens, which have the same gradient; stop: end the run."""
    step_timeout_s: PositiveFloat = 1800.0
    """Longest time for any one phase of training."""
    mismatch_warn: NonNegativeFloat = Field(0.1, allow_inf_nan=False)
    """Warn when the log-probs of the rollout engine and the trainer differ by more than this, in mean nats a response
    token (train-inference mismatch); 0 never warns."""
    mismatch_stop: NonNegativeFloat = Field(1.0, allow_inf_nan=False)
    """End the run when they differ by more than this, in mean nats a response token; 0 never ends it."""
    mismatch_band: float = Field(2.0, gt=1.0, allow_inf_nan=False)
    """A token counts as outside the band if the trainer's and the engine's probabilities of it differ by more than this
    factor."""


class EvalSection(Section):
    """Evaluation on held-out rows."""

    every_steps: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only at the end, and only if there are held-out rows."""
    max_prompts: PositiveInt = 256
    """Most held-out prompts or rows in one evaluation."""
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    """Sampling temperature of evaluation; 0 is greedy."""


class CheckpointSection(Section):
    """Saving and resuming."""

    every_steps: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Complete checkpoints kept. An old one is deleted only after a newer one has been verified."""
    resume: Literal[False, True, "auto"] = False
    """Resume the run from its newest complete checkpoint; auto does so where the folder has a checkpoint, starts
    the run where it has none, and does nothing where the run is done."""
    accept_change: tuple[str, ...] = ()
    """Config keys that may differ from those of the checkpoint that is resumed; `data` accepts changed data files."""
    grace_s: PositiveFloat = 25.0
    """Time for saving after SIGTERM or SIGINT."""


TRACKER_PACKAGES = {"wandb_project": "wandb", "mlflow_uri": "mlflow"}
"""Setting of `log` that chooses a tracker -> the package that the tracker needs."""


class LogSection(Section):
    """What is shown and recorded."""

    tensorboard: bool = True
    """Write TensorBoard files to the run's folder."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the package wandb, and WANDB_API_KEY in the environment."""
    mlflow_uri: str | None = None
    """MLflow tracking address; needs the package mlflow."""
    sample_every_steps: NonNegativeInt = 10
    """Steps between prints of a group's best and worst response; 0 prints none."""
    report: bool = True
    """Write report.html, a page about the run, into its folder when it ends."""
    rollouts: bool = True
    """Write every sampled response with its reward to rollouts/, and those of evaluations to evaluations/."""

    @field_validator("mlflow_uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None:
            require_no_secrets(uri, "no credentials in the address; export MLFLOW_TRACKING_USERNAME and _PASSWORD.")
        return uri


class ClusterSection(Section):
    """The Ray cluster, and where models and engines are placed on it."""

    address: str | None = None
    """Ray address; if not given, RAY_ADDRESS, else a new cluster on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that models run on; auto takes GPUs if the cluster has some, and refuses to train models of more than two
    billion parameters on CPUs."""
    colocate: tuple[str, ...] = ()
    """Roles that are colocated on one group of devices: policy,reference; critic,reward; or all. With rollout among
    them (hybrid engine), vLLM goes into sleep mode while models compute. Repeatable."""
    placement_timeout_s: PositiveFloat = 300.0
    """Longest time to wait for devices."""
    start_timeout_s: PositiveFloat = 600.0
    """Longest time for workers to start and models to load; for models, a second is added for each 100 MB of their
    weights."""
    allow_unauthenticated: bool = False
    """Join a cluster on other machines without token authentication (RAY_AUTH_MODE=token). Only for a network that
    nobody else can reach."""
    fork_workers: bool = True
    """Without GPUs, on one Linux machine: fork workers from a process that has imported their libraries, which starts
    them in a quarter of the time."""
    max_restarts: NonNegativeInt = 5
    """How many times in a row, without a checkpoint in between, a run whose workers died or stalled starts them again
    from its newest checkpoint. 0 ends the run instead, even if the lost workers hold no state and could be replaced."""
    debug: bool = False
    """Show tracebacks."""
