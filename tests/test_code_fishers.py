"""The Fishers of `forget`: right for any confidence, any layer size and any microbatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from toys import mlp, regression

import mnemonic_jax as mj
from mnemonic_jax.fisher import passes
from mnemonic_jax.methods.request import resolve

CLASSES = 4


def fishers(logits_fn, params, codes, forget=(0,), microbatch=None, loss=None):
  """(f_F, f_R) as methods are given them, float64; both in the same unknown units per leaf."""
  side = np.isin(np.arange(len(codes)), forget)
  execution = mj.Execution(microbatch)
  problem = resolve(logits_fn, params, codes, (side, ~side), loss, None, None, "highest", execution)
  made = jax.tree.map(lambda x: np.asarray(x, np.float64), problem.fishers())
  return jax.tree.map(lambda x: x[0], made), jax.tree.map(lambda x: x[1], made)


def confident(margins):
  """Params of a softmax regression whose unit codes have these margins."""
  return {"kernel": jnp.diag(jnp.asarray(margins, jnp.float32)), "bias": jnp.zeros(CLASSES)}


def wanted_ratio(params, forget=(0,)):
  host, inputs = jax.tree.map(np.asarray, params), np.eye(CLASSES)
  side = np.isin(np.arange(CLASSES), forget)
  made = [
    reference.fisher(reference.regression_gradient, host, inputs, np.arange(CLASSES), weights)
    for weights in (side / side.sum(), ~side / (~side).sum())
  ]
  with np.errstate(divide="ignore", invalid="ignore"):
    return {name: made[0][name] / made[1][name] for name in made[0]}


def assert_ratio(made, wanted):
  for name, ratio in wanted.items():
    finite = np.isfinite(ratio)
    np.testing.assert_allclose(
      made[0][name][finite] / made[1][name][finite], ratio[finite], rtol=2e-5
    )


@pytest.mark.parametrize("microbatch", [None, 1, 3])
@pytest.mark.parametrize("margin", [1.0, 17.0, 60.0, 85.0])
def test_confident_codes_have_the_right_ratio(margin, microbatch):
  params = confident([margin, margin - 0.5, margin + 0.25, margin])
  codes = jnp.eye(CLASSES)[:, None]
  assert_ratio(fishers(regression, params, codes, microbatch=microbatch), wanted_ratio(params))


@pytest.mark.parametrize(
  "margins", [[0.5, 20.0, 20.0, 20.0], [20.0, 0.5, 20.0, 20.0], [20.0, 20.0, 20.0, 0.5]]
)
@pytest.mark.parametrize("microbatch", [None, 1, 2, 3])
def test_microbatches_of_very_different_size_add_up(margins, microbatch):
  params = confident(margins)
  codes = jnp.eye(CLASSES)[:, None]
  assert_ratio(fishers(regression, params, codes, microbatch=microbatch), wanted_ratio(params))


@pytest.mark.parametrize("microbatch", [None, 2])
def test_layers_of_very_different_size_each_get_a_power_of_two(microbatch):
  # The layers differ in nothing but a factor of their gradients; eta must not see it.
  sizes = {"a": 1e-33, "b": 1e-15, "c": 1.0, "d": 1e12, "e": 1e30}
  codes = jax.random.normal(jax.random.key(0), (CLASSES, 1, 5))
  params = {name: jnp.zeros((5, CLASSES)) for name in sizes}
  logits_fn = lambda p, x: sum((x @ p[name]) * size for name, size in sizes.items())
  made = fishers(logits_fn, params, codes, microbatch=microbatch)
  plain = fishers(lambda p, x: x @ p, jnp.zeros((5, CLASSES)), codes)
  for name in sizes:
    np.testing.assert_allclose(made[0][name] / made[1][name], plain[0] / plain[1], rtol=1e-4)


@pytest.mark.parametrize("bias", [-45.0, -50.0])
def test_a_hidden_unit_that_is_saturated_on_all_codes(bias):
  """Outputs near 1e-21, whose squares leave float32's range; the weights' ratio is ordinary."""
  rng = np.random.default_rng(0)
  params = {
    "kernel1": rng.normal(size=(5, 4)),
    "bias1": np.array([bias, 0.0, 0.1, 0.2]),
    "kernel2": rng.normal(size=(4, CLASSES)),
    "bias2": np.zeros(CLASSES),
  }
  params = jax.tree.map(lambda leaf: np.float64(np.float32(leaf)), params)
  codes = rng.normal(size=(CLASSES, 1, 5)).astype(np.float32)
  forget, remain = reference.class_fishers(
    reference.mlp_gradient, params, codes.astype(np.float64), [0], [1, 2, 3]
  )
  made = fishers(
    mlp, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), jnp.asarray(codes)
  )
  ratio = made[0]["kernel2"] / made[1]["kernel2"]
  np.testing.assert_allclose(ratio, forget["kernel2"] / remain["kernel2"], rtol=1e-4)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_inputs_of_any_size_give_the_same_ratio(size):
  codes = jax.random.normal(jax.random.key(0), (CLASSES, 2, 5))
  kernel = 0.1 * jax.random.normal(jax.random.key(1), (5, CLASSES))
  made = fishers(lambda w, x: (x * size) @ w, kernel / size, codes)
  plain = fishers(lambda w, x: x @ w, kernel, codes)
  np.testing.assert_allclose(made[0] / made[1], plain[0] / plain[1], rtol=1e-4)


def test_a_layer_without_any_gradient_has_zeros():
  codes = jnp.eye(CLASSES)[:, None]
  logits_fn = lambda p, x: x @ p["kernel"] + jax.nn.relu(x @ p["dead"])
  params = {"kernel": jnp.eye(CLASSES), "dead": -jnp.ones((CLASSES, CLASSES))}
  made = fishers(logits_fn, params, codes)
  assert not made[0]["dead"].any() and not made[1]["dead"].any() and made[1]["kernel"].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_and_params(dtype):
  exact = confident([6.0, 5.0, 7.0, 6.0])
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), exact)
  made, wanted = (
    fishers(regression, params, jnp.eye(CLASSES, dtype=dtype)[:, None]),
    wanted_ratio(exact),
  )
  for name, ratio in wanted.items():
    finite = np.isfinite(ratio)
    np.testing.assert_allclose(
      made[0][name][finite] / made[1][name][finite], ratio[finite], rtol=0.1
    )


@pytest.mark.parametrize("size", [2.0**60, 2.0**-100])
def test_residuals_of_any_size_come_back_in_units(size):
  loss = lambda logits, labels: size * logits[:, 0]
  objective = passes.Objective(lambda w, x, y: x @ w, (True,), "highest", loss)
  batch, weights = (jnp.full((2, 3), 2.0**20), jnp.zeros(2, jnp.int32)), jnp.full((1, 2), 0.5)
  found = passes.squared_gradients(objective, jnp.ones((3, 2)), batch, weights, None)
  (sums,), unit = found.sums, np.asarray(found.units[0], np.float64)
  np.testing.assert_allclose(np.float64(sums[0, :, 0]) * 4.0**unit, (size * 2.0**20) ** 2)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_traced_calls_have_the_same_range(microbatch):
  """Layers whose gradients are 1e-33 to 1e30 of the logits' are right inside a trace too."""
  sizes = {"a": 1e-33, "b": 1e-15, "c": 1.0, "d": 1e12, "e": 1e30}
  codes = jax.random.normal(jax.random.key(0), (CLASSES, 1, 5))
  params = {name: jnp.zeros((5, CLASSES)) for name in sizes}
  logits_fn = lambda p, x: sum((x @ p[name]) * size for name, size in sizes.items())
  execution, method = mj.Execution(microbatch), mj.Perturbation(1e-3, 10.0)
  step = lambda params, side: mj.forget_step(
    logits_fn, params, codes, side, ~side, method, execution=execution
  )
  moved, _ = jax.jit(step)(params, jnp.arange(CLASSES) == 0)
  plain, _ = mj.forget_step(
    lambda p, x: x @ p, params["c"], codes, *sides(), mj.Perturbation(1e-3, 10.0)
  )
  for name in sizes:
    np.testing.assert_allclose(np.abs(moved[name]), np.abs(plain), rtol=1e-3)


def sides():
  forget = np.arange(CLASSES) == 0
  return forget, ~forget


def test_traced_calls_give_what_concrete_ones_give():
  params, codes = confident([60.0, 59.5, 60.25, 60.0]), jnp.eye(CLASSES)[:, None]
  step = jax.jit(
    lambda side: mj.forget_step(regression, params, codes, side, ~side, mj.Perturbation(1.0, 10.0))
  )
  traced = step(jnp.arange(CLASSES) == 0)[0]
  eager = mj.forget(regression, params, codes, [0], method=mj.Perturbation(1.0, 10.0)).params
  for name in params:
    np.testing.assert_allclose(traced[name], eager[name], rtol=1e-5)
