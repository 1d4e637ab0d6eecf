"""Mixup and CutMix: the formulas, what is drawn, and codes that stay as they are beside them."""

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
from mnemonic_jax.data import augmentation

pytest_plugins = ["run_fixtures"]
BOTH = pytest.mark.parametrize("function", [augmentation.mixup, augmentation.cutmix])
EXAMPLES = 64  # in most tests, which then share the compiled programs


def digits(examples=EXAMPLES):
  """Real images (N, 8, 8, 1) in [0, 1] and one-hot targets (N, N), each of a class of its own."""
  images = jnp.asarray(load_digits().images[:examples, ..., None] / 16, jnp.float32)
  return images, jnp.eye(examples, dtype=jnp.float32)


def test_mixup_is_the_mean_that_its_targets_tell():
  images, targets = digits()
  mixed, weights = augmentation.mixup(jax.random.key(0), images, targets, 0.4)
  own = np.diagonal(np.asarray(weights)).astype(np.float64)
  np.testing.assert_allclose(np.asarray(weights).sum(1), 1, rtol=1e-6)
  assert np.count_nonzero(np.asarray(weights)) <= 2 * EXAMPLES
  x, share = np.asarray(images, np.float64), own[:, None, None, None]
  np.testing.assert_allclose(mixed, share * x + (1 - share) * np.roll(x, -1, axis=0), atol=1e-6)
  assert len(np.unique(own)) > 50


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_the_weights_of_mixup_follow_the_beta_distribution(alpha):
  batch, own = digits(), []
  for key in jax.random.split(jax.random.key(1), 8000 // EXAMPLES):
    own.append(np.diagonal(np.asarray(augmentation.mixup(key, *batch, alpha)[1])))
  own = np.concatenate(own)
  variance = 1 / (4 * (2 * alpha + 1))
  assert own.mean() == pytest.approx(0.5, abs=4 * (variance / 8000) ** 0.5)
  assert own.var() == pytest.approx(variance, rel=0.06)


def boxes(alpha, examples=400, height=60, width=100):
  """Which pixels came from the next image, (N, H, W), and what the targets say of them, (N,)."""
  odd = (np.arange(examples) % 2).astype(bool)
  images = jnp.asarray(odd, jnp.float32)[:, None, None, None] * jnp.ones((1, height, width, 2))
  targets = jax.nn.one_hot(odd.astype(np.int32), 2, dtype=jnp.float32)
  pasted, weights = augmentation.cutmix(jax.random.key(2), images, targets, alpha)
  np.testing.assert_array_equal(pasted[..., 0], pasted[..., 1])
  of_class_1 = np.asarray(pasted[..., 0])
  assert set(np.unique(of_class_1)) <= {0.0, 1.0}
  inside = np.where(odd[:, None, None], 1 - of_class_1, of_class_1)
  return inside, np.where(odd, weights[:, 0], weights[:, 1])


def test_cutmix_pastes_one_box_and_the_targets_have_its_exact_share():
  inside, shares = boxes(1.0)
  np.testing.assert_allclose(shares, inside.mean((1, 2)), rtol=1e-6)
  rows, columns = inside.max(2), inside.max(1)
  np.testing.assert_array_equal(inside, rows[:, :, None] * columns[:, None])
  for side in (rows, columns):
    assert (np.abs(np.diff(np.pad(side, ((0, 0), (1, 1))))).sum(1) <= 2).all()  # no gap
    middle = side.mean(0)
    assert middle.min() > 0.15 and middle.max() < 0.95  # anywhere, and not always the same
  assert len(np.unique(shares)) > 50 and shares.std() > 0.15


def test_the_sides_of_a_box_follow_the_square_root():
  """A huge alpha draws lambda = 1/2 only: both sides are 0.707 of the image's unless cut off."""
  inside, _ = boxes(1e6)
  for axis, pixels in ((1, 100), (2, 60)):
    side = inside.max(axis)
    whole = (side[:, 0] == 0) & (side[:, -1] == 0)
    assert whole.sum() > 50
    assert np.abs(side[whole].sum(1) - pixels * 0.5**0.5).max() <= 1.5


def test_pixels_come_from_the_example_or_the_next_one():
  images, targets = digits()
  pasted, weights = augmentation.cutmix(jax.random.key(3), images, targets, 1.0)
  following = jnp.roll(images, -1, axis=0)
  assert bool(((pasted == images) | (pasted == following)).all())
  assert bool((pasted != images).any()) and bool((pasted != following).any())
  own = jnp.arange(EXAMPLES)
  np.testing.assert_allclose(weights[own, own] + weights[own, (own + 1) % EXAMPLES], 1, rtol=1e-6)


@pytest.mark.parametrize(
  "function", [augmentation.mixup, pytest.param(augmentation.cutmix, marks=pytest.mark.long)]
)
def test_the_key_decides_and_jit_and_vmap_do_not(function):
  images, targets = digits()
  first = function(jax.random.key(0), images, targets, 1.0)
  keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
  over_keys = jax.jit(jax.vmap(function, in_axes=(0, None, None, None)))  # traces alpha too
  both = over_keys(keys, images, targets, 1.0)
  assert_trees_close(jax.tree.map(lambda x: x[0], both), host(first), rtol=1e-6, atol=1e-7)
  assert bool((both[1][1] != first[1]).any())


@pytest.mark.parametrize(
  ("function", "axis_type"),
  [
    (augmentation.mixup, "Auto"),
    (augmentation.cutmix, "Explicit"),
    pytest.param(augmentation.mixup, "Explicit", marks=pytest.mark.long),
    pytest.param(augmentation.cutmix, "Auto", marks=pytest.mark.long),
  ],
)
def test_a_sharded_batch_is_mixed_up_the_same(function, axis_type):
  images, targets = digits()
  single = function(jax.random.key(0), images, targets, 1.0)
  mesh = cpu_mesh(4, axis_type)
  sharded = function(jax.random.key(0), *place((images, targets), mesh, "data"), 1.0)
  assert_trees_close(sharded, host(single), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  "function", [augmentation.mixup, pytest.param(augmentation.cutmix, marks=pytest.mark.long)]
)
def test_an_example_alone_stays_and_dtypes_do(function):
  images, targets = digits(1)
  images = images.astype(jnp.bfloat16)
  alone, weights = function(jax.random.key(0), images, targets, 1.0)
  assert alone.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
  assert_trees_close((alone, weights), host((images, targets)), rtol=1e-6)


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
def test_bad_input_is_refused_by_name(function, change, error, words):
  images, targets = digits(4)
  arguments = {"key": jax.random.key(0), "images": images, "targets": targets, "alpha": 1.0}
  with pytest.raises(error, match=words):
    function(**{**arguments, **change})


def seen_by_a_step(blend, rate=0.5):
  """Run a train step: what it gives to the model (images) and the loss (targets), its metrics."""
  seen = {}

  def apply(params, model_state, inputs, train):
    seen["images"] = np.asarray(inputs)
    return jnp.zeros((len(inputs), EXAMPLES)) + params, model_state

  def loss(logits, targets):
    seen["targets"] = np.asarray(targets)
    return mj.softmax_cross_entropy(logits, targets)

  optimizer = optax.sgd(0.0)
  images, _ = digits()
  labels = jnp.arange(EXAMPLES, dtype=jnp.int32)[::-1]
  codes = -1 - jnp.arange(EXAMPLES, dtype=jnp.float32)[:, None, None, None, None]
  codes = jnp.broadcast_to(codes, (EXAMPLES, 1, 8, 8, 1))
  state = mj.init_train_state(jnp.zeros((1, EXAMPLES)), {}, optimizer, jax.random.key(0))
  step = mj.make_train_step(apply, optimizer, rate=rate, loss=loss, blend=blend)
  _, metrics = step(state._replace(step=jnp.int32(5)), images, labels, codes)
  return seen["images"], seen["targets"], metrics


@BOTH
def test_codes_are_drawn_as_without_mixup_and_stay_as_they_are(function):
  plain, labels, _ = seen_by_a_step(None)
  mixed_up, targets, metrics = seen_by_a_step(partial(function, alpha=1.0))
  codes = (plain < 0).all((1, 2, 3))
  assert 15 < codes.sum() < 50
  np.testing.assert_array_equal((mixed_up < 0).any((1, 2, 3)), codes)
  np.testing.assert_array_equal(mixed_up[codes], plain[codes])
  np.testing.assert_array_equal(targets[codes], np.eye(EXAMPLES)[labels[codes]])
  assert (mixed_up[~codes] != plain[~codes]).any((1, 2, 3)).mean() > 0.7
  assert (targets[~codes].max(1) < 1).mean() > 0.5
  np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
  # All logits are equal: class 0 is predicted, and the loss is log C for any target.
  assert metrics["accuracy"] == pytest.approx((targets.argmax(1) == 0).mean())
  assert metrics["loss"] == pytest.approx(np.log(EXAMPLES), rel=1e-5)


@pytest.mark.long
@BOTH
def test_a_sharded_step_does_mixup_and_codes_the_same(function):
  apply = lambda params, model_state, inputs, train: (
    inputs.reshape(len(inputs), -1) @ params,
    model_state,
  )
  optimizer, codes = optax.sgd(0.3), mj.make_codes(jax.random.key(1), 10, (8, 8, 1))
  images, labels = digits(16)[0], jnp.arange(16, dtype=jnp.int32) % 10
  state = mj.init_train_state(jnp.zeros((64, 10)), {}, optimizer, jax.random.key(0))
  step = jax.jit(mj.make_train_step(apply, optimizer, rate=0.5, blend=partial(function, alpha=1.0)))
  single, _ = step(state, images, labels, codes)
  for axis_type in ("Auto", "Explicit"):
    mesh = cpu_mesh(4, axis_type)
    batch = place((images, labels), mesh, "data")
    sharded, _ = step(place(state, mesh), *batch, place(codes, mesh))
    assert_trees_close(sharded.params, host(single.params), rtol=1e-5, atol=1e-6)


def test_mixup_draws_anew_at_each_step_and_not_from_the_keys_of_the_codes():
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
def test_the_command_line_trains_with_it(trained, tmp_path, name):
  plain, mixed_up = (
    call("train", "digits_paper", "--out", run, *TINY, *more, "--json").json
    for run, more in ((trained, ()), (tmp_path / "new", (f"--train.{name}", 0.2)))
  )
  assert mixed_up["codes_sha256"] == plain["codes_sha256"]
  assert mixed_up["params_sha256"] != plain["params_sha256"]
  assert mixed_up["loss"] > plain["loss"] and mixed_up["test_accuracy"] > 0.5
