"""Strength, amplitude, scale and perturbation: the reference, and each edge in the docstrings."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import mnemonic_jax as mj

LARGEST = float(np.finfo(np.float32).max)


def array(*values):
  return jnp.array(values, jnp.float32)


@settings(deadline=None, max_examples=10)
@given(
  shape=st.sampled_from([(3,), (2, 3), (2, 3, 2), (1,), ()]),
  layer_axis=st.sampled_from([None, 0, 1, -1]),
  seed=st.integers(0, 2**16),
  lambda1=st.sampled_from([1e-3, 1.0]),
  lambda2=st.sampled_from([0.1, 10.0]),
  sign=st.sampled_from([1, -1]),
)
def test_all_three_pieces_match_the_reference(shape, layer_axis, seed, lambda1, lambda2, sign):
  if layer_axis is not None and not -len(shape) <= layer_axis < len(shape):
    layer_axis = None
  rng = np.random.default_rng(seed)
  # A third of the entries of each Fisher is zero: every combination of zeros happens.
  draw = lambda: np.asarray(
    rng.exponential(size=shape) ** 3 * (rng.random(shape) > 0.3), np.float32
  )
  forget, remain, leaf = draw(), draw(), np.asarray(rng.normal(size=shape), np.float32)
  axis = None if layer_axis is None else layer_axis % len(shape)

  eta = mj.amplitude(jnp.asarray(forget), jnp.asarray(remain), layer_axis=layer_axis)
  wanted_eta = reference.amplitude(forget, remain, axis, overflow=LARGEST)
  np.testing.assert_allclose(eta, wanted_eta, rtol=1e-6)
  scale = mj.layer_scale(eta, mj.Perturbation(lambda1, lambda2), layer_axis=layer_axis)
  wanted_scale = reference.layer_scale(wanted_eta, lambda1, lambda2, axis)
  np.testing.assert_allclose(np.broadcast_to(scale, shape), wanted_scale, rtol=1e-6)
  moved = mj.perturb(jnp.asarray(leaf), eta, scale, sign)
  np.testing.assert_allclose(
    moved, reference.perturb(leaf, wanted_eta, wanted_scale, sign), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("eta", [np.array([1, 2], np.int32), np.array([0.5, 2.0], np.float16), 2])
def test_the_scale_is_float32_at_least(eta):
  scale = mj.layer_scale(jnp.asarray(eta), mj.Perturbation(1e-9, 1e5))
  assert scale.dtype == jnp.float32
  np.testing.assert_allclose(scale, 1e-9, rtol=1e-6)


class TestAmplitude:
  def test_forget_zero_remain_positive_gives_zero(self):
    np.testing.assert_array_equal(mj.amplitude(array(0, 1), array(2, 2)), [0, 0.5])

  def test_both_zero_gives_zero(self):
    np.testing.assert_array_equal(mj.amplitude(array(0, 1), array(0, 2)), [0, 0.5])

  def test_remain_zero_gives_the_layers_largest_finite_ratio(self):
    np.testing.assert_array_equal(
      mj.amplitude(array(1, 3, 2, 1), array(0, 1, 1, 4)), [3, 3, 2, 0.25]
    )

  def test_remain_zero_looks_at_its_own_layer_only(self):
    forget, remain = jnp.ones((2, 2)), jnp.array([[0.0, 1.0], [0.0, 0.25]])
    np.testing.assert_array_equal(mj.amplitude(forget, remain, layer_axis=0), [[1, 1], [4, 4]])
    np.testing.assert_array_equal(mj.amplitude(forget, remain), [[4, 1], [4, 4]])
    two_leaves = mj.amplitude({"a": array(1, 1), "b": array(9)}, {"a": array(0, 1), "b": array(1)})
    np.testing.assert_array_equal(two_leaves["a"], [1, 1])

  def test_ratio_that_overflows_gives_the_layers_largest_finite_ratio(self):
    np.testing.assert_array_equal(mj.amplitude(array(1e30, 6), array(1e-30, 2)), [3, 3])

  def test_no_finite_ratio_but_zero_leaves_the_layer_alone(self):
    np.testing.assert_array_equal(mj.amplitude(array(1, 2, 0), array(0, 0, 5)), [0, 0, 0])

  def test_nan_propagates(self):
    eta = mj.amplitude(array(np.nan, 1, 1), array(1, np.nan, 1))
    np.testing.assert_array_equal(np.isnan(eta), [True, True, False])

  def test_unchanged_when_both_fishers_are_multiplied_by_one_number(self):
    forget, remain = array(1, 2, 3), array(3, 5, 7)
    np.testing.assert_array_equal(
      mj.amplitude(forget, remain), mj.amplitude(forget * 2.0**-80, remain * 2.0**-80)
    )

  def test_none_leaves_stay_none(self):
    eta = mj.amplitude(
      {"a": array(1), "b": None}, {"a": array(2), "b": None}, layer_axis={"a": 0, "b": None}
    )
    assert eta["b"] is None and eta["a"] == 0.5


class TestLayerScale:
  def test_lambda1_bounds_the_scale_and_lambda2_the_largest_change(self):
    strength = mj.Perturbation(0.5, 3.0)
    eta = {"small": array(1, 2), "large": array(1, 60)}
    scale = mj.layer_scale(eta, strength)
    assert scale["small"] == 0.5 and scale["large"].shape == ()
    np.testing.assert_allclose(scale["large"], 0.05, rtol=1e-6)

  def test_one_scale_for_each_slice_of_a_stacked_leaf(self):
    eta = jnp.array([[[1.0, 2.0]], [[4.0, 100.0]]])  # (layers, 1, 2)
    scale = mj.layer_scale(eta, mj.Perturbation(1.0, 10.0), layer_axis=0)
    assert scale.shape == (2, 1, 1)
    np.testing.assert_allclose(scale.ravel(), [1.0, 0.1], rtol=1e-6)

  @pytest.mark.parametrize("lambda2", [0.0, 1.0])
  def test_max_eta_zero_gives_lambda1_and_changes_nothing(self, lambda2):
    scale = mj.layer_scale(array(0, 0), mj.Perturbation(0.25, lambda2))
    assert scale == 0.25
    np.testing.assert_array_equal(mj.perturb(array(1, 2), array(0, 0), scale, 1), [1, 2])

  def test_quotient_below_1e_38_leaves_the_layer_alone_or_within_lambda2(self):
    eta = array(3e38)
    change = mj.perturb(array(0), eta, mj.layer_scale(eta, mj.Perturbation(1.0, 0.1)), 1)
    assert 0 <= float(change[0]) <= 0.1 * (1 + 1e-6)

  def test_nan_propagates(self):
    assert np.isnan(mj.layer_scale(array(1, np.nan), mj.Perturbation(1.0, 1.0)))


class TestPerturb:
  @pytest.mark.parametrize("sign", [1, -1])
  def test_sign(self, sign):
    np.testing.assert_array_equal(
      mj.perturb(array(1, 1), array(2, 4), array(0.5)[0], sign), [1 + sign, 1 + 2 * sign]
    )

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_computed_in_float32_then_rounded_once(self, dtype):
    # 0.1 and eta have no exact half-precision form: a product formed in the leaf's dtype is rounded
    # three times.
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=500), dtype)
    eta = np.asarray(rng.normal(size=500), np.float32)
    moved = mj.perturb(leaf, jnp.asarray(eta), jnp.float32(0.1), -1)
    assert moved.dtype == dtype
    wanted = (np.asarray(leaf, np.float32) - np.float32(0.1) * eta).astype(dtype)
    np.testing.assert_array_equal(np.asarray(moved, np.float32), np.asarray(wanted, np.float32))

  def test_none_leaves_params_as_they_are(self):
    params = {"a": array(1), "b": array(2)}
    moved = mj.perturb(params, {"a": array(1), "b": None}, {"a": array(1), "b": None}, 1)
    assert moved["b"] is params["b"] and moved["a"] == 2

  def test_traced_sign(self):
    move = jax.jit(lambda sign: mj.perturb(array(1), array(2), array(1), sign))
    assert move(1) == 3 and move(-1) == -1


class TestPerturbation:
  def test_is_a_pytree_of_two_numbers_with_names(self):
    strength = mj.Perturbation(1e-3, 10.0)
    paths = [
      jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(strength)
    ]
    assert paths == [".lambda1", ".lambda2"] and jax.tree.leaves(strength) == [1e-3, 10.0]
    assert jax.tree.map(lambda x: 2 * x, strength) == mj.Perturbation(2e-3, 20.0)
    assert (
      jax.tree.map(lambda x: None, strength).lambda1 is None
    )  # jax passes placeholders: rebuilding checks nothing

  def test_passes_through_jit_and_vmap(self):
    make = jax.jit(lambda lambda1: mj.Perturbation(lambda1, 2 * lambda1))
    made = jax.vmap(make)(array(1, 2))
    np.testing.assert_array_equal(made.lambda2, [2, 4])

  def test_cannot_be_changed_but_copied_compared_and_pickled(self):
    strength = mj.Perturbation(1e-3, 10.0)
    with pytest.raises(AttributeError, match="cannot assign"):
      strength.lambda1 = 2.0
    for twin in (copy.deepcopy(strength), pickle.loads(pickle.dumps(strength))):
      assert twin == strength and hash(twin) == hash(strength)
    assert strength != mj.Perturbation(1e-3, 11.0) and strength != (1e-3, 10.0)

  def test_zero_is_allowed_and_changes_nothing(self):
    for strength in (mj.Perturbation(0, 0), mj.Perturbation(0, 1.0), mj.Perturbation(1.0, 0)):
      eta = array(1, 5)
      np.testing.assert_array_equal(mj.perturb(eta, eta, mj.layer_scale(eta, strength), 1), eta)
