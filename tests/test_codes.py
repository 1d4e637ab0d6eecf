"""Codes: how they are drawn and how they are mixed into a batch, on any mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from toys import cpu_mesh, place

import mnemonic_jax as mj


@pytest.mark.parametrize(
  ("classes", "per_class", "shape", "dtype", "distribution"),
  [
    (1, 1, [1], jnp.float32, "uniform"),
    (3, 2, [4, 2], jnp.bfloat16, "normal"),
    (4, 3, [2, 3, 1], jnp.float16, "uniform"),
  ],
)
def test_shape_and_dtype(classes, per_class, shape, dtype, distribution):
  codes = mj.make_codes(
    jax.random.key(1), classes, shape, per_class=per_class, distribution=distribution, dtype=dtype
  )
  assert codes.shape == (classes, per_class, *shape) and codes.dtype == dtype


def test_normal_codes_are_standard_normal_and_the_default():
  codes = np.asarray(mj.make_codes(jax.random.key(0), 10, (4096,)))
  np.testing.assert_array_equal(
    codes, mj.make_codes(jax.random.key(0), 10, (4096,), distribution="normal")
  )
  assert abs(codes.mean()) < 0.02 and abs(codes.std() - 1) < 0.02 and codes.min() < -3


def test_uniform_codes_fill_zero_to_one():
  codes = np.asarray(mj.make_codes(jax.random.key(0), 10, (4096,), distribution="uniform"))
  assert 0 <= codes.min() < 0.001 and 0.999 < codes.max() < 1
  assert abs(codes.mean() - 0.5) < 0.01 and abs(codes.std() - 12**-0.5) < 0.01


def test_every_class_and_every_code_differs_and_the_key_decides():
  draw = lambda seed: np.asarray(mj.make_codes(jax.random.key(seed), 3, (8,), per_class=2))
  assert len(np.unique(draw(0).reshape(6, 8), axis=0)) == 6
  np.testing.assert_array_equal(draw(0), draw(0))
  assert not np.array_equal(draw(0), draw(1))


@pytest.mark.parametrize(
  "devices", [8, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4))]
)
def test_same_codes_on_any_mesh(devices):
  mesh = cpu_mesh(devices)
  make = lambda key: mj.make_codes(key, 8, (16,), per_class=2)
  for spec in (jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec(None, None, "data")):
    made = jax.jit(make, out_shardings=jax.sharding.NamedSharding(mesh, spec))(jax.random.key(7))
    assert len(made.sharding.device_set) == devices
    np.testing.assert_array_equal(made, make(jax.random.key(7)))


def test_golden_codes():
  # Runs record the PRNG implementation. If these numbers change, every stored seed means other
  # codes.
  codes = mj.make_codes(jax.random.key(0, impl="threefry2x32"), 2, (2,))
  np.testing.assert_allclose(
    codes.ravel(),
    GOLDEN,
    rtol=1e-6,
    err_msg="The codes of a seed changed: say so in the CHANGELOG, then update.",
  )


GOLDEN = [1.6226422, 2.0252647, -0.43359444, -0.07861735]


def make(examples=16, classes=3, per_class=2, shape=(4,), dtype=jnp.float32):
  """Images, labels and codes."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(examples, *shape)), dtype)
  labels = jnp.asarray(rng.integers(classes, size=examples), jnp.int32)
  return images, labels, jnp.asarray(rng.normal(size=(classes, per_class, *shape)), jnp.float32)


def drawn_codes(mixed, labels, codes):
  """Which of the K codes of its class each row is; -1 for none."""
  rows = np.asarray(mixed).reshape(len(mixed), 1, -1) == np.asarray(codes)[labels].reshape(
    len(mixed), codes.shape[1], -1
  )
  return np.where(rows.all(-1).any(-1), rows.all(-1).argmax(-1), -1)


@pytest.mark.parametrize(
  ("examples", "classes", "per_class", "shape"),
  [(16, 3, 2, (4,)), (1, 2, 1, (1,)), (9, 4, 3, (3, 1, 2))],
)
def test_mix_matches_the_reference(examples, classes, per_class, shape):
  images, labels, codes = make(examples, classes, per_class, shape)
  for seed, rate in enumerate((0.0, 0.3, 0.8, 1.0)):
    mixed, replaced = mj.mix(jax.random.key(seed), images, labels, codes, rate, return_mask=True)
    assert replaced.shape == (examples,) and replaced.dtype == bool
    drawn = drawn_codes(mixed, labels, codes)
    np.testing.assert_array_equal(drawn >= 0, replaced)
    np.testing.assert_array_equal(
      mixed, reference.mix(images, labels, np.asarray(codes), replaced, drawn)
    )
    assert rate > 0 or not replaced.any()
    assert rate < 1 or replaced.all()


def test_rate_is_the_share_of_replaced_examples_and_codes_are_drawn_uniformly():
  images, labels, codes = make(20000, per_class=3, shape=(2,))
  mixed, replaced = mj.mix(jax.random.key(3), images, labels, codes, 0.3, return_mask=True)
  assert abs(float(replaced.mean()) - 0.3) < 0.015
  counts = np.bincount(drawn_codes(mixed, labels, codes)[np.asarray(replaced)], minlength=3)
  np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.03)
  # Whether a row is replaced does not depend on its neighbour.
  assert abs(np.corrcoef(replaced[:-1], replaced[1:])[0, 1]) < 0.03


def test_the_key_decides_what_mix_replaces_and_jit_changes_nothing():
  images, labels, codes = make()
  eager = mj.mix(jax.random.key(0), images, labels, codes, 0.5)
  np.testing.assert_array_equal(
    eager, jax.jit(mj.mix)(jax.random.key(0), images, labels, codes, 0.5)
  )
  assert not np.array_equal(eager, mj.mix(jax.random.key(1), images, labels, codes, 0.5))


def test_mix_under_vmap_equals_one_key_after_the_other():
  images, labels, codes = make()
  keys = jax.random.split(jax.random.key(0), 3)
  together = jax.vmap(lambda key: mj.mix(key, images, labels, codes, 0.5))(keys)
  for row, key in zip(together, keys, strict=True):
    np.testing.assert_array_equal(row, mj.mix(key, images, labels, codes, 0.5))
  assert not np.array_equal(together[0], together[1])


def test_another_rate_does_not_recompile():
  images, labels, codes = make()
  traces = []

  @jax.jit
  def step(rate):
    traces.append(rate)
    return mj.mix(jax.random.key(0), images, labels, codes, rate)

  for rate in (0.0, 0.5, 1.0):
    step(rate)
  assert len(traces) == 1


def test_traced_labels_out_of_range_give_nan_rows_never_another_class():
  images, labels, codes = make()
  mix = jax.jit(lambda labels: mj.mix(jax.random.key(0), images, labels, codes, 1.0))
  for label in (-1, 3, 2**30):
    mixed = mix(labels.at[2].set(label))
    assert np.isnan(mixed[2]).all() and not np.isnan(np.delete(np.asarray(mixed), 2, 0)).any()


# int8 cannot count the 300 classes; the others are every way to be signed, unsigned or wide.
@pytest.mark.parametrize(
  "dtype",
  [
    jnp.int8,
    jnp.uint32,
    *(pytest.param(d, marks=pytest.mark.long) for d in (jnp.uint8, jnp.int16)),
  ],
)
def test_labels_of_any_integer_dtype_and_more_classes_than_it_counts(dtype):
  codes = jnp.arange(300.0)[:, None, None]
  labels = jnp.array([0, 1, 127], dtype)
  mixed = mj.mix(jax.random.key(0), jnp.zeros((3, 1)) - 1, labels, codes, 1.0)
  np.testing.assert_array_equal(mixed[:, 0], [0, 1, 127])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_images_keep_their_dtype(dtype):
  images, labels, codes = make(dtype=dtype)
  assert mj.mix(jax.random.key(0), images, labels, codes, 0.5).dtype == dtype


MESHES = [(8, "Auto"), (4, "Explicit")] + [
  pytest.param(n, "Auto", marks=pytest.mark.long) for n in (1, 2, 4)
]


@pytest.mark.parametrize(("devices", "axis_type"), MESHES)
def test_mix_replaces_the_same_rows_on_any_mesh(devices, axis_type):
  images, labels, codes = make()
  expected = mj.mix(jax.random.key(5), images, labels, codes, 0.5)
  mesh = cpu_mesh(devices, axis_type)
  batch = place((images, labels), mesh, "data")
  for function in (mj.mix, jax.jit(mj.mix)):
    mixed = function(jax.random.key(5), *batch, place(codes, mesh), 0.5)
    np.testing.assert_array_equal(mixed, expected)
    assert mixed.sharding.is_equivalent_to(batch[0].sharding, mixed.ndim)
