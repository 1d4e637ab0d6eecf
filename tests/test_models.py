"""Models: Flax NNX inside, plain dicts and pure functions outside."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnemonic_jax import models


@pytest.fixture(scope="module")
def mlp() -> models.Model:
  return models.make("mlp", shape=(4, 4, 1), num_classes=3, hidden=7)


@pytest.fixture(scope="module")
def params(mlp: models.Model) -> dict:
  return mlp.init(jax.random.key(0))[0]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return np.random.default_rng(0).uniform(size=(5, 4, 4, 1)).astype(np.float32)


def numpy_features(params: dict, images: np.ndarray) -> np.ndarray:
  hidden = {name: np.asarray(value, np.float64) for name, value in params["hidden"].items()}
  return 1 / (1 + np.exp(-(images.reshape(len(images), -1).astype(np.float64) @ hidden["kernel"] + hidden["bias"])))


def test_mlp_logits_equal_a_numpy_computation(mlp, params, images):
  output = {name: np.asarray(value, np.float64) for name, value in params["output"].items()}
  features = numpy_features(params, images)
  logits, _ = mlp.apply(params, {}, images, False)
  np.testing.assert_allclose(mlp.features(params, {}, images), features, rtol=1e-6)
  np.testing.assert_allclose(logits, features @ output["kernel"] + output["bias"], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(mlp.logits_fn({})(params, images), logits)


def test_params_are_nested_dicts_of_arrays(mlp):
  params, model_state = mlp.init(jax.random.key(0))
  assert model_state == {}

  def walk(node: object) -> None:
    if type(node) is dict:
      for name, child in node.items():
        assert type(name) is str
        walk(child)
    else:
      assert isinstance(node, jax.Array) and node.dtype == jnp.float32

  walk(params)
  assert {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)} == {
    "['hidden']['bias']": (7,),
    "['hidden']['kernel']": (16, 7),
    "['output']['bias']": (3,),
    "['output']['kernel']": (7, 3),
  }


def test_init_depends_on_the_key_alone_and_fills_its_range(mlp):
  first, again, other = (mlp.init(jax.random.key(seed))[0] for seed in (0, 0, 1))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).all()), first, other))
  wide = models.make("mlp", shape=(10, 10), num_classes=10, hidden=400).init(jax.random.key(0))[0]
  for layer, fan_in in (("hidden", 100), ("output", 400)):
    kernel = np.abs(np.asarray(wide[layer]["kernel"]))
    assert fan_in**-0.5 * 0.99 < kernel.max() <= fan_in**-0.5
    assert np.abs(np.asarray(wide[layer]["bias"])).max() <= fan_in**-0.5


def test_apply_is_pure_and_traceable(mlp, params, images):
  before = jax.tree.map(np.array, params)
  eager = mlp.apply(params, {}, images, True)[0]
  jitted = jax.jit(mlp.apply, static_argnums=3)(params, {}, images, True)[0]
  np.testing.assert_allclose(eager, jitted, rtol=1e-6)
  np.testing.assert_array_equal(eager, mlp.apply(params, {}, images, True)[0])
  chex.assert_trees_all_equal(before, params)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
  both = jax.vmap(lambda p: mlp.apply(p, {}, images, False)[0])(stacked)
  np.testing.assert_allclose(both[0], eager, rtol=1e-5, atol=1e-6)
  assert not np.allclose(both[1], eager)


def test_logits_follow_the_params_given(mlp, params, images):
  zeros = jax.tree.map(jnp.zeros_like, params)
  assert not mlp.logits_fn({})(zeros, images).any()
  shifted = {**zeros, mlp.head[0]: {**zeros[mlp.head[0]], "bias": jnp.arange(3.0)}}
  np.testing.assert_array_equal(mlp.logits_fn({})(shifted, images), np.tile(np.arange(3.0), (5, 1)))
