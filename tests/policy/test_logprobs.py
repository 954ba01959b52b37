"""The chunked head against a plain log-softmax, values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sapo_rl.policy import logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("count", [1, 5, 13])
def test_values_and_gradients_match_a_plain_log_softmax(
    monkeypatch: pytest.MonkeyPatch, count: int, temperature: float
) -> None:
    monkeypatch.setitem(logprobs.CHUNK, "cpu", 5 * 31)
    torch.manual_seed(count)
    hidden = torch.randn(count, 8, requires_grad=True)
    head = torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(31, (count,))
    outside = torch.randn(count)

    plain = (hidden.double() @ head.double().T / temperature).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0]
    expected_gradients = torch.autograd.grad((expected * outside).sum(), (hidden, head))
    found, entropy = logprobs.token_logps(hidden, head, targets, temperature)
    gradients = torch.autograd.grad((found * outside).sum(), (hidden, head))

    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(plain.exp() * plain).sum(-1), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bfloat16_states_give_float32_log_probabilities_and_a_float32_gradient_of_the_head() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 16).bfloat16().requires_grad_()
    head = torch.randn(50, 16, requires_grad=True)
    logps, entropy = logprobs.token_logps(hidden, head, torch.arange(7), 1.0)
    logps.sum().backward()
    assert logps.dtype == entropy.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert head.grad is not None and head.grad.dtype == torch.float32
    assert not entropy.requires_grad


def test_triton_kernels_compute_what_plain_torch_does() -> None:
    """In Triton's interpreter, which is chosen before its import: on a CPU, in a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", __file__], check=True, env=environment, cwd=Path(__file__).parent)


def main() -> None:
    """Rows shorter and longer than a block, a temperature, both dtypes."""
    from sapo_rl.policy import kernels

    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for size in (31, kernels.BLOCK + 904):
            logits = (5 * torch.randn(4, size)).to(dtype)
            targets, outside = torch.randint(size, (4,)), torch.tensor([1.0, -2.0, 0.0, 0.5])
            expected = logprobs.statistics(logits, targets, 0.7)
            for found, value in zip(kernels.statistics(logits, targets, 0.7), expected, strict=True):
                torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
            gradients = logprobs.gradient(logits, targets, expected[2], outside, 0.7)
            found = kernels.gradient(logits.clone(), targets, expected[2], outside, 0.7)
            torch.testing.assert_close(found, gradients, atol=tolerance, rtol=tolerance)


if __name__ == "__main__":
    main()
