"""The squeezed descriptors and the losses of scores, against loops from the equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kd_plugins import functional as KF
from kd_plugins.nn.descriptors import AttentionEstimator, LogitDiscriminator


def estimated(part: AttentionEstimator, vectors: np.ndarray, logits: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The descriptors `[B, D]` of `[B, N, C]`, number by number."""
    a, b, u, w = (
        p.detach().double().numpy()
        for p in (part.local.weight, part.local.bias, part.overall.weight, part.score.weight)
    )
    found = np.zeros((len(vectors), len(a)))
    for n, rows in enumerate(vectors):
        local = [[sum(a[d, c] * row[c] for c in range(len(row))) + b[d] for d in range(len(a))] for row in rows]
        overall = [sum(u[d, k] * logits[n, k] for k in range(logits.shape[1])) for d in range(len(a))]
        scores = [sum(w[0, d] * math.tanh(f[d] + overall[d]) for d in range(len(a))) for f in local]
        parts = [math.exp(m) if k else 0.0 for m, k in zip(scores, keep[n], strict=True)]
        for p, f in zip(parts, local, strict=True):
            found[n] += p / sum(parts) * np.array(f)
        found[n] /= math.sqrt(sum(v * v for v in found[n]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_estimator_is_the_equation(dtype):
    torch.manual_seed(0)
    part, maps, logits = AttentionEstimator(3, 4, 5), torch.randn(2, 3, 2, 4).to(dtype), 3 * torch.randn(2, 4)
    rows = maps.double().flatten(2).mT.numpy()
    expected = torch.tensor(estimated(part, rows, logits.double().numpy(), np.ones((2, 8))))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = part(maps, logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    mask = torch.ones(2, 8)
    mask[0, 3:], mask[1, :2] = 0, 0
    expected = torch.tensor(estimated(part, rows, logits.double().numpy(), mask.numpy()))
    tokens = maps.flatten(2).mT.masked_fill(mask.unsqueeze(-1) == 0, torch.nan)
    found = part(tokens, logits, mask)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    given, known = (
        torch.autograd.grad(part(x, logits, mask).sum(), part.parameters()) for x in (tokens, tokens.nan_to_num(7))
    )
    torch.testing.assert_close(given, known)


def test_the_logits_move_the_attention():
    """Which they would not in a score that is linear in their sum with the features."""
    torch.manual_seed(0)
    part, maps = AttentionEstimator(3, 4, 5), torch.randn(2, 3, 4, 4)
    logits = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(part(maps, logits)[:, 0].sum(), logits)
    assert float(gradient.abs().max()) > 1e-3


def test_padding_gets_no_attention_and_no_gradient():
    features, scores = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    found = KF.squeeze(features, scores, mask=mask)
    assert torch.equal(found[1], torch.zeros(3))
    torch.testing.assert_close(found[0], scores[0, :2].softmax(0) @ features[0, :2])
    for gradient in torch.autograd.grad(found.sum(), [features, scores]):
        assert gradient[0, :2].abs().min() > 0
        assert not gradient[0, 2:].any()
        assert not gradient[1].any()


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2,), None), ((2, 3, 4), (2, 4), None), ((2, 3, 4), (2, 3), (2, 4))], ids=str
)
def test_shapes_that_do_not_fit(shapes):
    features, scores, mask = (None if s is None else torch.ones(s) for s in shapes)
    with pytest.raises(ValueError, match=r"Expected features \[B, N, D\]"):
        KF.squeeze(features, scores, mask=mask)


def test_losses_of_scores():
    """Of the probabilities, where these can be told from 0 and 1; linear where not."""
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0, -3.0], dtype=torch.bfloat16)
    p, q = [1 / (1 + math.exp(-x)) for x in (2.0, -1.0)], [1 / (1 + math.exp(-x)) for x in (0.5, 1.0, -3.0)]
    told = -sum(map(math.log, p)) / 2 - sum(math.log(1 - x) for x in q) / 3
    assert float(KF.gan_discriminator(real, fake)) == pytest.approx(told, rel=1e-6)
    assert float(KF.gan_generator(fake)) == pytest.approx(-sum(map(math.log, q)) / 3, rel=1e-6)
    sure = torch.tensor([-90.0], requires_grad=True)
    (slope,) = torch.autograd.grad(KF.gan_generator(sure), sure)
    assert (KF.gan_generator(sure).item(), slope.item()) == (90.0, -1.0)


def test_the_norms_of_a_discriminator():
    part = LogitDiscriminator(3, (4, 5), 2)
    assert [(m.in_features, m.out_features) for m in list(part)[::2]] == [(3, 4), (4, 5), (5, 2)]
    numbers = [x for p in part.parameters() for x in p.detach().flatten().tolist()]
    absolute, squares = part.norms()
    assert absolute.item() == pytest.approx(sum(map(abs, numbers)), rel=1e-5)
    assert squares.item() == pytest.approx(sum(x * x for x in numbers), rel=1e-5)
