"""A model that is trained: one rank of it, with DeepSpeed ZeRO stage 0 to 3, on CPU or CUDA."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from rlhf.algorithms.base import Objective, Outputs, TensorBatch
from rlhf.algorithms.losses import to_metrics
from rlhf.engines.base import PassReport
from rlhf.engines.models.adapter_names import may_stay_unchanged
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.models.checkpointing import checkpoint_layers
from rlhf.engines.models.chunked_mlp import chunk_feed_forward
from rlhf.engines.models.finite_weights import require_finite
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.loading import choose_dtype
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.router_replay import RouterReplay
from rlhf.engines.models.routers import set_up_routers
from rlhf.engines.models.text_part import freeze_other_parts
from rlhf.engines.process.distributed import deepspeed, torch_device
from rlhf.engines.training.checkpoint import load_training_state, save_training_state
from rlhf.engines.training.ema_reference import EmaCopy
from rlhf.engines.training.examined import examine, probe_policy
from rlhf.engines.training.expert_parallel import (
    BeforeSplit,
    set_up_split_routers,
    with_expert_parallelism,
)
from rlhf.engines.training.export import check_export, export_model
from rlhf.engines.training.master_weights import MovementCheck, master_shards
from rlhf.engines.training.optimizer import build_optimizer, learning_rate, training_config
from rlhf.engines.training.optimizer_swap import OptimizerSwap
from rlhf.engines.training.partitioned_loading import load_on_rank_zero, partition, replicate
from rlhf.engines.training.replicas import CHECK_EVERY_STEPS, require_equal_replicas
from rlhf.engines.training.router_balance import BALANCE, RouterBalance
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.engines.training.step_guard import GradientWatch, StepGuard
from rlhf.engines.weight_sync.base import WeightSender
from rlhf.engines.weight_sync.probe import PolicyProbe
from rlhf.errors import RlhfError
from rlhf.types import FloatArray, Metrics, PackedTokens, StepReport, SyncReport, TrainBatch


class DeepSpeedEngine:
    """One rank of a `TrainEngine`. Every method is collective: all ranks call it, each with its own micro-batches and
    the same number of them.

    Losses are divided by the step's global denominators, so the gradient of a step is the plain sum over micro-batches
    and ranks, however the batch is split.
    """

    def __init__(
        self, spec: TrainedModelSpec, objectives: Mapping[str, Objective], *, device: str, where: str = "model"
    ) -> None:
        """Load `spec.model` on `device` (cpu, cuda), in the process group that `init_distributed` entered.

        `objectives` are the losses by the names that batches give. Raises ModelError, whose lines begin with `where`.
        """
        self.num_ranks = dist.get_world_size()
        # Ranks that compute a micro-batch together all have its whole loss, which is reported once.
        self._counts = dist.get_rank() % spec.section.sequence_parallel_size == 0
        self._device = torch_device(device)
        dtype = choose_dtype(spec.section, self._device, where)
        stage = spec.section.stage_on(self.num_ranks, is_float32=dtype == torch.float32)
        section = spec.section.model_copy(update={"zero_stage": stage})
        self._section = section
        self._where = where
        self._objectives = objectives
        self._num_planned_steps = spec.num_steps
        self._num_steps = 0
        self._window_is_open = False
        self._sender: WeightSender | None = None
        self._ema_copy: EmaCopy | None = None
        self._loaded = load_on_rank_zero(
            section, spec.model, spec.head, where=where, device=self._device, seed=spec.seed, new_head=True
        )
        freeze_other_parts(self.module)
        if section.lora.rank:
            add_adapters(self.module, section.lora, seed=spec.seed, where=f"{where.rpartition('.')[0]}.lora.targets")
        set_up_routers(self.module, section, where)
        rule = LogitsRule(
            temperature=spec.temperature,
            float32=section.float32_head,
            chunk_tokens=section.log_probs_chunk_tokens,
            kept_bytes=int(section.log_probs_kept_mib * 2**20),
        )
        self._temperature = spec.temperature
        self._packed_model = packed_model = PackedModel(self._loaded.model, spec.head, rule, where=where)
        self._replay = RouterReplay(packed_model) if spec.replays_routers else None
        chunk_feed_forward(self.module, section, where)
        checkpoint_layers(self.module, section, where, on_gpu=self._device.type == "cuda")
        optimizer = build_optimizer(section, packed_model.parameters())
        config = training_config(section, dtype, self._device)
        if stage == 3:
            partition(packed_model, self._device, config, hpz_size=section.zero_hpz_partition_size)
        else:
            replicate(packed_model, self._device)
        self.self_test = examine(packed_model, section, dtype=dtype, device=self._device, where=where)
        self._engine = self._started(packed_model, optimizer, config, dtype)
        self._balance: RouterBalance | None = None
        if spec.balances_routers:
            self._balance = RouterBalance(packed_model, spec.algorithm.router_aux_coef, where=where)
        trainable = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._watch = GradientWatch(trainable, self._device)
        self._guard = StepGuard(optimizer, None if section.zero_stage else section.max_grad_norm)
        self._movement = MovementCheck({name: p for name, p in trainable.items() if not may_stay_unchanged(name)})
        self._optimizer = optimizer
        self._optimizer_on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        if section.swap_optimizer:
            self._optimizer_on_device = OptimizerSwap(self._engine, optimizer).on_device

    def _started(
        self,
        packed_model: PackedModel,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, object],
        dtype: torch.dtype,
    ) -> "deepspeed.DeepSpeedEngine":
        """DeepSpeed's engine around a model that the self-test has passed."""
        section, before = self._section, None
        if section.expert_parallel_size > 1:
            before = BeforeSplit.of(
                packed_model,
                dtype=dtype,
                device=self._device,
                tolerance=self.self_test.tolerance,
                shared_by=section.sequence_parallel_size,
            )
        config = with_expert_parallelism(
            config, packed_model, section, dtype=dtype, device=self._device, where=self._where
        )
        engine, _, _, _ = deepspeed.initialize(model=packed_model, optimizer=optimizer, config=config)
        engine.train()
        if before is not None:
            set_up_split_routers(self.module, section, self._where)
            before.require_same(engine, packed_model, self._where)
        return engine

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face model, with its own parameter names; under ZeRO-3 its parameters are partitioned."""
        return self._loaded.model

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """The head's outputs for each of this rank's micro-batches: [T] log-probs or values, or [S] scores."""
        return [self._engine(PackedInput.from_numpy(batch, self._device))[0].cpu().numpy() for batch in batches]

    def probe(self, packed: PackedTokens) -> PolicyProbe:
        """This model's log-probs of `packed`, as a run computes them and of each sequence alone. All ranks get the
        same batch."""
        return probe_policy(
            lambda: self.forward([packed])[0], self._packed_model, self.self_test, self._temperature, self._device
        )

    def start_ema_reference(self, decay: float) -> None:
        """Start to keep an EMA reference of this model; `decay` is the share of it that one `update_ema` keeps."""
        self._ema_copy = EmaCopy(self._engine, self._section.zero_stage, decay)

    def forward_ema_reference(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """As `forward`, with the EMA reference's weights."""
        with self._ema.in_place_of_policy_weights():
            return self.forward(batches)

    def update_ema(self) -> float:
        """Move the EMA reference toward this model; returns the norm of its change, over the whole model."""
        return self._ema.update_ema()

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        """Accumulate the gradient of this rank's micro-batches, and return this rank's part of the metrics, with the
        outputs for those that are a first pass."""
        metrics, first_outputs = Metrics(), []
        if self._balance is not None:
            self._balance.count(self._outputs, batches)
        for batch in batches:
            predictions, *entropy = self._outputs(batch).unbind()
            if batch.is_padding:
                loss = 0.0 * predictions.sum()
            else:
                outputs = Outputs(predictions=predictions, entropy=entropy[0] if entropy else None)
                result = self._objectives[batch.objective](outputs, TensorBatch.from_numpy(batch, self._device))
                metrics = metrics + result.metrics if self._counts else metrics
                loss = result.loss if result.loss.requires_grad else result.loss + 0.0 * predictions.sum()
            if self._balance is not None:
                weighted, balance = self._balance.loss(batch)
                loss, metrics = loss + weighted, metrics + to_metrics({BALANCE: balance})
            if self._replay is not None and batch.tokens.routed_experts is not None:
                metrics = metrics + Metrics(sums=self._replay.shares(batch.denominators.tokens))
            if batch.is_first_pass and self._counts:
                first_outputs.append(predictions.detach().cpu().numpy())
            self._watch.observe_loss(loss)
            # DeepSpeed averages gradients over ranks; this is the one place that turns the mean into a sum.
            self._engine.backward(loss * self.num_ranks)
            self._window_is_open = True
        return PassReport(metrics=metrics, outputs=tuple(first_outputs))

    def _outputs(self, batch: TrainBatch) -> torch.Tensor:
        outputs: torch.Tensor = self._engine(PackedInput.from_numpy(batch.tokens, self._device))
        return outputs

    def optim_step(self) -> StepReport:
        """Apply the accumulated gradient and clear it; if any rank saw a number that is not finite, only clear it. A
        skipped step counts in the learning-rate schedule."""
        if not self._window_is_open:
            raise RlhfError("optim_step was called with no micro-batch since the last step")
        self._window_is_open = False
        lr = learning_rate(self._section, self._num_steps, self._num_planned_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._movement.is_due:
            self._movement.before_step(self._master_shards())
        self._guard.skip = not self._watch.end_window()
        with self._optimizer_on_device():
            self._engine.step()
        finite = self._engine.was_step_applied() and not self._guard.skip
        self._num_steps += 1
        if self._has_replicas and self._num_steps % CHECK_EVERY_STEPS == 0:
            require_equal_replicas(self.module, self._where, self._device)
        is_looked_at = finite and self._movement.is_due
        unmoved = self._movement.after_step(self._master_shards(), self._device) if is_looked_at else ()
        return StepReport(grad_norm=self._grad_norm() if finite else math.inf, lr=lr, finite=finite, unmoved=unmoved)

    def attach_sender(self, sender: WeightSender) -> None:
        """Set the sender that `send_weights` uses."""
        self._sender = sender

    def detach_sender(self) -> None:
        """Close the sender, if there is one."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def send_weights(self, version: int) -> SyncReport:
        """Send this model's weights to the rollout engines as `version`. Raises WeightSyncError; and NumericsError,
        before anything is sent, if some weights are not finite."""
        if self._sender is None:
            raise RlhfError("send_weights was called before a sender was attached")
        self._require_sound()
        self._partition_all()
        return self._sender.send(version)

    def save(self, directory: Path) -> None:
        """Write this rank's weights, optimizer, schedule and random state to `directory`, which all ranks share.
        Raises CheckpointError; and NumericsError, before anything is written, if some weights are not finite."""
        self._require_sound()
        save_training_state(self._engine, directory, num_steps=self._num_steps, copy=self._ema_copy)

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote, bit for bit. The caller has verified the files. Raises CheckpointError."""
        with self._optimizer_on_device():
            self._num_steps = load_training_state(self._engine, directory, copy=self._ema_copy)
        self._movement.is_due = self._num_steps == 0

    def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format (safetensors + tokenizer) to `directory`, from rank 0; LoRA adapters
        are merged, and also written unmerged to its folder `adapter`. Raises as `save`."""
        self._require_sound()
        self._partition_all()
        export_model(self._loaded, directory, self._section.lora)

    def check_export(self, directory: Path) -> None:
        """Load an export, and compare it with the current weights, bit for bit. Raises ModelError on rank 0."""
        self._partition_all()
        check_export(self._loaded, directory, where=self._where)

    def _partition_all(self) -> None:
        """Under ZeRO-3, finish the gathers that a forward pass has started for layers that it never reached: DeepSpeed
        gathers ahead, by the trace of an earlier pass, and refuses to gather a parameter twice. The optimizer's step
        and a checkpoint do the same."""
        if self._section.zero_stage == 3:
            self._engine.optimizer._partition_all_parameters()

    def _require_sound(self) -> None:
        """Check the weights before they leave the ranks. Collective. Raises NumericsError."""
        require_finite(self.module, self._where, self._device)
        if self._has_replicas:
            require_equal_replicas(self.module, self._where, self._device)

    @property
    def _has_replicas(self) -> bool:
        """Whether several ranks hold the whole model."""
        return self.num_ranks > 1 and self._section.zero_stage < 3

    @property
    def _ema(self) -> EmaCopy:
        if self._ema_copy is None:
            raise RlhfError("the EMA reference was used before start_ema_reference was called")
        return self._ema_copy

    def _master_shards(self) -> Iterator[tuple[int, torch.Tensor]]:
        return master_shards(self._engine, self._section.zero_stage)

    def _grad_norm(self) -> float:
        """Global norm before clipping."""
        return float(self._engine.get_global_grad_norm()) if self._section.zero_stage else self._guard.norm
