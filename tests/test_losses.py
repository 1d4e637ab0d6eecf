"""Softmax cross-entropy that does not cancel: closed forms in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import mnemonic_jax as mj


@pytest.fixture(autouse=True)
def no_nan():
  with jax.debug_nans(True):
    yield


def gradient(logits, label):
  total = lambda logits: mj.softmax_cross_entropy(logits[None], jnp.array([label]))[0]
  return np.asarray(jax.grad(total)(logits), np.float64)


@pytest.mark.parametrize("margin", [-60.0, -3.0, 0.0, 1.0, 17.0, 40.0, 60.0, 86.0])
def test_value_and_gradient_at_a_margin(margin):
  logits = np.array([0.25, margin, -1.0, -0.5], np.float32)
  value = mj.softmax_cross_entropy(jnp.asarray(logits)[None], jnp.array([1]))
  assert value.shape == (1,) and value.dtype == jnp.float32
  np.testing.assert_allclose(value[0], reference.cross_entropy(logits.astype(float), 1), rtol=1e-5)
  np.testing.assert_allclose(
    gradient(logits, 1), reference.residual(logits.astype(float), 1), rtol=2e-5
  )


def test_cancellation_the_usual_form_has_no_gradient_at_a_margin_of_17():
  usual = lambda logits: jax.nn.logsumexp(logits) - logits[0]
  logits = jnp.array([17.0, 0.0])
  assert jax.grad(usual)(logits)[0] == 0
  np.testing.assert_allclose(gradient(logits, 0), [-4.139937e-8, 4.139937e-8], rtol=1e-5)


@settings(deadline=None, max_examples=8)
@given(
  seed=st.integers(0, 2**16), classes=st.integers(2, 6), scale=st.sampled_from([0.1, 1.0, 10.0])
)
def test_matches_the_reference_for_any_logits(seed, classes, scale):
  rng = np.random.default_rng(seed)
  logits, label = (scale * rng.normal(size=classes)).astype(np.float32), int(rng.integers(classes))
  np.testing.assert_allclose(
    gradient(logits, label), reference.residual(logits.astype(float), label), rtol=1e-4
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_give_float32_losses(dtype):
  losses = mj.softmax_cross_entropy(jnp.array([[9.0, 0.0]], dtype), jnp.array([0]))
  assert losses.dtype == jnp.float32
  np.testing.assert_allclose(losses, [np.log1p(np.exp(-9.0))], rtol=1e-5)


def test_float64_logits_give_float64_losses_to_a_margin_of_700():
  with jax.enable_x64(True):
    losses = mj.softmax_cross_entropy(jnp.array([[700.0, 0.0]], jnp.float64), jnp.array([0]))
    assert losses.dtype == jnp.float64
    np.testing.assert_allclose(losses, [np.exp(-700.0)], rtol=1e-10)


def soft_gradient(logits, targets):
  total = lambda logits: mj.softmax_cross_entropy(
    logits[None], jnp.asarray(targets, jnp.float32)[None]
  )[0]
  return np.asarray(jax.grad(total)(jnp.asarray(logits, jnp.float32)), np.float64)


@pytest.mark.parametrize(
  "targets", [[0.7, 0.2, 0.0, 0.1], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.25] * 4]
)
def test_probabilities_weigh_the_losses_of_the_classes(targets):
  logits = np.array([0.25, 3.0, -1.0, 0.5])
  value = mj.softmax_cross_entropy(
    jnp.asarray(logits, jnp.float32)[None], jnp.asarray(targets, jnp.float32)[None]
  )
  assert value.shape == (1,) and value.dtype == jnp.float32
  wanted = sum(p * reference.cross_entropy(logits, c) for c, p in enumerate(targets))
  np.testing.assert_allclose(value[0], wanted, rtol=1e-5)
  residuals = sum(p * reference.residual(logits, c) for c, p in enumerate(targets))
  np.testing.assert_allclose(soft_gradient(logits, targets), residuals, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 17.0, 60.0])
def test_a_one_hot_target_is_its_label_to_the_bit(margin):
  logits = jnp.array([0.25, margin, -1.0, -0.5])
  hard = mj.softmax_cross_entropy(logits[None], jnp.array([1]))
  np.testing.assert_array_equal(mj.softmax_cross_entropy(logits[None], jnp.eye(4)[1:2]), hard)
  np.testing.assert_array_equal(soft_gradient(logits, np.eye(4)[1]), gradient(logits, 1))


def test_floating_labels_must_be_probabilities_of_every_class():
  with pytest.raises(
    ValueError, match=r"labels: got floating labels of shape \(2,\) for logits \(2, 4\)"
  ):
    mj.softmax_cross_entropy(jnp.zeros((2, 4)), jnp.zeros(2))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3, 4), (), (4,)])
def test_integer_labels_of_another_shape_are_refused(shape):
  with pytest.raises(ValueError, match=r"labels: got integer.*expected.*\(3,\).*argmax.*\[:, 0\]"):
    mj.softmax_cross_entropy(jnp.zeros((3, 4)), jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.complex64])
def test_labels_that_are_no_numbers_of_classes_are_refused(shape, dtype):
  with pytest.raises(TypeError, match=r"labels: got dtype .*expected integers.*argmax.*astype"):
    mj.softmax_cross_entropy(jnp.zeros((3, 4)), jnp.zeros(shape, dtype))


def test_labels_of_several_leading_axes_and_from_numpy():
  logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  labels = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
  losses = mj.softmax_cross_entropy(jnp.asarray(logits), labels)
  wanted = [[reference.cross_entropy(logits[i, j], labels[i, j]) for j in range(3)] for i in (0, 1)]
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)


MASKED = np.array([0.25, -np.inf, -1.0, 0.5])
TARGETS = [0, [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.7, 0.0, 0.2, 0.1]]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_class_masked_by_an_infinite_logit_takes_no_part(target):
  """The loss is that of the classes that are left, and the gradient of the masked one is 0."""
  left, soft = np.isfinite(MASKED), np.ndim(target) == 1
  labels = jnp.asarray([target], jnp.float32 if soft else jnp.int32)
  few = jnp.asarray([np.array(target)[left]], jnp.float32) if soft else labels
  loss = lambda logits, labels: mj.softmax_cross_entropy(logits, labels)[0]
  whole, part = (jnp.asarray([x], jnp.float32) for x in (MASKED, MASKED[left]))
  value, found = jax.value_and_grad(loss)(whole, labels)
  wanted, of_left = jax.value_and_grad(loss)(part, few)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  np.testing.assert_allclose(found[0, left], of_left[0], rtol=1e-6)
  assert found[0, 1] == 0


@pytest.mark.parametrize("labels", [[1], [[0.0, 1.0, 0.0]]], ids=str)
def test_the_one_class_that_is_left_has_loss_and_gradient_zero(labels):
  total = lambda logits: mj.softmax_cross_entropy(logits, jnp.asarray(labels)).sum()
  value, found = jax.value_and_grad(total)(jnp.array([[-jnp.inf, 2.0, -jnp.inf]]))
  assert value == 0
  np.testing.assert_array_equal(found, np.zeros((1, 3)))


@pytest.mark.parametrize(
  "labels", [[1], [[0.0, 1.0, 0.0]], [[0.3, 0.5, 0.2]], [[0.6, 0.4, 0.0]]], ids=str
)
def test_a_masked_class_that_is_wanted_has_an_infinite_loss(labels):
  total = lambda logits: mj.softmax_cross_entropy(logits, jnp.asarray(labels)).sum()
  value, found = jax.value_and_grad(total)(jnp.array([[0.5, -jnp.inf, 1.0]]))
  assert value == np.inf
  assert not np.any(np.isnan(found))
