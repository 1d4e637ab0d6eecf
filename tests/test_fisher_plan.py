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


ROWS, WIDTH, TOKENS = 11, 3, 4


def embed_then_project(p, x):
  return jnp.tanh(p["w"][x]) @ p["w"].T


def embed_then_project_scaled(p, x):
  return jnp.tanh(p["w"][x] * 2.0) @ (p["w"] * 0.5).T


def project_then_embed(p, x):
  h = jnp.einsum("btc,vc->btv", jnp.sin(x[..., None] + jnp.arange(WIDTH)), p["w"])
  return h[..., :WIDTH] * p["w"][jnp.argmax(h, -1)]


def negated_in_one_use(p, x):
  return jnp.tanh(p["w"][x]) @ -p["w"].T


def scaled_by_data(p, x):
  return jnp.einsum("btc,bvc->btv", jnp.tanh(p["w"][x]), p["w"] * x[:, :1, None])


def two_products(p, x):
  h = jnp.sin(x[..., None] + jnp.arange(ROWS))
  return jnp.tanh(h @ p["w"]) @ p["w"].T


def two_products_at_one_position(p, x):
  return jnp.tanh(jnp.sin(x[:, :1] + jnp.arange(ROWS)) @ p["w"]) @ p["w"].T


def three_uses_rearranged(p, x):
  h = jnp.tanh(p["w"][x])
  return (h @ p["w"].T)[..., ::-1] @ p["w"].reshape(WIDTH, ROWS).T


def parts_and_the_whole(p, x):
  return jnp.tanh(p["w"][:5][x % 5]) @ p["w"].T


def inside_remat(p, x):
  return jax.checkpoint(lambda w: jnp.tanh(w[x]) @ w.T)(p["w"])


TIED = {
  embed_then_project: "lookup + product",
  embed_then_project_scaled: "lookup + product",
  project_then_embed: "product + lookup",
  negated_in_one_use: "lookup + product",
  scaled_by_data: "per example",
  two_products: "product",
  two_products_at_one_position: "product",
  three_uses_rearranged: "lookup + product",
  parts_and_the_whole: "lookup + product",
  inside_remat: "lookup + product",
}


def tied_case(model):
  def loss(p, x, y):
    values = model(p, x).reshape(len(x), -1)
    return jnp.sin(1.3 * values + jnp.arange(values.shape[1]) % 3 + y[:, None]).sum(1)

  x = jnp.asarray(np.random.default_rng(1).integers(0, ROWS, (5, TOKENS)))
  return loss, {"w": 0.6 * drawn(ROWS, WIDTH)}, x, drawn(5)


@pytest.mark.parametrize("model", TIED)
def test_a_tied_leaf_is_exact_and_has_no_copies(model):
  case = tied_case(model)
  assert_exact(*case)
  (row,) = mj.explain_fisher(*case).leaves
  assert row.rule == TIED[model]
  if row.rule != "per example":
    assert (row.reason, row.bytes_per_example) == ("", 0)


def test_a_leaf_tied_within_each_layer():
  def loss(p, x, y):
    layer = lambda h, w: (h + jnp.tanh(h @ w) @ w.T, None)
    return jax.lax.scan(layer, x, p)[0].sum((1, 2)) * y

  case = loss, 0.5 * drawn(3, 4, 6), drawn(5, 2, 4), drawn(5)
  assert rules(*case) == {"": "product"}
  assert_exact(*case)


@pytest.mark.parametrize("disjoint", [False, True])
def test_groups_of_a_tied_leaf(disjoint):
  loss, params, x, y = tied_case(embed_then_project)
  weights = np.array([[0.0, 1.5, 0.0, 0.4, 0.0], [1.0, 0.3 * (not disjoint), 0.0, 0.0, 0.7]])
  each = [mj.diagonal_fisher(loss, params, x[n : n + 1], y[n : n + 1])["w"] for n in range(5)]
  wanted = np.einsum("gn,nij->gij", weights, np.stack(each))
  found = mj.diagonal_fisher(loss, params, x, y, weights.astype(np.float32))["w"]
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_gradients_far_from_one_stay_in_range(scale):
  """Each example's uses are summed in one scale, whatever their own."""
  loss, params, x, y = tied_case(embed_then_project)
  scaled = lambda p, x, y: scale * loss(p, x, y)
  plain, found = (mj.diagonal_fisher(f, params, x, y)["w"] for f in (loss, scaled))
  np.testing.assert_allclose(found, np.float64(plain) * scale**2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_tied_leaf_in_half_precision(dtype):
  def loss(p, x, y):
    scores = jnp.tanh(p[x]) @ p.T
    return jnp.sin(scores).astype(jnp.float32).sum((1, 2)) * y

  w, (_, _, x, y) = (0.6 * drawn(ROWS, WIDTH)).astype(dtype), tied_case(embed_then_project)
  wanted = squared_gradients_of_each(lambda p, x, y: loss(p, x, y).astype(p.dtype), w, x, y)
  with jax.numpy_dtype_promotion("strict"):
    found = mj.diagonal_fisher(loss, w, x, y)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, rtol=0.05, atol=0.02 * wanted.max())


def test_a_tied_table_holds_no_gradient_per_example():
  examples, tokens, rows, width = 64, 16, 2048, 64
  shaped = jax.ShapeDtypeStruct
  loss = lambda w, x, y: mj.softmax_cross_entropy(jnp.tanh(w[x]).mean(1) @ w.T, y)
  arguments = shaped((rows, width), jnp.float32), shaped((examples, tokens), jnp.int32)
  compiled = (
    jax.jit(lambda *a: mj.diagonal_fisher(loss, *a))
    .lower(*arguments, shaped((examples,), jnp.int32))
    .compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * rows * width
