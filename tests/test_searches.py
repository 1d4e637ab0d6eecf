"""Searches by judges, the default method, Dampening: on a small net trained on real digits."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from toys import assert_trees_close, make_codes, make_params, mlp

import mnemonic_jax as mj

CLASSES = 10


def net(params, inputs):
  hidden = jax.nn.relu(inputs @ params["k1"] + params["b1"])
  hidden = jax.nn.relu(hidden @ params["k2"] + params["b2"])
  return hidden @ params["k3"] + params["b3"]


@pytest.fixture(scope="module")
def digits():
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(images))
  images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
  return (images[500:], labels[500:]), (images[:500], labels[:500])


@pytest.fixture(scope="module")
def trained(digits):
  rng, sizes = np.random.default_rng(0), (64, 48, 32, CLASSES)
  params = {}
  for layer, (rows, columns) in enumerate(itertools.pairwise(sizes), start=1):
    params[f"k{layer}"] = (rng.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)
    params[f"b{layer}"] = np.zeros(columns, np.float32)
  optimizer = optax.adam(2e-3)
  loss = lambda params, x, y: mj.softmax_cross_entropy(net(params, x), y).mean()

  @jax.jit
  def step(params, state, x, y):
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
    return optax.apply_updates(params, updates), state

  state, (images, labels) = optimizer.init(params), digits[0]
  for _ in range(15):
    for at in range(0, len(images) - 64, 64):
      params, state = step(params, state, images[at : at + 64], labels[at : at + 64])
  return params


@pytest.fixture(scope="module")
def learned(digits, trained):
  return mj.learn_codes(
    jax.random.key(0), net, trained, [digits[0]], num_classes=CLASSES, min_members=15
  )


def scores(params, digits, classes):
  found = mj.evaluate(net, params, [digits[1]], classes=classes)
  return float(found.retain_accuracy), float(found.forget_error)


def test_the_default_needs_no_number_and_costs_no_accuracy(digits, trained, learned):
  before = scores(trained, digits, [3])
  result = mj.forget(net, trained, learned, [3])
  after = scores(result.params, digits, [3])
  assert isinstance(result.method, mj.Projection) and result.method.depth is not None
  assert after[1] == 1 and after[0] >= before[0] - 0.01
  assert abs(result.predicted.retain_accuracy - after[0]) < 0.05
  assert result.predicted.forget_error > 0.95
  curve = result.info["curve_retain_accuracy"]
  cheap = np.flatnonzero(curve >= curve[0] - 0.005)
  assert len(curve) == 3 and result.method.depth == cheap.max()
  again = mj.forget(net, trained, learned, [3], method=result.method)
  assert_trees_close(again.params, result.params, 0, 0)


def test_a_search_over_depths_compiles_no_more_for_another_class(trained, learned):
  calls = []

  def counted(params, inputs):
    calls.append(1)
    return net(params, inputs)

  mj.forget(counted, trained, learned, [3])
  assert 0 < len(calls) <= 4, "the model is traced at most four times"
  calls.clear()
  mj.forget(counted, trained, learned, [4, 5])
  assert not calls


@pytest.mark.parametrize("method", [mj.Dampening(), mj.Projection(drop_row=False)], ids=str)
def test_a_search_keeps_what_judges_like_best(method, digits, trained, learned):
  """Or says that nothing forgets, with the curve."""
  try:
    result = mj.forget(net, trained, learned, [0], method=method)
  except mj.CannotForget as error:
    assert all(0 <= row["forget_error"] <= 1 for row in error.curve) and len(error.curve) >= 3
    assert max(row["forget_error"] for row in error.curve) < 0.96
    return
  retain, error = (result.info[f"curve_{name}"] for name in ("retain_accuracy", "forget_error"))
  passes = (error >= 0.95) & (retain >= 0.8)
  value = np.where(passes, retain + np.minimum(error, 0.99), -1)
  predicted = result.predicted.retain_accuracy + min(result.predicted.forget_error, 0.99)
  assert predicted == pytest.approx(value.max(), abs=1e-5)
  assert scores(result.params, digits, [0])[1] >= 0.9
  assert not getattr(result.method, "to_search", ())


@pytest.mark.filterwarnings("ignore:The model classifies")
def test_a_strength_that_nothing_can_be_found_for_is_refused_with_the_curve(trained, learned):
  hopeless = dataclasses.replace(learned, codes=learned.codes[::-1])
  with pytest.raises(mj.CannotForget, match=r"quantile: none of 11 candidates") as caught:
    mj.forget(net, trained, hopeless, [3], method=mj.Dampening())
  assert len(caught.value.curve) == 11
  assert caught.value.curve[0].keys() == {"settings", "retain_accuracy", "forget_error"}


def test_the_paper_s_grid_is_searched_with_both_signs(trained, learned):
  try:
    result = mj.forget(net, trained, learned, [0], method=mj.Perturbation())
  except mj.CannotForget as error:
    assert len(error.curve) == 98
    return
  assert result.method.lambda1 in [10.0**e for e in range(-6, 1)] and result.info["sign"] in (1, -1)
  again = mj.forget(net, trained, learned, [0], method=result.method)
  assert again.predicted.forget_error >= 0.9


def test_recalled_codes_take_one_depth_and_predict_nothing(digits, trained):
  recalled = mj.learn_codes(
    jax.random.key(1), net, trained, None, num_classes=CLASSES, shape=(64,), recall_steps=60
  )
  result = mj.forget(net, trained, recalled, [3])
  assert result.method == mj.Projection(depth=0) and result.predicted is None
  assert scores(result.params, digits, [3])[1] == 1


def test_without_judges_a_search_is_refused_and_plain_codes_name_learn_codes(trained, learned):
  for method in (mj.Dampening(), mj.Perturbation(), mj.Projection(drop_row=False)):
    with pytest.raises(ValueError, match=r"searched by judges.*learn_codes"):
      mj.forget(net, trained, learned.codes, [3], method=method)
  with pytest.raises(ValueError, match=r"got None with plain codes.*learn_codes.*Perturbation"):
    mj.forget(net, trained, learned.codes, [3])
  unjudged = dataclasses.replace(learned, judge_weights=learned.judge_weights.at[3].set(0))
  with pytest.raises(ValueError, match=r"classes \[3\] have none"):
    mj.forget(net, trained, unjudged, [3], method=mj.Dampening())
  assert mj.forget(net, trained, unjudged, [3], method=mj.DropRow()).predicted.forget_error is None


def test_the_default_drops_the_row_of_a_class_without_a_judge(digits, trained, learned):
  """Its own E_F is not foreseen; where no class has a judge nothing is, and depth 0 is taken."""
  some = dataclasses.replace(learned, judge_weights=learned.judge_weights.at[3].set(0))
  result = mj.forget(net, trained, some, [3])
  assert result.predicted.retain_accuracy > 0.8 and result.predicted.forget_error is None
  assert scores(result.params, digits, [3])[1] == 1
  none = dataclasses.replace(learned, judge_weights=0 * learned.judge_weights)
  assert mj.forget(net, trained, none, [3]).method == mj.Projection(depth=0)


def test_a_traced_step_refuses_what_must_be_searched(trained, learned):
  forget = jnp.arange(CLASSES) == 3
  for method in (mj.Projection(), mj.Dampening(), mj.Perturbation()):
    with pytest.raises(ValueError, match=r"to search.*mnemonic_jax.forget"):
      mj.forget_step(net, trained, learned, forget, ~forget, method)


def test_judges_that_are_no_good_foresee_nothing(trained, learned):
  """Each judge stands for another class than its own."""
  wrong = dataclasses.replace(learned, judges=learned.judges[::-1])
  result = mj.forget(net, trained, wrong, [3])
  assert result.method == mj.Projection(depth=0)
  assert result.predicted == (None, None)
  with pytest.raises(mj.CannotForget, match=r"quantile: judges cannot choose it"):
    mj.forget(net, trained, wrong, [3], method=mj.Dampening())


# Dampening ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The model classifies")
@pytest.mark.parametrize("quantile", [0.3, 0.9])
@pytest.mark.parametrize("classes", [(1,), (0, 3)])
def test_dampening_is_that_of_the_twin(quantile, classes):
  params, codes = make_params("mlp"), make_codes(per_class=2)
  moved = mj.forget(mlp, params, codes, classes, method=mj.Dampening(quantile)).params
  twin = reference.dampened(params, np.asarray(codes), classes, quantile)
  assert_trees_close(moved, twin, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("quantile", [0, 1, -0.1, 1.5, float("nan"), "0.5", True])
def test_a_quantile_outside_of_0_and_1_is_refused(quantile):
  with pytest.raises((TypeError, ValueError), match="quantile: got"):
    mj.Dampening(quantile)
