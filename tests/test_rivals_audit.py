"""The head edit hides a class but keeps its features; the linear probe sees that."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnemonic_jax import models
from mnemonic_jax.auditing.linear_probe import probe_accuracy
from mnemonic_jax.rivals.head_edit import head_edit


@pytest.fixture(scope="module")
def mlp() -> tuple[models.Model, dict]:
  model = models.make("mlp", shape=(6,), num_classes=4, hidden=5)
  return model, model.init(jax.random.key(0))[0]


def test_the_head_edit_changes_one_bias_and_no_other_number(mlp):
  model, params = mlp
  before = jax.tree.map(np.array, params)
  edited = head_edit(params, model.head, [1, 3])
  chex.assert_trees_all_equal(before, params)
  assert jax.tree.structure(edited) == jax.tree.structure(params)
  assert np.flatnonzero(
    np.asarray(edited["output"]["bias"] != params["output"]["bias"])
  ).tolist() == [1, 3]
  for layer, leaf in (("hidden", "kernel"), ("hidden", "bias"), ("output", "kernel")):
    np.testing.assert_array_equal(edited[layer][leaf], params[layer][leaf])


def test_the_head_edit_hides_and_the_features_stay(mlp):
  model, params = mlp
  inputs = jax.random.normal(jax.random.key(1), (200, 6))
  biased = {**params, "output": {**params["output"], "bias": jnp.array([0.0, 1e6, 0.0, 0.0])}}
  logits = model.logits_fn({})
  assert set(np.argmax(logits(biased, inputs), axis=1).tolist()) == {1}
  edited = head_edit(biased, model.head, [1])
  assert 1 not in np.argmax(logits(edited, inputs), axis=1)
  assert np.isfinite(logits(edited, inputs)).all()
  np.testing.assert_array_equal(
    model.features(edited, {}, inputs), model.features(biased, {}, inputs)
  )


def clusters(seed: int, merged: bool) -> tuple[np.ndarray, np.ndarray]:
  """Three classes around the corners of a triangle; `merged` puts class 2 where class 1 is."""
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(3), 100)
  corners = np.array([[0.0, 0.0], [9.0, 0.0], [9.0, 0.0] if merged else [0.0, 9.0]])
  return corners[labels] + rng.normal(size=(300, 2)), labels


def test_the_probe_finds_what_the_features_hold():
  apart = probe_accuracy(*clusters(0, merged=False), *clusters(1, merged=False))
  assert apart.shape == (3,) and (apart > 0.97).all()
  merged = probe_accuracy(*clusters(0, merged=True), *clusters(1, merged=True))
  assert merged[0] > 0.97 and 0.6 < merged[1] + merged[2] < 1.4  # one of the two is guessed


def test_a_class_without_test_examples_is_nan():
  features, labels = clusters(1, merged=False)
  scores = probe_accuracy(*clusters(0, merged=False), features[:200], labels[:200])
  assert np.isnan(scores[2]) and not np.isnan(scores[:2]).any()
