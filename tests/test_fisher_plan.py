"""The plan of a Fisher: which way each leaf goes, and how often the loss is traced to find out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

import mnemonic_jax as mj
from mnemonic_jax.fisher import loss_checks, sums


def drawn(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def squared_gradients_of_each(loss, params, x, y):
  """The mean over examples of squared gradients, each by plain `jax.grad` in float64."""
  with jax.enable_x64(True):
    params, x, y = jax.tree.map(
      lambda a: np.asarray(a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else None),
      (params, x, y),
    )
    one = lambda p, n: loss(p, x[n : n + 1], y[n : n + 1])[0]
    gradients = [jax.grad(one)(params, n) for n in range(len(y))]
    return jax.tree.map(lambda *g: np.mean(np.square(np.stack(g)), axis=0), *gradients)


def assert_exact(loss, params, x, y):
  wanted = squared_gradients_of_each(loss, params, x, y)
  found = mj.diagonal_fisher(loss, params, x, y)
  for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-6 * want.max())


def rules(loss, params, x, y):
  return {row.path: row.rule for row in mj.explain_fisher(loss, params, x, y).leaves}


def test_a_leaf_downstream_of_a_copied_one_stays_contracted(monkeypatch):
  made = []

  def copies(ready, value, *rest):
    made.append(value.shape)
    return original(ready, value, *rest)

  original = sums.copies
  monkeypatch.setattr(sums, "copies", copies)
  loss = lambda p, x, y: (jax.nn.gelu(x @ p["w"] + p["b"]) @ p["out"]).sum((1, 2)) * y
  params = {"w": drawn(4, 6), "b": drawn(6), "out": drawn(6, 3)}
  x, y = drawn(5, 2, 4), drawn(5)
  assert rules(loss, params, x, y) == {
    "['b']": "per example",
    "['out']": "product",
    "['w']": "product",
  }
  assert_exact(loss, params, x, y)
  assert made == [(6,)]


def test_a_leaf_that_one_branch_reads_in_parts_and_another_whole():
  def loss(p, x, y):
    parts = lambda: (x @ p["w"][:, :2]) ** 2
    branch = jax.lax.cond(p["on"] > 0, parts, lambda: jnp.tanh(x @ p["w"])[:, :2])
    return branch.sum(1) * y

  params = {"w": drawn(4, 6), "on": jnp.float32(1)}
  for on in (-1.0, 1.0):
    fixed = lambda p, x, y, on=on: loss(p | {"on": jnp.float32(on)}, x, y)
    assert_exact(fixed, {"w": params["w"]}, drawn(5, 4), drawn(5))


class Counted:
  """A loss that counts how often Python runs it."""

  def __init__(self):
    self.calls = 0

  def __call__(self, p, x, y):
    self.calls += 1
    return mj.softmax_cross_entropy(jnp.tanh(x @ p["w"]) @ p["out"], y)


@pytest.mark.parametrize("precision", ["highest", None])
def test_a_cold_fisher_traces_the_loss_three_times(precision):
  """On the whole batch, on some examples together, and on one example."""
  loss, params = Counted(), {"w": drawn(4, 3), "out": drawn(3, 2)}
  x, y = drawn(20, 4), jnp.zeros(20, jnp.int32)
  mj.diagonal_fisher(loss, params, x, y, precision=precision)
  assert loss.calls == 3
  mj.diagonal_fisher(loss, params, x, y, precision=precision)
  assert loss.calls == 3


def test_a_loss_that_closes_over_tracers():
  w, x, y = drawn(4, 3), drawn(5, 4), drawn(5)

  def fisher(scale, w):
    loss = lambda p, x, y: scale * (jnp.tanh(x @ p).sum(1) - y) ** 2
    mj.diagonal_fisher(loss, w, x, y)  # from here on JAX remembers its jaxpr
    return mj.diagonal_fisher(loss, w, x, y)

  plain = fisher(1.0, w)
  jitted, scales = jax.jit(fisher), jnp.array([2.0, 3.0])
  for scale in scales:
    np.testing.assert_allclose(jitted(scale, w), scale**2 * plain, rtol=1e-5)
  mapped = jax.jit(jax.vmap(fisher, (0, None)))(scales, w)
  np.testing.assert_allclose(mapped, scales[:, None, None] ** 2 * plain, rtol=1e-5)


def test_no_tracer_of_an_earlier_trace_comes_back():
  """JAX remembers the jaxpr of one and the same function, whatever tracer it closed over then."""

  class Scaled:
    def __call__(self, p, x, y):
      return self.scale * (x @ p - y) ** 2

  loss, shaped = Scaled(), jax.ShapeDtypeStruct

  def evaluated(scale):
    loss.scale = scale
    arguments = shaped((4,), jnp.float32), shaped((1, 4), jnp.float32), shaped((1,), jnp.float32)
    one = jex.jaxpr_as_fun(loss_checks.traced_on_one(loss, *arguments))
    return one(jnp.ones(4), jnp.ones((1, 4)), jnp.ones(1))[0]

  for scale in (2.0, 3.0):
    assert jax.jit(lambda scale: evaluated(scale))(scale) == 9 * scale
