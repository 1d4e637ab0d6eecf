"""Mixing: against the reference, and at its edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import cpu_mesh, place

import mnemonic_jax as mj


def make(examples=6, classes=3, per_class=2, shape=(4,), seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  images = jnp.asarray(rng.normal(size=(examples, *shape)), dtype)
  labels = jnp.asarray(rng.integers(classes, size=examples), jnp.int32)
  return images, labels, jnp.asarray(rng.normal(size=(classes, per_class, *shape)), jnp.float32)


def chosen_codes(mixed, labels, codes):
  """Which of the K codes of its class each row is; -1 where none."""
  rows = np.asarray(mixed).reshape(len(mixed), 1, -1) == np.asarray(codes)[labels].reshape(
    len(mixed), codes.shape[1], -1
  )
  return np.where(rows.all(-1).any(-1), rows.all(-1).argmax(-1), -1)


@settings(deadline=None, max_examples=6)
@given(
  examples=st.integers(1, 9),
  classes=st.integers(2, 4),
  per_class=st.integers(1, 3),
  shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
  rate=st.floats(0, 1),
  seed=st.integers(0, 2**16),
)
def test_matches_the_reference(examples, classes, per_class, shape, rate, seed):
  images, labels, codes = make(examples, classes, per_class, tuple(shape), seed)
  mixed, replaced = mj.mix(jax.random.key(seed), images, labels, codes, rate, return_mask=True)
  assert replaced.shape == (examples,) and replaced.dtype == bool
  choice = np.maximum(chosen_codes(mixed, labels, codes), 0)
  np.testing.assert_array_equal(
    mixed, reference.mix(images, labels, np.asarray(codes), replaced, choice)
  )


def test_rate_zero_returns_the_images():
  images, labels, codes = make(64)
  mixed, replaced = mj.mix(jax.random.key(0), images, labels, codes, 0.0, return_mask=True)
  np.testing.assert_array_equal(mixed, images)
  assert not replaced.any()


def test_rate_one_returns_only_codes():
  images, labels, codes = make(64)
  mixed, replaced = mj.mix(jax.random.key(0), images, labels, codes, 1, return_mask=True)
  assert replaced.all() and (chosen_codes(mixed, labels, codes) >= 0).all()


def test_rate_is_the_share_of_replaced_examples_and_codes_are_drawn_uniformly():
  images, labels, codes = make(20000, per_class=3, shape=(2,))
  mixed, replaced = mj.mix(jax.random.key(3), images, labels, codes, 0.3, return_mask=True)
  assert abs(float(replaced.mean()) - 0.3) < 0.015
  counts = np.bincount(chosen_codes(mixed, labels, codes)[np.asarray(replaced)], minlength=3)
  np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.03)
  # One row is replaced regardless of the next.
  assert abs(np.corrcoef(replaced[:-1], replaced[1:])[0, 1]) < 0.03


def test_key_decides_and_jit_changes_nothing():
  images, labels, codes = make(32)
  eager = mj.mix(jax.random.key(0), images, labels, codes, 0.5)
  np.testing.assert_array_equal(
    eager, jax.jit(mj.mix)(jax.random.key(0), images, labels, codes, 0.5)
  )
  assert not np.array_equal(eager, mj.mix(jax.random.key(1), images, labels, codes, 0.5))


def test_vmap_over_keys_equals_one_by_one():
  images, labels, codes = make(8)
  keys = jax.random.split(jax.random.key(0), 3)
  together = jax.vmap(lambda key: mj.mix(key, images, labels, codes, 0.5))(keys)
  for row, key in zip(together, keys, strict=True):
    np.testing.assert_array_equal(row, mj.mix(key, images, labels, codes, 0.5))
  assert not np.array_equal(together[0], together[1])


def test_traced_rate_does_not_recompile():
  images, labels, codes = make()
  traces = []

  @jax.jit
  def step(rate):
    traces.append(rate)
    return mj.mix(jax.random.key(0), images, labels, codes, rate)

  for rate in (0.0, 0.5, 1.0):
    step(rate)
  assert len(traces) == 1


@pytest.mark.parametrize("label", [-1, 3, 2**30])
def test_traced_labels_out_of_range_give_nan_rows_never_another_class(label):
  images, labels, codes = make()
  labels = labels.at[2].set(label)
  mixed = jax.jit(lambda labels: mj.mix(jax.random.key(0), images, labels, codes, 1.0))(labels)
  assert np.isnan(mixed[2]).all() and not np.isnan(np.delete(np.asarray(mixed), 2, 0)).any()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_labels_of_any_integer_dtype_and_more_classes_than_it_counts(dtype):
  codes = jnp.arange(300.0)[:, None, None]
  labels = jnp.array([0, 1, 127], dtype)
  mixed = mj.mix(jax.random.key(0), jnp.zeros((3, 1)) - 1, labels, codes, 1.0)
  np.testing.assert_array_equal(mixed[:, 0], [0, 1, 127])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_images_keep_their_dtype(dtype):
  images, labels, codes = make(dtype=dtype)
  assert mj.mix(jax.random.key(0), images, labels, codes, 0.5).dtype == dtype


@pytest.mark.parametrize(
  ("devices", "axis_type"), [(1, "Auto"), (2, "Auto"), (4, "Auto"), (8, "Auto"), (4, "Explicit")]
)
def test_any_device_count_gives_the_same_rows(devices, axis_type):
  images, labels, codes = make(16)
  expected = mj.mix(jax.random.key(5), images, labels, codes, 0.5)
  mesh = cpu_mesh(devices, axis_type)
  batch = place((images, labels), mesh, "data")
  for function in (mj.mix, jax.jit(mj.mix)):
    mixed = function(jax.random.key(5), *batch, place(codes, mesh), 0.5)
    np.testing.assert_array_equal(mixed, expected)
    assert mixed.sharding.is_equivalent_to(batch[0].sharding, mixed.ndim)
