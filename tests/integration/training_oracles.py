"""What the training engine must compute: the worker's losses and their gradients, one sequence at a time, by autograd
through transformers' own models."""

import inspect
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.engines.models.routers import BALANCING
from rlhf.types import Signal
from tests.integration.training_rows import experiences

Results = dict[str, torch.Tensor]
TEMPERATURE = 0.7


def naive_log_probs(model: PreTrainedModel, token_ids: np.ndarray, temperature: float) -> tuple[torch.Tensor, ...]:
    """[T] log-probs and entropies of one sequence, alone and unpacked, from all logits at once."""
    ids = torch.tensor(token_ids)
    log_p = (model(ids[None]).logits[0, :-1].float() / temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, ids[1:, None]).squeeze(-1)
    return torch.cat([torch.zeros(1), log_probs]), torch.cat([torch.zeros(1), -(log_p.exp() * log_p).sum(-1)])


def naive_loss(model: PreTrainedModel) -> torch.Tensor:
    """The worker's loss, one sequence at a time."""
    sequences = [experience.sequences[0] for experience in experiences()]
    loss = torch.zeros(())
    for sequence in sequences:
        log_probs, entropy = naive_log_probs(model, sequence.token_ids, TEMPERATURE)
        gain = torch.tensor(sequence.signals[Signal.ADVANTAGES]) * log_probs + 0.1 * entropy
        loss = loss - gain[torch.tensor(sequence.loss_mask)].sum()
    return loss / sum(int(sequence.loss_mask.sum()) for sequence in sequences)


def naive_gradient(folder: Path) -> dict[str, torch.Tensor]:
    """The gradient of the worker's loss, one sequence at a time, by autograd through transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    naive_loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradient_of(results: Results, case: str) -> dict[str, torch.Tensor]:
    prefix = f"gradients/{case}/grad/"
    return {name.removeprefix(prefix): value for name, value in results.items() if name.startswith(prefix)}


def assert_same_gradient(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        # The gradient of a key's bias is 0 but for rounding: softmax ignores what all scores of a query share.
        allowed = 1e-6 if name.endswith("k_proj.bias") else 1e-5 * float(theirs[name].norm())
        assert float((gradient - theirs[name]).norm()) < allowed, name


def balance(model: PreTrainedModel) -> torch.Tensor:
    """The load-balancing loss over all tokens that the worker learns from, by transformers' own function."""
    sequences = [experience.sequences[0] for experience in experiences()]
    logits = [
        model(torch.tensor(sequence.token_ids)[None], output_router_logits=True).router_logits for sequence in sequences
    ]
    layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    is_learned = torch.tensor(np.concatenate([sequence.loss_mask for sequence in sequences]))[None].long()
    source = inspect.getmodule(type(model))
    settings = model.config.get_text_config()
    loss: torch.Tensor = vars(source)[BALANCING](layers, layers[0].shape[-1], settings.num_experts_per_tok, is_learned)
    return loss


def balanced_gradient(folder: Path, coef: float) -> tuple[float, dict[str, torch.Tensor]]:
    """The load-balancing loss, and the gradient of the worker's loss with `coef` times it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    term = balance(model)
    (naive_loss(model) + coef * term).backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(term.detach()), gradient
