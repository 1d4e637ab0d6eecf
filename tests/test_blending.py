"""Mixup and CutMix: the formulas, what is drawn, and codes that stay pure beside them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import TINY, call
from sklearn.datasets import load_digits
from toys import assert_trees_close, cpu_mesh, host, place

import mnemonic_jax as mj
from mnemonic_jax.data import mixup

BOTH = pytest.mark.parametrize("blend", [mixup.mixup, mixup.cutmix])


def digits(examples, classes=None):
  """Real pictures (N, 8, 8, 1) in [0, 1]; each a class of its own unless `classes` says how many there are."""
  images = jnp.asarray(load_digits().images[:examples, ..., None] / 16, jnp.float32)
  return images, jax.nn.one_hot(
    jnp.arange(examples) % (classes or examples), classes or examples, dtype=jnp.float32
  )


def test_mixup_is_the_mean_that_its_targets_tell():
  images, targets = digits(50)
  mixed, weights = mixup.mixup(jax.random.key(0), images, targets, 0.4)
  own = np.diagonal(np.asarray(weights)).astype(np.float64)
  np.testing.assert_allclose(np.asarray(weights).sum(1), 1, rtol=1e-6)
  assert np.count_nonzero(np.asarray(weights)) <= 100
  x, share = np.asarray(images, np.float64), own[:, None, None, None]
  np.testing.assert_allclose(mixed, share * x + (1 - share) * np.roll(x, -1, axis=0), atol=1e-6)
  assert len(np.unique(own)) > 40


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_the_weights_of_mixup_follow_the_beta_distribution(alpha):
  images, targets = jnp.zeros((8000, 1, 1, 1)), jnp.tile(jnp.eye(2), (4000, 1))
  _, weights = mixup.mixup(jax.random.key(1), images, targets, alpha)
  own = np.where(np.arange(8000) % 2, weights[:, 1], weights[:, 0])
  variance = 1 / (4 * (2 * alpha + 1))
  assert own.mean() == pytest.approx(0.5, abs=4 * (variance / 8000) ** 0.5)
  assert own.var() == pytest.approx(variance, rel=0.06)


def boxes(alpha, examples, height, width):
  """Which pixels came from the next picture, (N, H, W), and what the targets say of them, (N,)."""
  images = (jnp.arange(examples, dtype=jnp.float32) % 2)[:, None, None, None] * jnp.ones(
    (examples, height, width, 2)
  )
  targets = jax.nn.one_hot(jnp.arange(examples) % 2, 2, dtype=jnp.float32)
  pasted, weights = mixup.cutmix(jax.random.key(2), images, targets, alpha)
  np.testing.assert_array_equal(pasted[..., 0], pasted[..., 1])
  of_class_1 = np.asarray(pasted[..., 0])
  assert set(np.unique(of_class_1)) <= {0.0, 1.0}
  odd = (np.arange(examples) % 2).astype(bool)
  return np.where(odd[:, None, None], 1 - of_class_1, of_class_1), np.where(
    odd, weights[:, 0], weights[:, 1]
  )


def test_cutmix_pastes_one_box_and_the_targets_have_its_exact_share():
  inside, shares = boxes(1.0, 400, 12, 20)
  np.testing.assert_allclose(shares, inside.mean((1, 2)), rtol=1e-6)
  rows, columns = inside.max(2), inside.max(1)
  np.testing.assert_array_equal(inside, rows[:, :, None] * columns[:, None])
  for side in (rows, columns):
    assert (np.abs(np.diff(np.pad(side, ((0, 0), (1, 1))))).sum(1) <= 2).all()  # no gap
    middle = side.mean(0)
    assert middle.min() > 0.15 and middle.max() < 0.95  # anywhere, and not always the same
  assert len(np.unique(shares)) > 50 and shares.std() > 0.15


def test_the_sides_of_a_box_follow_the_square_root():
  """A huge alpha draws lambda = 1/2 only: both sides are 0.707 of the picture's, where no edge cuts them."""
  inside, _ = boxes(1e6, 400, 100, 60)
  for axis, pixels in ((1, 60), (2, 100)):
    side = inside.max(axis)
    whole = (side[:, 0] == 0) & (side[:, -1] == 0)
    assert whole.sum() > 50
    assert np.abs(side[whole].sum(1) - pixels * 0.5**0.5).max() <= 1.5


def test_pixels_come_from_the_example_or_the_next_one():
  images, targets = digits(30)
  pasted, weights = mixup.cutmix(jax.random.key(3), images, targets, 1.0)
  following = jnp.roll(images, -1, axis=0)
  assert bool(((pasted == images) | (pasted == following)).all())
  assert bool((pasted != images).any()) and bool((pasted != following).any())
  own = jnp.arange(30)
  np.testing.assert_allclose(weights[own, own] + weights[own, (own + 1) % 30], 1, rtol=1e-6)


@pytest.mark.parametrize("blend", [mixup.mixup, pytest.param(mixup.cutmix, marks=pytest.mark.long)])
def test_the_key_decides_and_jit_vmap_and_dtype_do_not(blend):
  images, targets = digits(16)
  call_it = partial(blend, alpha=1.0)
  first = call_it(jax.random.key(0), images, targets)
  assert_trees_close(
    jax.jit(call_it)(jax.random.key(0), images, targets), host(first), rtol=1e-6, atol=1e-7
  )
  assert bool((call_it(jax.random.key(1), images, targets)[1] != first[1]).any())
  keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
  both = jax.vmap(call_it)(keys, jnp.stack([images] * 2), jnp.stack([targets] * 2))
  assert_trees_close(jax.tree.map(lambda x: x[0], both), host(first), rtol=1e-6, atol=1e-7)
  half, weights = call_it(jax.random.key(0), images.astype(jnp.bfloat16), targets)
  assert half.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
  assert_trees_close(half, host(first[0]), rtol=1e-2, atol=1e-3)
  traced = jax.jit(lambda alpha: blend(jax.random.key(0), images, targets, alpha))(jnp.float32(1.0))
  assert_trees_close(traced, host(first), rtol=1e-6, atol=1e-7)


@BOTH
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_a_sharded_batch_is_blended_the_same(blend, axis_type):
  images, targets = digits(16)
  single = blend(jax.random.key(0), images, targets, 1.0)
  mesh = cpu_mesh(4, axis_type)
  sharded = blend(jax.random.key(0), *place((images, targets), mesh, "data"), 1.0)
  assert_trees_close(sharded, host(single), rtol=1e-6, atol=1e-7)


@BOTH
def test_an_example_alone_stays(blend):
  images, targets = digits(1)
  assert_trees_close(
    blend(jax.random.key(0), images, targets, 1.0), host((images, targets)), rtol=1e-6
  )


@BOTH
@pytest.mark.parametrize(
  ("change", "error", "words"),
  [
    ({"key": 0}, TypeError, "key: got 0"),
    (
      {"images": jnp.zeros((4, 8, 8, 1), jnp.uint8)},
      TypeError,
      "images: got an array of dtype uint8",
    ),
    ({"images": jnp.zeros((4, 64))}, ValueError, r"images: got shape \(4, 64\)"),
    ({"images": jnp.zeros((0, 8, 8, 1))}, ValueError, r"images: got shape \(0, 8, 8, 1\)"),
    ({"targets": jnp.zeros(4, jnp.int32)}, TypeError, "targets: got an array of dtype int32"),
    ({"targets": jnp.zeros(4)}, ValueError, r"targets: got shape \(4,\) for 4 images.*one_hot"),
    ({"targets": jnp.zeros((3, 4))}, ValueError, r"targets: got shape \(3, 4\) for 4 images"),
    ({"alpha": 0.0}, ValueError, "alpha: got 0.0; expected one number above 0"),
    ({"alpha": -1}, ValueError, "alpha: got -1"),
    ({"alpha": float("nan")}, ValueError, "alpha: got nan"),
    ({"alpha": True}, TypeError, "alpha: got True"),
    ({"alpha": jnp.ones(2)}, ValueError, "alpha: got"),
  ],
)
def test_bad_input_is_refused_by_name(blend, change, error, words):
  images, targets = digits(4)
  arguments = {"key": jax.random.key(0), "images": images, "targets": targets, "alpha": 1.0}
  with pytest.raises(error, match=words):
    blend(**{**arguments, **change})


def seen_by_a_step(blend, rate=0.5):
  """(images, labels or targets) that one step of training gives to the model and to the loss, and its metrics."""
  seen = {}

  def apply(params, model_state, inputs, train):
    seen["images"] = np.asarray(inputs)
    return jnp.zeros((len(inputs), 10)) + params, model_state

  def loss(logits, targets):
    seen["targets"] = np.asarray(targets)
    return mj.softmax_cross_entropy(logits, targets)

  optimizer = optax.sgd(0.0)
  images, _ = digits(64)
  codes = -1 - jnp.arange(10, dtype=jnp.float32)[:, None, None, None, None] * jnp.ones(
    (10, 1, 8, 8, 1)
  )
  state = mj.init_train_state(jnp.zeros((1, 10)), {}, optimizer, jax.random.key(0))._replace(
    step=jnp.int32(5)
  )
  step = mj.make_train_step(apply, optimizer, rate=rate, loss=loss, blend=blend)
  labels = jnp.asarray(load_digits().target[:64], jnp.int32)
  _, metrics = step(state, images, labels, codes)
  return seen["images"], seen["targets"], metrics


@BOTH
def test_codes_are_drawn_as_without_blending_and_stay_pure(blend):
  plain, labels, _ = seen_by_a_step(None)
  blended, targets, metrics = seen_by_a_step(partial(blend, alpha=1.0))
  codes = (plain < 0).all((1, 2, 3))
  assert 15 < codes.sum() < 50
  np.testing.assert_array_equal((blended < 0).any((1, 2, 3)), codes)
  np.testing.assert_array_equal(blended[codes], plain[codes])
  np.testing.assert_array_equal(targets[codes], np.eye(10)[labels[codes]])
  assert (blended[~codes] != plain[~codes]).any((1, 2, 3)).mean() > 0.7
  assert (targets[~codes].max(1) < 1).mean() > 0.5
  np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
  # all logits are equal: class 0 is predicted, the loss is log 10 whatever the target
  assert metrics["accuracy"] == pytest.approx((targets.argmax(1) == 0).mean())
  assert metrics["loss"] == pytest.approx(np.log(10), rel=1e-5)


@pytest.mark.long
@BOTH
def test_a_sharded_step_blends_and_mixes_the_same(blend):
  apply = lambda params, model_state, inputs, train: (
    inputs.reshape(len(inputs), -1) @ params,
    model_state,
  )
  optimizer, codes = optax.sgd(0.3), mj.make_codes(jax.random.key(1), 10, (8, 8, 1))
  images, labels = digits(16)[0], jnp.arange(16, dtype=jnp.int32) % 10
  state = mj.init_train_state(jnp.zeros((64, 10)), {}, optimizer, jax.random.key(0))
  step = jax.jit(
    mj.make_train_step(apply, optimizer, rate=0.5, blend=partial(blend, alpha=1.0))
  )
  single, _ = step(state, images, labels, codes)
  for axis_type in ("Auto", "Explicit"):
    mesh = cpu_mesh(4, axis_type)
    batch = place((images, labels), mesh, "data")
    sharded, _ = step(place(state, mesh), *batch, place(codes, mesh))
    assert_trees_close(sharded.params, host(single.params), rtol=1e-5, atol=1e-6)


def test_blending_draws_anew_at_each_step_and_not_from_the_branches_of_mixing():
  keys = []

  def record(key, images, targets):
    keys.append(jax.random.key_data(key).tolist())
    return images, targets

  seen_by_a_step(record)
  step_key = jax.random.fold_in(jax.random.key(0), 5)
  used = [jax.random.key_data(key).tolist() for key in (step_key, *jax.random.split(step_key))]
  assert len(keys) == 1 and keys[0] not in used


@pytest.mark.lenient_numerics
@pytest.mark.parametrize("name", ["mixup", pytest.param("cutmix", marks=pytest.mark.long)])
def test_the_command_line_trains_with_it(tmp_path, name):
  short = ("--train.epochs", 3, *TINY[2:])
  plain, blended = (
    call("train", "digits", "--out", tmp_path / run, *short, *more, "--json").json
    for run, more in (("plain", ()), ("blended", (f"--train.{name}", 0.2)))
  )
  assert blended["codes_sha256"] == plain["codes_sha256"]
  assert blended["params_sha256"] != plain["params_sha256"]
  assert blended["loss"] > plain["loss"] and blended["test_accuracy"] > 0.5
