"""Tests, when a model has been loaded, that it will be computed as its authors meant, and chooses how.

Two short sequences of random tokens go through the model's own forward, each alone, with eager attention, in the next
finer number format: what they give is right. Then the way that a run computes (packed sequences, our output layer, the
chosen attention, the run's number format, training mode) must agree with it:

| is it wrong | then |
|---|---|
| an attention kernel that leaves something out (a cap on scores) | eager attention, unless another was asked for |
| our output layer | the rule that the config's numbers allow; else the model's own code, on chunks of tokens |
| sequences of a pack see each other | the boundaries that the model's kernels take; else one sequence a pass |
| rotary embeddings that follow the longest sequence | longer sequences alone |
| two passes differ, later tokens change earlier ones, or it still disagrees | the model is refused |

Differences are of log-probs, in nats (of scores for other heads). How large they may be follows from the model itself:
from how far its own forward in the run's format is from the same in the finer one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isfinite

import torch
from transformers import PreTrainedModel

from rlhf.config.models import AttentionName
from rlhf.engines.models.attention import FLASH, PACKED_SDPA, alternatives
from rlhf.engines.models.heads import (
    LogProbHead,
    OwnLogProbHead,
    PackedModel,
    ScoreHead,
    TokenScoreHead,
    ValueHead,
)
from rlhf.engines.models.other_precision import at_least, finer_than
from rlhf.engines.models.output_rule import RuleFinder
from rlhf.engines.models.passes import BoundariesPass, ByLength, MostOnAnyRank, PackedPass, SequencePasses, SinglePasses
from rlhf.engines.models.rope_state import forget_longest_sequence, scaling_starts_at
from rlhf.engines.models.self_test_input import SHARED, context_length, packed_input, random_sequences
from rlhf.engines.models.sequence_parallel import ULYSSES, SequenceGroup, SplitPass
from rlhf.errors import ModelError
from rlhf.types import Head

LEAST = 1e-5
"""Differences that are always allowed."""
NOISE_FACTOR = 4.0
"""How many times its rounding noise two right ways to compute in a format may differ."""
FINER_FACTOR = 8.0
"""The same in the finer format, whose noise is not measured, but follows from the formats' precision."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Agree = Callable[[float], float]
"""The largest of the ranks' numbers, on every rank: all take the same decisions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """How a model computes, and what was found on the way. Differences in nats."""

    attention: str
    passes: str
    packing_leak: float
    """Difference of packed and single sequences in plain packed passes."""
    has_own_head: bool
    noise: float
    """Largest difference of the model's own forward in the run's format to the next finer one."""
    tolerance: float
    """How far two right ways to compute in the run's format may differ."""
    notes: tuple[str, ...]
    """Remedies, and what they cost."""


@dataclass(slots=True, kw_only=True)
class Examination:
    """The test of one model, whose weights are on `device` (under ZeRO-3 partitioned, before DeepSpeed installs its
    hooks). Every method is collective."""

    packed_model: PackedModel
    asked: AttentionName
    """The attention that the user asked for."""
    dtype: torch.dtype
    device: torch.device
    where: str
    """Begins each line of an error: policy.model."""
    agree: Agree
    pace: MostOnAnyRank
    """For passes of which each sequence takes one."""
    group: SequenceGroup | None = None
    """The ranks that compute each batch together; None: each rank computes its own."""
    finer: torch.dtype = field(init=False)
    noise: float = field(init=False, default=0.0)
    sequences: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)

    def run(self) -> SelfTest:
        """Test the model, and set its attention, passes and head to right ones.

        Raises:
            ModelError: the model cannot be computed right.
        """
        self.finer = finer_than(self.dtype, self.packed_model)
        self.sequences = random_sequences(self.model.config, self.device)
        is_training = self.packed_model.training
        self.packed_model.eval()
        chosen = self.attention
        with self._head_of_every_token():
            right = self._right()
            self._settle_head()
            alone = self._settle_attention(chosen, right)
            passes, leak = (self._split(self.group, alone), 0.0) if self.group else self._settle_passes(alone)
            self.packed_model.passes = passes
            self._require_repeatable(right)
        self.packed_model.train(is_training)
        return SelfTest(
            attention=self.attention,
            passes=passes.name,
            packing_leak=leak,
            has_own_head=isinstance(self.packed_model.head, OwnLogProbHead),
            noise=self.noise,
            tolerance=self.tolerance,
            notes=tuple(self.notes),
        )

    @property
    def model(self) -> PreTrainedModel:
        """The tested model."""
        return self.packed_model.model

    @property
    def attention(self) -> str:
        """The attention that computes now."""
        return str(self.model.config._attn_implementation)

    @property
    def tolerance(self) -> float:
        """In the run's format."""
        return max(LEAST, NOISE_FACTOR * self.noise)

    @property
    def finer_tolerance(self) -> float:
        """In the finer format. Models do part of their work in float32 anyway."""
        precision = max(torch.finfo(self.finer).eps, torch.finfo(torch.float32).eps)
        return max(LEAST, FINER_FACTOR * self.noise * precision / torch.finfo(self.dtype).eps)

    def _right(self) -> torch.Tensor:
        """The model's own outputs for each sequence alone, in the finer format; measures the noise of the run's."""
        with self._attention("eager"), self._fails_as_model_error():
            coarse = self._own(self.dtype)
            try:
                right = coarse if self.finer is self.dtype else self._own(self.finer)
            except torch.OutOfMemoryError:
                raise
            except FAILURES:  # kernels without the finer format
                self.finer, right = self.dtype, coarse
        if not right.isfinite().all() or not coarse.isfinite().all():
            raise self._refusal("its own forward pass gives numbers that are not finite")
        unknown = self.finer is self.dtype
        rounding = 2 * torch.finfo(self.dtype).eps * float(right.abs().max())
        self.noise = self.agree(rounding) if unknown else self._difference(coarse, right)
        return right

    def _settle_head(self) -> None:
        """Find the output layer's rule, or let the model's own code take its place."""
        head = self.packed_model.head
        if not isinstance(head, LogProbHead):
            return
        finder = RuleFinder(head, self.model, self.packed_model.head_name)
        self.packed_model.set_head(finder)
        with self._attention("eager"):
            self._ours(SinglePasses(self.pace), self.finer)
        if self.agree(float(finder.rule is None)):
            self.packed_model.set_head(OwnLogProbHead(head, self.model, self.packed_model.head_name))
            self.notes.append(
                f"{self.where}: logits are computed by the model's own code ({type(self.model).__name__}), in "
                f"chunks of {head.rule.chunk_tokens} tokens: it does more than scale and cap them"
            )
            return
        assert finder.rule is not None
        head.rule = finder.rule
        self.packed_model.set_head(head)

    def _settle_attention(self, chosen: str, right: torch.Tensor) -> torch.Tensor:
        """Take the first kernel that agrees with the model's own forward. Returns our outputs for each sequence alone,
        in the finer format."""
        singles, worst = SinglePasses(self.pace), 0.0
        for kernel in alternatives(self.asked, chosen):
            try:
                self.model.set_attn_implementation(kernel)
                with self._attention("eager" if kernel == FLASH else kernel):
                    alone = self._ours(singles, self.finer)
            except torch.OutOfMemoryError:
                raise
            except FAILURES:
                if kernel == alternatives(self.asked, chosen)[-1]:
                    raise
                worst = inf
                continue
            difference, allowed = self._difference(self._comparable(alone), right), self.finer_tolerance
            if kernel == FLASH and difference <= allowed:
                coarse = self._comparable(self._ours(singles, self.dtype))
                difference, allowed = self._difference(coarse, right, torch.median), self.tolerance
            if difference <= allowed:
                self._require_causal(alone)
                if kernel != chosen:
                    self.notes.append(
                        f"{self.where}: attention is {kernel}: {chosen} "
                        + ("fails" if worst == inf else f"is {worst:.2g} nats from the model's own forward")
                    )
                return alone
            worst = max(worst, difference)
        raise self._wrong_attention(right, worst)

    def _settle_passes(self, alone: torch.Tensor) -> tuple[SequencePasses, float]:
        """The first way through the backbone in which packed sequences do not see each other, and by how much they do
        in the plain one."""
        leak = 0.0
        for passes in (PackedPass(), BoundariesPass()):
            try:
                with self._attention("eager" if self.attention == FLASH else self.attention):
                    difference = self._difference(self._ours(passes, self.finer), alone)
                allowed = self.finer_tolerance
                if self.attention == FLASH:
                    coarse = self._ours(SinglePasses(self.pace), self.dtype)
                    difference = self._difference(self._ours(passes, self.dtype), coarse)
                    allowed = self.tolerance
            except torch.OutOfMemoryError:
                raise
            except FAILURES:
                difference, allowed = float("inf"), 0.0
            if difference <= allowed:
                return self._settle_long_sequences(passes), leak
            leak = leak or difference
        self.notes.append(
            f"{self.where}: sequences packed together would see each other (log-probs differ by {leak:.2g} nats in the "
            "self-test), so each sequence gets a forward pass of its own. That is right, and slower: a micro-batch of "
            "n sequences takes n passes"
        )
        return SinglePasses(self.pace), leak

    def _split(self, group: SequenceGroup, alone: torch.Tensor) -> SplitPass:
        """The pass over the ranks of `group`, if that gives what each sequence alone gives."""
        setting = f"{self.where.rpartition('.')[0]}.sequence_parallel_size".lstrip(".")
        refusal = f"{setting}: {group.size} ranks cannot share the sequences of a {type(self.model).__name__}"
        if scaling_starts_at(self.model.config) is not None:
            raise ModelError(f"{refusal}: its rotary embeddings depend on how long they are. Set it to 1.")
        checks = [(PACKED_SDPA, self.finer, alone, self.finer_tolerance)]
        if self.attention == FLASH:
            checks.append((FLASH, self.dtype, self._ours(SinglePasses(self.pace), self.dtype), self.tolerance))
        self.model.set_attn_implementation(ULYSSES)
        for kernel, dtype, right, allowed in checks:
            passes = SplitPass(group, kernel)
            difference = self._difference(self._ours(passes, dtype), right)
            if difference > allowed:
                why = "its layers carry a state from token to token, or mask attention in a way of their own"
                raise ModelError(f"{refusal} (log-probs are off by {difference:.2g} nats): {why}. Set it to 1.")
        return passes

    def _settle_long_sequences(self, passes: PackedPass | BoundariesPass) -> SequencePasses:
        """Keep long sequences away from others, if these would be computed differently beside them."""
        longest = context_length(self.model.config)
        if longest is None:
            return passes
        num_first = len(self.sequences[0])
        positions = [torch.arange(len(one), device=self.device) for one in self.sequences]
        with self._attention("eager" if self.attention == FLASH else self.attention):
            near = self._ours(passes, self.finer)[:num_first]
            positions[1][-1] = longest - 1
            far = self._ours(passes, self.finer, torch.cat(positions))[:num_first]
        forget_longest_sequence(self.model)
        if self._difference(near, far) <= self.finer_tolerance:
            return passes
        limit = scaling_starts_at(self.model.config)
        if limit is None:
            self.notes.append(
                f"{self.where}: a sequence would change with the longest one that is packed with it, so each gets a "
                "forward pass of its own. A micro-batch of n sequences takes n passes"
            )
            return SinglePasses(self.pace)
        return ByLength(passes, limit, self.pace)

    def _require_causal(self, alone: torch.Tensor) -> None:
        first, second = alone[: len(self.sequences[0])], alone[len(self.sequences[0]) :]
        difference = self._difference(first[:SHARED], second[:SHARED])
        if difference > self.finer_tolerance:
            raise self._refusal(
                f"later tokens change what it says of earlier ones (by {difference:.2g} nats): not causal"
            )

    def _require_repeatable(self, right: torch.Tensor) -> None:
        """Two passes in training mode, as a run computes, are equal, and near the right outputs."""
        self.packed_model.train()
        first, second = (self._ours(self.packed_model.passes, self.dtype) for _ in range(2))
        difference = self._difference(first, second)
        if not difference <= self.tolerance:
            raise self._refusal(
                f"two passes over the same tokens in training mode differ by {difference:.2g} nats: something in it is "
                "random (dropout, or jitter of a router) that its config does not turn off"
            )
        difference = self._difference(self._comparable(first), right, torch.median)
        if not difference <= self.tolerance:
            raise self._refusal(
                f"in training mode and {str(self.dtype).removeprefix('torch.')} it is {difference:.2g} nats from its "
                f"own forward pass at half of the tokens (at most {self.tolerance:.2g})"
            )

    def _wrong_attention(self, right: torch.Tensor, difference: float) -> ModelError:
        """Why the model is refused, or the attention that was asked for if another one is right."""
        if self.asked not in ("auto", "eager"):
            with self._attention("eager"):
                alone = self._ours(SinglePasses(self.pace), self.finer)
            if self._difference(self._comparable(alone), right) <= self.finer_tolerance:
                setting = f"{self.where.rpartition('.')[0]}.attention".lstrip(".")
                return ModelError(
                    f"{setting}: {self.asked} leaves out something of a {type(self.model).__name__}'s attention "
                    f"(log-probs are off by {difference:.2g} nats), for example a cap on scores. Set auto or eager."
                )
        return self._refusal(f"its outputs differ from those of its own forward pass by {difference:.2g} nats")

    def _refusal(self, why: str) -> ModelError:
        return ModelError(f"{self.where}: a {type(self.model).__name__} cannot be computed right: {why}.")

    def _ours(self, passes: SequencePasses, dtype: torch.dtype, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[T]: what a run computes of each token of both sequences."""
        packed = packed_input(self.sequences, positions)
        with self._fails_as_model_error(), at_least(dtype, self.packed_model):
            outputs = passes.outputs(self.model, self.packed_model.head, packed)
        return outputs[0]

    def _own(self, dtype: torch.dtype) -> torch.Tensor:
        """What the model's own forward says of each sequence alone: log-probs [T], or scores, of which a sequence
        classifier gives only the last."""
        outputs = []
        with self.packed_model.own_forward() as model, at_least(dtype, model):
            for tokens in self.sequences:
                forget_longest_sequence(model)
                logits = model(input_ids=tokens[None], use_cache=False).logits[0]
                logits = logits if logits.dtype == torch.float64 else logits.float()
                if self.packed_model.head_kind is Head.LOG_PROBS:
                    known = logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])
                    logits = torch.cat([known.new_zeros(1, 1), known])
                outputs.append(logits.flatten())
        return torch.cat(outputs)

    def _comparable(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs that the model's own forward gives as well."""
        if self.packed_model.head_kind in (Head.LOG_PROBS, Head.TOKEN_SCORES):
            return outputs
        return outputs[torch.tensor([len(one) for one in self.sequences], device=self.device).cumsum(0) - 1]

    def _difference(
        self, one: torch.Tensor, other: torch.Tensor, over: Callable[[torch.Tensor], torch.Tensor] = torch.max
    ) -> float:
        """Largest over the ranks; infinite where a number is not finite."""
        difference = float(over((one.double() - other.double()).abs()))
        return self.agree(difference if isfinite(difference) else inf)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Compute with another attention inside this block."""
        before = self.attention
        if name == before:
            yield
            return
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    @contextmanager
    def _head_of_every_token(self) -> Iterator[None]:
        """Scores at every token inside this block, where the head gives fewer."""
        head = self.packed_model.head
        if isinstance(head, ValueHead | ScoreHead):
            self.packed_model.set_head(TokenScoreHead(head.weight, None))
            yield
            self.packed_model.set_head(head)
        else:
            yield

    @contextmanager
    def _fails_as_model_error(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            if isinstance(error, ModelError | torch.OutOfMemoryError | torch.distributed.DistError):
                raise
            first = (str(error).strip() or "no message").splitlines()[0]
            raise self._refusal(f"a forward pass over text fails ({type(error).__name__}: {first})") from error
