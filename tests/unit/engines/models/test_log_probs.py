"""Chunked log-probs and entropy equal log_softmax of the whole logits, with their gradients."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.engines.models.log_probs import LogitsRule, token_log_probs

RULES = [
    LogitsRule(chunk_tokens=7),
    LogitsRule(chunk_tokens=1000, temperature=0.7),
    LogitsRule(chunk_tokens=5, temperature=0.7, scale=0.4, kept_bytes=23 * 50 * 4),
    LogitsRule(chunk_tokens=1, temperature=1.6, scale=0.3),
    LogitsRule(chunk_tokens=4, temperature=0.5, softcap=3.0, scale=1.5),
]


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rule: LogitsRule
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = rule.scale * (hidden @ weight.T + (0 if bias is None else bias))
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    distribution = torch.distributions.Categorical(logits=logits / rule.temperature)
    return distribution.log_prob(targets), distribution.entropy()


def inputs(num_tokens: int, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator) / 2
    offset = torch.randn(50, generator=generator) if bias else None
    return hidden, weight, offset, torch.randint(50, (num_tokens,), generator=generator)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.5])
def test_values_and_gradients_equal_those_of_the_full_matrix(rule: LogitsRule, bias: bool, entropy_coef: float) -> None:
    hidden, weight, offset, targets = inputs(23, bias=bias)
    coefs = torch.linspace(-2, 2, 23)
    results = []
    for of, dtype in ((token_log_probs, torch.float32), (naive, torch.float64)):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, offset) if x is not None]
        log_probs, entropy = of(leaves[0], leaves[1], leaves[2] if bias else None, targets, rule)
        loss = (log_probs * coefs.to(dtype)).sum()
        if entropy_coef:
            loss = loss + entropy_coef * (entropy * coefs.to(dtype)).sum()
        results.append([log_probs, entropy, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_keeping_log_probs_saves_a_matrix_product_and_changes_no_bit(temperature: float) -> None:
    hidden, weight, _, targets = inputs(23, bias=False)
    results, counts = [], []
    for kept_bytes in (23 * 50 * 4 - 1, 23 * 50 * 4):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        rule = LogitsRule(chunk_tokens=8, temperature=temperature, kept_bytes=kept_bytes)
        with Products() as products:
            log_probs, entropy = token_log_probs(leaves[0], leaves[1], None, targets, rule)
            gradients = torch.autograd.grad((log_probs + 0.3 * entropy).sum(), leaves)
        results.append([log_probs, entropy, *gradients])
        counts.append(products.count)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert counts == [12, 9], "products for each of three chunks"


def test_a_gradient_through_the_entropy_alone() -> None:
    hidden, weight, _, targets = inputs(9, bias=False)
    hidden = hidden.double().requires_grad_()

    def entropy(h: torch.Tensor) -> torch.Tensor:
        return token_log_probs(h, weight.double(), None, targets, LogitsRule(chunk_tokens=4))[1]

    expected = torch.autograd.grad(naive(hidden, weight.double(), None, targets, LogitsRule())[1].sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(entropy(hidden).sum(), hidden)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_entropy_is_that_of_the_distribution_at_the_temperature() -> None:
    """Uniform over v tokens: ln v at every temperature; two tokens with a gap g: the binary entropy of sig(g / t)."""
    hidden, weight = torch.ones(1, 1), torch.zeros(8, 1)
    for temperature in (0.1, 1.0, 5.0):
        _, entropy = token_log_probs(hidden, weight, None, torch.zeros(1).long(), LogitsRule(temperature=temperature))
        assert entropy.item() == pytest.approx(2.0794415, abs=1e-6)
    two = torch.tensor([[1.0], [0.0]])
    log_prob, entropy = token_log_probs(hidden, two, None, torch.zeros(1).long(), LogitsRule(temperature=0.5))
    assert log_prob.item() == pytest.approx(-0.1269280, abs=1e-6)
    assert entropy.item() == pytest.approx(0.3653338, abs=1e-6)


def test_the_chunk_size_does_not_change_a_bit_of_a_row() -> None:
    """Rows are independent of each other, so that the same rows give the same numbers when packed alike."""
    hidden, weight, _, targets = inputs(64, bias=False)
    first, second = (token_log_probs(hidden, weight, None, targets, LogitsRule(chunk_tokens=16))[0] for _ in range(2))
    assert torch.equal(first, second)
    for a, b in itertools.pairwise((1, 7, 64)):
        ours = token_log_probs(hidden, weight, None, targets, LogitsRule(chunk_tokens=a))[0]
        torch.testing.assert_close(
            ours, token_log_probs(hidden, weight, None, targets, LogitsRule(chunk_tokens=b))[0], rtol=1e-6, atol=1e-6
        )


def test_bfloat16_reduces_in_float32() -> None:
    hidden, weight, _, targets = inputs(23, bias=False)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    log_probs, entropy = token_log_probs(hidden, weight, None, targets, LogitsRule(chunk_tokens=5))
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-6, atol=1e-6)
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_large_logits_stay_finite(magnitude: float) -> None:
    hidden = torch.full((3, 1), magnitude, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    log_probs, entropy = token_log_probs(hidden, weight, None, torch.tensor([0, 1, 2]), LogitsRule())
    assert log_probs[0].item() == 0.0
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(entropy).all()
    (log_probs[0] + entropy.sum()).backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_no_tokens() -> None:
    weight = torch.ones(5, 4, requires_grad=True)
    log_probs, _ = token_log_probs(torch.ones(0, 4), weight, None, torch.zeros(0).long(), LogitsRule())
    log_probs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_a_float32_head_does_not_round_logits(kept_bytes: int) -> None:
    """Against the same bfloat16 numbers in float64. Without it, logits of about 10 are rounded to steps of 1/16."""
    hidden, weight, offset, targets = inputs(23, bias=True)
    assert offset is not None
    leaves = [(3 * hidden).bfloat16(), weight.bfloat16(), offset.bfloat16()]
    found = {}
    for name, rule in (("wide", LogitsRule(chunk_tokens=7, kept_bytes=kept_bytes, float32=True)),
                       ("narrow", LogitsRule(chunk_tokens=7, kept_bytes=kept_bytes))):  # fmt: skip
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        log_probs, entropy = token_log_probs(given[0], given[1], given[2], targets, rule)
        found[name] = [log_probs, entropy, *torch.autograd.grad((log_probs + entropy).sum(), given)]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    log_probs, entropy = naive(exact[0], exact[1], exact[2], targets, LogitsRule())
    right = [log_probs, entropy, *torch.autograd.grad((log_probs + entropy).sum(), exact)]
    for wide, expected in zip(found["wide"][:2], right[:2], strict=True):
        torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)
    for wide, expected in zip(found["wide"][2:], right[2:], strict=True):
        assert wide.dtype == torch.bfloat16
        assert float((wide.double() - expected).detach().norm()) < 4e-3 * float(expected.detach().norm())
    assert float((found["narrow"][0].double() - right[0]).detach().abs().max()) > 1e-2
