"""Small models for tests of the core: (params, inputs) -> logits, with float32 params and codes."""

from __future__ import annotations

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference

import mnemonic_jax as mj


def regression(params, inputs):
  return inputs @ params["kernel"] + params["bias"][None]


def mlp(params, inputs):
  hidden = jax.nn.sigmoid(inputs @ params["kernel1"] + params["bias1"][None])
  return hidden @ params["kernel2"] + params["bias2"][None]


def loss_of(logits_fn):
  return lambda params, inputs, labels: mj.softmax_cross_entropy(logits_fn(params, inputs), labels)


MODELS = {
  "regression": (regression, reference.regression_logits, reference.regression_gradient),
  "mlp": (mlp, reference.mlp_logits, reference.mlp_gradient),
}
regression_loss, mlp_loss = loss_of(regression), loss_of(mlp)


def make_params(model, seed=0, features=5, classes=4, hidden=6):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  if model == "regression":
    return {"kernel": draw(features, classes), "bias": draw(classes)}
  return {
    "kernel1": draw(features, hidden),
    "bias1": draw(hidden),
    "kernel2": draw(hidden, classes),
    "bias2": draw(classes),
  }


def make_codes(seed=0, classes=4, per_class=1, features=5):
  rng = np.random.default_rng(seed + 1000)
  return jnp.asarray(rng.normal(size=(classes, per_class, features)), jnp.float32)


def make_batch(seed=0, examples=7, features=5, classes=4):
  rng = np.random.default_rng(seed + 2000)
  return jnp.asarray(rng.normal(size=(examples, features)), jnp.float32), jnp.asarray(
    rng.integers(classes, size=examples), jnp.int32
  )


def host(tree):
  return jax.tree.map(np.asarray, tree)


def assert_trees_close(actual, expected, rtol=1e-5, atol=0.0):
  wide = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
  chex.assert_trees_all_close(wide(actual), wide(expected), rtol=rtol, atol=atol)


def cpu_mesh(count, axis_type="Auto", shape=None, names=("data",)):
  """A mesh of the first `count` CPU devices."""
  kind = getattr(jax.sharding.AxisType, axis_type)
  return jax.make_mesh(
    shape or (count,), names, axis_types=(kind,) * len(names), devices=jax.devices("cpu")[:count]
  )


def place(tree, mesh, *spec):
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))


@contextlib.contextmanager
def compiled_programs():
  """The names of the programs that are compiled in the block."""
  names = []

  def listen(event, seconds, fun_name="", **_):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(fun_name.removeprefix("jit(").removesuffix(")"))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
