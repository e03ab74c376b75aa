"""Attention by its definition, and every implementation against it."""

import jax
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import attention
from smart_grpo_jax.models.attention import attend


def arrays(s=7, t=5, h=2, d=4):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, n, h, d), np.float32) for n in (s, t, t)]


def by_definition(q, k, v, bias):
    logits = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights, v)


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [None, (1, 1, 1, 5), (2, 2, 7, 5)])
def test_every_implementation_is_softmax_of_scaled_products(implementation, shape, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)  # 7 queries: two full blocks and a padded one
    q, k, v = arrays()
    bias = None if shape is None else np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    got = attend(q, k, v, bias, implementation)
    want = by_definition(q, k, v, 0.0 if bias is None else bias)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_chunks_keep_the_gradient(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)
    q, k, v = arrays()
    grads = [
        jax.grad(lambda *a, how=how: (attend(*a, None, how) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
        for how in ("xla", "chunked")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UserError, match='try "chunked"'):
        attend(*arrays(), implementation="chunks")
