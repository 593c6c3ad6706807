"""Sequence classifiers of any build as reward models: the model's own forward over padded sequences.

A decoder's score is a layer at the last token, and its sequences are packed. An encoder reads both ways, pools its
tokens by layers of its own, and would see through a pack; so it gets what its library's forward takes: rows that are
padded to one length, a mask, and which of two texts each token is in.
"""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.self_test import LEAST, NOISE_FACTOR, SelfTest
from rlhf.errors import ModelError

TEST_LENGTHS = (5, 11)
PADDED = "padded"
ALONE = "one sequence a forward pass"


class PooledModel(nn.Module):
    """A sequence classifier with one output, whose forward takes a packed batch and gives [1, S] scores."""

    def __init__(self, model: PreTrainedModel, *, separator: int | None = None) -> None:
        """`separator` is the token between two texts, for a model that is told which one each token is in."""
        super().__init__()
        self.model = model
        self._pad = model.config.pad_token_id or 0
        takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        num_types = model.config.to_dict().get("type_vocab_size", 0)
        self._separator = separator if takes_types and num_types > 1 else None
        self._is_padded = True

    def forward(self, packed: PackedInput) -> torch.Tensor:
        """[1, S] scores, float32."""
        sequences = packed.token_ids.split(packed.lengths)
        scores = torch.zeros(1, len(sequences), device=packed.token_ids.device)
        for group in self._groups(packed.lengths):
            scores[0, group] = self._scores([sequences[index] for index in group])
        return scores

    @torch.no_grad()
    def examine(self, where: str) -> SelfTest:
        """Compare two sequences of random tokens padded and each alone; where they differ, padding is not used.

        Raises:
            ModelError: two equal passes differ, a score is not finite, or the model's forward fails.
        """
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        sequences = [
            torch.randint(vocabulary // 2, vocabulary, (length,), generator=generator).to(device)
            for length in TEST_LENGTHS
        ]
        try:
            alone = torch.cat([self._scores([sequence]) for sequence in sequences])
            again = torch.cat([self._scores([sequence]) for sequence in sequences])
            padded = self._scores(sequences)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{type(self.model).__name__} cannot score a text ({type(error).__name__}: {str(error)[:120]})"
            raise ModelError(f"{where}: {what}; serve it over HTTP (reward.url).") from error
        if not alone.isfinite().all() or not torch.equal(alone, again):
            raise ModelError(f"{where}: two passes over the same tokens give {alone.tolist()} and {again.tolist()}.")
        leak = float((padded - alone).abs().max())
        precision = torch.finfo(next(self.model.parameters()).dtype).eps
        tolerance = max(LEAST, NOISE_FACTOR * precision * (1.0 + float(alone.abs().max())))
        self._is_padded = leak <= tolerance
        note = f"padding changes its scores by {leak:.2g}: each sequence has a forward pass of its own"
        return SelfTest(
            attention=str(self.model.config._attn_implementation),
            passes=PADDED if self._is_padded else ALONE,
            packing_leak=leak,
            has_own_head=True,
            noise=0.0,
            tolerance=tolerance,
            notes=() if self._is_padded else (note,),
        )

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The sequences of each pass, longest first: none is less than half as long as the longest."""
        group: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if group and not (self._is_padded and 2 * lengths[index] >= lengths[group[0]]):
                yield group
                group = []
            group.append(index)
        yield group

    def _scores(self, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
        """[S]."""
        token_ids = pad_sequence(list(sequences), batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
        types = {} if self._separator is None else {"token_type_ids": texts_of(token_ids, self._separator) * mask}
        logits: torch.Tensor = self.model(input_ids=token_ids, attention_mask=mask, **types).logits
        return logits[:, 0].float()


def texts_of(token_ids: torch.Tensor, separator: int) -> torch.Tensor:
    """[S, L] -> 0 up to a row's first separator, 1 behind it: `[CLS] a [SEP] b [SEP]`."""
    is_separator = (token_ids == separator).to(torch.int64)
    return ((is_separator.cumsum(-1) - is_separator) > 0).to(torch.int64)
