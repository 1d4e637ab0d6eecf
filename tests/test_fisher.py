"""The Fisher against loops over examples with gradients by hand, and at every edge it documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
  MODELS,
  assert_trees_close,
  cpu_mesh,
  host,
  loss_of,
  make_batch,
  make_params,
  mlp,
  mlp_loss,
  place,
  regression,
  regression_loss,
)

import mnemonic_jax as mj
from mnemonic_jax.fisher import loss_checks, passes

# Tests that put NaN or inf into a batch on purpose.
NOT_FINITE = (
  "test_an_example_with_weight_zero_in_every_group_contributes_nothing",
  "test_non_finite_gradients_propagate",
  "test_all_weights_zero_give_zero",
  "test_examples_that_depend_on_each_other_are_refused",
)


@pytest.fixture(autouse=True)
def no_nan(request):
  with jax.debug_nans(request.function.__name__ not in NOT_FINITE):
    yield


def both(model, weights=None, seed=0, **options):
  """(ours, the reference's) on one batch."""
  params, (inputs, labels) = make_params(model, seed), make_batch(seed)
  ours = mj.diagonal_fisher(
    loss_of(MODELS[model][0]),
    params,
    inputs,
    labels,
    None if weights is None else jnp.asarray(weights),
    **options,
  )
  return ours, reference.fisher(MODELS[model][2], host(params), inputs, labels, weights)


# --- the estimator


@pytest.mark.parametrize("model", MODELS)
def test_mean_over_examples_matches_the_loop(model):
  ours, wanted = both(model)
  assert_trees_close(ours, wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_weights_match_the_loop(model):
  ours, wanted = both(model, weights=[0.5, 0.0, 2.0, 0.1, 0.0, 1.0, 3.0])
  assert_trees_close(ours, wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.float16])
def test_weights_of_any_real_dtype(dtype):
  weights = [1, 0, 2, 0, 0, 1, 3]
  params, (inputs, labels) = make_params("mlp"), make_batch()
  ours = mj.diagonal_fisher(mlp_loss, params, inputs, labels, jnp.array(weights, dtype))
  assert_trees_close(
    ours, reference.fisher(MODELS["mlp"][2], host(params), inputs, labels, weights), rtol=2e-5
  )


def test_groups_come_from_one_pass_each_with_its_own_weights():
  weights = np.random.default_rng(0).random((3, 7)).astype(np.float32)
  params, (inputs, labels) = make_params("mlp"), make_batch()
  groups = mj.diagonal_fisher(mlp_loss, params, inputs, labels, jnp.asarray(weights))
  for g in range(3):
    wanted = reference.fisher(MODELS["mlp"][2], host(params), inputs, labels, weights[g])
    assert_trees_close(
      jax.tree.map(lambda leaf, g=g: leaf[g], groups), wanted, rtol=2e-5, atol=1e-12
    )


def test_concrete_weights_inside_jit_are_known_to_share_no_example():
  # Then each group visits its own examples in a loop; where they may share, all take all at once.
  together, x = np.ones((2, 300)), jax.ShapeDtypeStruct((300, 70_000), jnp.float32)
  apart = together * (np.arange(300) < [[150], [300]]) * (np.arange(300) >= [[0], [150]])
  for weights, loops in ((apart, True), (together, False)):
    fisher = lambda w, x, weights=weights: mj.diagonal_fisher(
      lambda w, x, y: (x @ w) ** 2, w, x, x[:, 0], weights
    )
    assert (
      "while" in str(jax.make_jaxpr(fisher)(jax.ShapeDtypeStruct((70_000,), jnp.float32), x))
    ) == loops


def test_weights_may_be_a_list_of_traced_rows():
  loss = lambda w, x, y: (x @ w - y) ** 2
  arrays, rows = (
    (jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones(2)),
    (jnp.array([1.0, 0]), jnp.ones(2)),
  )
  fisher = jax.jit(lambda *rows: mj.diagonal_fisher(loss, *arrays, list(rows)))
  np.testing.assert_array_equal(fisher(*rows), mj.diagonal_fisher(loss, *arrays, jnp.stack(rows)))


def test_a_small_leaf_and_many_examples_take_little_memory():
  many, wide, groups = 20_000, 1000, 10
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  objective = passes.Objective(
    lambda w, x, y: jnp.sum((x @ w) ** 2, axis=1), (True,), "highest", disjoint=True
  )
  arguments = shape(wide, 10), (shape(many, wide), shape(many)), shape(groups, many)
  memory = passes.fisher_program.lower(objective, many, *arguments).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * (
    4 * many * wide
  )  # four times the inputs, whatever the number of groups


def test_never_the_square_of_a_batch_gradient():
  # Two examples with opposite gradients: the batch gradient is 0, the Fisher is not.
  loss = lambda w, x, y: x @ w
  fisher = mj.diagonal_fisher(
    loss, jnp.zeros(2), jnp.array([[3.0, 1.0], [-3.0, -1.0]]), jnp.zeros(2)
  )
  np.testing.assert_array_equal(fisher, [9, 1])
  # Nor do copies of one example change their mean, as they would if gradients were summed first.
  fisher = mj.diagonal_fisher(loss, jnp.zeros(2), jnp.array([[3.0, 1.0]] * 5), jnp.zeros(5))
  np.testing.assert_allclose(fisher, [9, 1], rtol=1e-6)


@settings(deadline=None, max_examples=3)
@given(
  examples=st.integers(1, 5),
  features=st.integers(1, 3),
  classes=st.integers(2, 4),
  groups=st.integers(1, 3),
  seed=st.integers(0, 2**16),
)
def test_any_shape(examples, features, classes, groups, seed):
  params = make_params("regression", seed, features, classes)
  inputs, labels = make_batch(seed, examples, features, classes)
  weights = np.random.default_rng(seed).random((groups, examples)).astype(np.float32)
  ours = mj.diagonal_fisher(regression_loss, params, inputs, labels, jnp.asarray(weights))
  for g in range(groups):
    wanted = reference.fisher(
      reference.regression_gradient, host(params), inputs, labels, weights[g]
    )
    assert_trees_close(jax.tree.map(lambda leaf, g=g: leaf[g], ours), wanted, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("margin", [1.0, 17.0])
def test_closed_form_of_softmax_regression_with_confident_codes(margin):
  # Diagonal codes: class c's own logit is `margin` above the others, so
  # r_j = e^-margin / (1 + (C - 1) e^-margin).
  classes = 4
  params = {"kernel": jnp.eye(classes) * margin, "bias": jnp.zeros(classes)}
  ours = mj.diagonal_fisher(
    regression_loss, params, jnp.eye(classes), jnp.arange(classes), jnp.ones((1, classes))
  )
  odds = np.exp(-margin)
  other = odds / (1 + (classes - 1) * odds)
  squares = np.full((classes, classes), other) + np.eye(classes) * (
    (classes - 2) * other
  )  # |r|: own = sum of others
  np.testing.assert_allclose(ours["kernel"][0], squares**2, rtol=1e-5)
  np.testing.assert_allclose(ours["bias"][0], (squares**2).sum(0), rtol=1e-5)


# --- range; `forget` has no such limits: see test_code_fishers.py


def test_range_plain_values_underflow_to_zero_and_overflow_to_inf_never_to_nan():
  loss = lambda w, x, y: x @ w
  fisher = mj.diagonal_fisher(loss, jnp.zeros(2), jnp.array([[1e-25, 1e25]]), jnp.zeros(1))
  np.testing.assert_array_equal(fisher, [0, np.inf])
  fisher = mj.diagonal_fisher(loss, jnp.zeros(1), jnp.array([[1e-18]]), jnp.zeros(1))
  np.testing.assert_allclose(fisher, [1e-36], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_leaves_are_squared_and_summed_in_float32(dtype):
  # 4096 equal examples: a half-precision sum of ones stops at 256 (bfloat16) or 2048 (float16).
  examples = 4096
  loss = lambda w, x, y: (x @ w).astype(jnp.float32)
  fisher = mj.diagonal_fisher(
    loss,
    jnp.zeros(1, dtype),
    jnp.full((examples, 1), 3.0, dtype),
    jnp.zeros(examples),
    jnp.ones(examples),
  )
  assert fisher.dtype == jnp.float32
  np.testing.assert_array_equal(fisher, [9 * examples])
  # Squares of 1e-3 are subnormal in float16 (1e-6), and 300**2 is above its largest number.
  for value in (1e-3, 300.0):
    fisher = mj.diagonal_fisher(
      loss, jnp.zeros(1, dtype), jnp.full((1, 1), value, dtype), jnp.zeros(1)
    )
    np.testing.assert_allclose(fisher, [float(jnp.asarray(value, dtype)) ** 2], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_constant_times_a_float16_param():
  loss = lambda w, x, y: (x.astype(jnp.float16) @ (w * 0.5)).sum(-1).astype(jnp.float32)
  fisher = mj.diagonal_fisher(
    loss, jnp.ones((2, 2), jnp.float16), jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.zeros(2)
  )
  np.testing.assert_array_equal(fisher, [[1.25, 1.25], [0.5, 0.5]])


def test_float64_leaves_are_accumulated_in_float64():
  with jax.enable_x64(True):
    params, (inputs, labels) = make_params("mlp"), make_batch()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    inputs = inputs.astype(jnp.float64)
    ours = mj.diagonal_fisher(mlp_loss, params, inputs, labels, execution=mj.Execution(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float64)}
    assert_trees_close(
      ours,
      reference.fisher(reference.mlp_gradient, host(params), inputs, labels),
      rtol=1e-11,
      atol=1e-30,
    )


# --- weights, masks, trees


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("microbatch", [None, 2, 1])
def test_an_example_with_weight_zero_in_every_group_contributes_nothing(bad, microbatch):
  inputs = jnp.array([[1.0, 2.0], [bad, 1.0], [3.0, 4.0]])
  loss = lambda w, x, y: x @ w
  options = {"execution": mj.Execution(microbatch)}
  one = mj.diagonal_fisher(
    loss, jnp.zeros(2), inputs, jnp.zeros(3), jnp.array([1.0, 0.0, 1.0]), **options
  )
  np.testing.assert_array_equal(one, [10, 20])
  groups = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
  two = mj.diagonal_fisher(loss, jnp.zeros(2), inputs, jnp.zeros(3), groups, **options)
  np.testing.assert_array_equal(two, [[1, 4], [9, 16]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradients_propagate(bad):
  inputs = jnp.array([[1.0, 2.0], [bad, 1.0]])
  fisher = mj.diagonal_fisher(lambda w, x, y: x @ w, jnp.zeros(2), inputs, jnp.zeros(2))
  assert not np.isfinite(fisher[0])


def test_all_weights_zero_give_zero():
  params, (inputs, labels) = make_params("mlp"), make_batch()
  fisher = mj.diagonal_fisher(mlp_loss, params, inputs, labels, jnp.zeros(7))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(fisher))
  bad = jnp.zeros(2), jnp.full((3, 2), jnp.nan), jnp.zeros(3)
  for weights in (jnp.zeros(3), np.full(3, 1e-300)):  # the second are zero in float32
    for microbatch in (None, 1):
      fisher = mj.diagonal_fisher(
        lambda w, x, y: x @ w, *bad, weights, execution=mj.Execution(microbatch)
      )
      assert not np.any(fisher)


def test_whole_numbers_as_weights_do_not_wrap_around():
  weights, loss = np.array([2**31, 2**32], np.int64), lambda w, x, y: x @ w
  fisher = mj.diagonal_fisher(loss, jnp.zeros(2), jnp.eye(2), jnp.zeros(2), weights)
  np.testing.assert_array_equal(fisher, [2**31, 2**32])
  groups = mj.diagonal_fisher(
    loss, jnp.zeros(2), jnp.eye(2), jnp.zeros(2), [[2**32, 0], [2**32, 2**31]]
  )
  np.testing.assert_array_equal(groups, [[2**32, 0], [2**32, 2**31]])


@pytest.mark.parametrize("weights", ["heavy", [None, None], [[1.0], [1.0, 2.0]]])
def test_weights_that_are_no_numbers_are_refused_by_name(weights):
  with pytest.raises((TypeError, ValueError), match=r"weights: got .*; expected"):
    mj.diagonal_fisher(lambda w, x, y: x @ w, jnp.zeros(2), jnp.eye(2), jnp.zeros(2), weights)


@pytest.mark.parametrize(
  ("input_size", "gradient_size"), [(1e6, 1e-23), (1e-23, 1e6), (1e30, 1e-30)]
)
def test_inputs_and_cotangents_of_very_different_size(input_size, gradient_size):
  """The gradient of each weight, their product, is in range, the squares of both are not."""
  loss = lambda w, x, y: gradient_size * (x @ w).sum(-1)
  inputs, product = input_size * jnp.array([[1.0, 2.0], [3.0, 0.0]]), input_size * gradient_size
  fisher = mj.diagonal_fisher(loss, jnp.ones((2, 3)), inputs, jnp.zeros(2))
  np.testing.assert_allclose(fisher, product**2 * np.array([[5.0] * 3, [2.0] * 3]), rtol=1e-5)


def test_an_input_whose_square_is_not_finite_and_whose_gradient_is_zero():
  loss = lambda w, x, y: jax.nn.relu(x @ w).sum(-1)
  inputs = jnp.array(
    [[1.0, jnp.finfo(jnp.float32).min], [1.0, 2.0]]
  )  # the first one leaves all units dead
  fisher = mj.diagonal_fisher(loss, jnp.array([[1.0, 2.0], [1e-3, 1.0]]), inputs, jnp.zeros(2))
  np.testing.assert_array_equal(fisher, [[0.5, 0.5], [2.0, 2.0]])


@pytest.mark.parametrize("microbatch", [1, 3, 7, 100, None])
def test_microbatch_changes_rounding_only(microbatch):
  params, (inputs, labels) = make_params("mlp"), make_batch()
  weights = jnp.asarray(np.random.default_rng(1).random((2, 7)), jnp.float32)
  whole = mj.diagonal_fisher(mlp_loss, params, inputs, labels, weights)
  parts = mj.diagonal_fisher(
    mlp_loss, params, inputs, labels, weights, execution=mj.Execution(microbatch)
  )
  assert_trees_close(parts, host(whole), rtol=1e-5, atol=1e-12)


def default_microbatch(loss, params, inputs, examples):
  objective = passes.Objective(loss, (True,) * len(jax.tree.leaves(params)), None)
  batch = (
    jax.ShapeDtypeStruct((examples, *inputs), jnp.float32),
    jax.ShapeDtypeStruct((examples,), jnp.int32),
  )
  weights = jnp.ones((1, examples))
  # Abstract values: the microbatch inside a caller's jit, here without a convolution.
  return passes.examples_at_once(objective, params, batch, weights, None)


def test_the_default_microbatch_keeps_a_pass_within_its_budget():
  budget = passes._PASS_BYTES
  shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  activations = lambda p, x, y: ((x @ p) ** 2).sum(-1)
  # A product is contracted: what counts is half of the activations, x @ p, its square and the sum.
  most = budget // ((2 * 2**20 + 1) * 4 // 2)
  assert default_microbatch(activations, shape(8, 2**20), (8,), 20 * most) == most
  assert (
    default_microbatch(activations, shape(8, 2**20), (8,), most + 1) == (most + 2) // 2
  )  # two equal passes
  assert default_microbatch(activations, shape(8, 2**20), (8,), 3) == 3
  # A leaf that is normalised has a gradient per example.
  normalised = lambda p, x, y: (x @ (p / p.sum())).sum(-1)
  assert default_microbatch(normalised, shape(8, 2**20), (8,), 10_000) < budget // (8 * 2**20 * 4)
  assert default_microbatch(normalised, shape(2**15, 2**15), (2**15,), 10_000) == 1


@pytest.mark.parametrize(
  "mask", [{"kernel": True, "bias": False}, {"kernel": np.True_, "bias": np.False_}]
)
def test_mask_leaves_a_leaf_out(mask):
  ours, wanted = both("regression", mask=mask)
  assert ours["bias"] is None
  np.testing.assert_allclose(ours["kernel"], wanted["kernel"], rtol=2e-5)


def test_mask_is_a_tree_prefix():
  params, (inputs, labels) = make_params("regression"), make_batch()
  loss = lambda p, x, y: regression_loss(jax.tree.map(jnp.add, p["base"], p["adapter"]), x, y)
  nested = {"base": params, "adapter": jax.tree.map(jnp.zeros_like, params)}
  ours = mj.diagonal_fisher(loss, nested, inputs, labels, mask={"base": False, "adapter": True})
  assert ours["base"] == {"kernel": None, "bias": None}
  wanted = reference.fisher(reference.regression_gradient, host(params), inputs, labels)
  assert_trees_close(ours["adapter"], wanted, rtol=2e-5)


@pytest.mark.parametrize("extra", [None, 3, jnp.arange(2), np.array([1, 2], np.int8)])
def test_leaves_that_mask_leaves_out_need_not_be_floating(extra):
  params, (inputs, labels) = make_params("regression"), make_batch()
  loss = lambda p, x, y: regression_loss(p["net"], x, y)
  run = lambda net: mj.diagonal_fisher(
    loss, {"net": net, "extra": extra}, inputs, labels, mask={"net": True, "extra": False}
  )
  wanted = reference.fisher(reference.regression_gradient, host(params), inputs, labels)
  for made in (run(params), jax.jit(run)(params)):
    assert made["extra"] is None
    assert_trees_close(made["net"], wanted, rtol=2e-5)


def test_inputs_and_labels_may_be_trees_of_any_dtype():
  params, (inputs, labels) = make_params("regression"), make_batch()

  def loss(p, x, y):
    return (
      regression_loss(p, x["pixels"] + x["offset"][:, None].astype(jnp.float32), y["class"])
      * y["importance"]
    )

  tree = {"pixels": inputs - 1, "offset": jnp.ones(7, jnp.int8)}
  ours = mj.diagonal_fisher(
    loss, params, tree, {"class": labels, "importance": jnp.full(7, 2.0)}, execution=mj.Execution(2)
  )
  wanted = reference.fisher(
    reference.regression_gradient, host(params), inputs, labels, [4 / 7] * 7
  )
  assert_trees_close(ours, wanted, rtol=2e-5, atol=1e-9)


def test_labels_may_be_absent_and_regression_targets():
  loss = lambda w, x, y: 0.5 * (x["a"] @ w - x["target"]) ** 2
  fisher = mj.diagonal_fisher(
    loss, jnp.zeros(2), {"a": jnp.eye(2), "target": jnp.array([2.0, 3.0])}, None
  )
  np.testing.assert_array_equal(fisher, [2, 4.5])
  fisher = mj.diagonal_fisher(lambda w, x, _: x @ w, jnp.zeros(2), jnp.eye(2), None)
  np.testing.assert_array_equal(fisher, [0.5, 0.5])


def test_params_may_be_one_array_a_tuple_or_hold_none():
  loss = lambda p, x, y: x @ p[0]
  fisher = mj.diagonal_fisher(loss, (jnp.zeros(2), None), jnp.eye(2), jnp.zeros(2), jnp.ones(2))
  assert fisher[1] is None
  np.testing.assert_array_equal(fisher[0], [1, 1])


# --- what it refuses, and what it must not refuse


def test_examples_that_depend_on_each_other_are_refused():
  params, (inputs, labels) = make_params("regression"), make_batch()
  batch_norm = lambda p, x, y: regression_loss(
    p, (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True), y
  )
  dropout = lambda p, x, y: regression_loss(
    p, x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype), y
  )
  for loss in (
    batch_norm,
    dropout,
    lambda p, x, y: jnp.full(len(y), regression_loss(p, x, y).mean()),
  ):
    with pytest.raises(
      ValueError, match=r"loss_fn: examples depend on each other.*BatchNorm.*dropout.*mean"
    ):
      mj.diagonal_fisher(loss, params, inputs, labels)
  # A batch of one has nothing to depend on; a traced call is the caller's promise.
  mj.diagonal_fisher(batch_norm, params, inputs[:1] + jnp.eye(1, 5), labels[:1])
  jax.jit(lambda p: mj.diagonal_fisher(batch_norm, p, inputs, labels))(params)


@pytest.mark.parametrize("jit", [False, True])
def test_a_loss_that_squeezes_the_batch_away_is_refused(jit):
  def loss(w, x, y):
    hidden = jnp.tanh(jnp.squeeze(x) @ w)  # (N, 4, 5), but (4, 5) for one example
    return jnp.sum(hidden**2, axis=tuple(range(1, hidden.ndim)))

  arguments = jnp.eye(5), jax.random.normal(jax.random.key(0), (3, 4, 5, 1)), jnp.zeros(3)
  call = (
    jax.jit(lambda *a: mj.diagonal_fisher(loss, *a))
    if jit
    else lambda *a: mj.diagonal_fisher(loss, *a)
  )
  with pytest.raises(
    ValueError, match=r"returned shape \(4,\) for a batch of one example; expected \(1,\).*squeeze"
  ):
    call(*arguments)
  scalar = lambda w, x, y: jnp.squeeze(jnp.square(x @ w - y[:, None]))
  with pytest.raises(
    ValueError, match=r"returned shape \(\) for a batch of one example; expected \(1,\).*squeeze"
  ):
    mj.diagonal_fisher(scalar, jnp.ones((2, 1)), jnp.eye(2), jnp.zeros(2))


def test_a_callers_loss_that_cancels_is_rounding_not_dependence():
  # logsumexp(l) - l_y of confident codes is noise as large as the logits' rounding, and another
  # one in every batch.
  noise = {1: 2e-6, 7: 0.0}
  loss = lambda w, x, y: jnp.maximum(x @ w, 0) + noise[len(y)]
  mj.diagonal_fisher(loss, jnp.zeros(2), jnp.ones((7, 2)), jnp.zeros(7))


def test_independence_is_checked_at_the_precision_asked_for():
  seen = []

  def loss(w, x, y):
    seen.append(jax.config.jax_default_matmul_precision)
    return x @ w

  arguments = jnp.zeros(2), jnp.eye(2), jnp.zeros(2)
  loss_checks.check_loss(loss, *arguments, "highest")
  assert set(seen) == {"highest"}
  seen.clear()
  with jax.default_matmul_precision("bfloat16"):
    mj.diagonal_fisher(
      lambda *args: loss(*args), *arguments, precision=None
    )  # None: whatever is set
  assert set(seen) == {"bfloat16"}


# --- transformations


def test_under_jit_with_concrete_or_traced_arguments():
  params, (inputs, labels) = make_params("mlp"), make_batch()
  wanted = host(mj.diagonal_fisher(mlp_loss, params, inputs, labels))
  assert_trees_close(
    jax.jit(lambda *args: mj.diagonal_fisher(mlp_loss, *args))(params, inputs, labels),
    wanted,
    1e-5,
    1e-12,
  )
  # Concrete values inside a trace: nothing may be looked at, and nothing breaks.
  closed = jax.jit(
    lambda x: jax.tree.map(
      lambda leaf: leaf + x, mj.diagonal_fisher(mlp_loss, params, inputs, labels)
    )
  )
  assert_trees_close(closed(0.0), wanted, 1e-5, 1e-12)
  weighted = jax.jit(
    lambda x: mj.diagonal_fisher(lambda p, a, b: mlp_loss(p, a, b) * x, params, inputs, labels)
  )
  assert_trees_close(weighted(1.0), wanted, 1e-5, 1e-12)


def test_under_vmap_over_params():
  (inputs, labels), seeds = make_batch(), (0, 1)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(make_params("mlp", s) for s in seeds))
  together = jax.vmap(
    lambda p: mj.diagonal_fisher(mlp_loss, p, inputs, labels, execution=mj.Execution(3))
  )(stacked)
  for i, seed in enumerate(seeds):
    wanted = reference.fisher(
      reference.mlp_gradient, host(make_params("mlp", seed)), inputs, labels
    )
    assert_trees_close(
      jax.tree.map(lambda leaf, i=i: leaf[i], together), wanted, rtol=5e-5, atol=1e-12
    )


def test_the_same_function_does_not_compile_twice():
  traces = []

  def loss(params, inputs, labels):
    traces.append(1)
    return regression_loss(params, inputs, labels)

  inputs, labels = make_batch()
  mj.diagonal_fisher(loss, make_params("regression"), inputs, labels)
  once = len(traces)
  mj.diagonal_fisher(loss, make_params("regression", 1), inputs + 1, labels)
  assert len(traces) == once


# --- sharding: 1, 2, 4, 8 devices


def sharded_problem():
  params, (inputs, labels) = (
    make_params("mlp", features=8, hidden=8, classes=8),
    make_batch(examples=16, features=8, classes=8),
  )
  weights = jnp.stack([(labels == 0).astype(jnp.float32), (labels != 0).astype(jnp.float32)]) / 16
  single = host(mj.diagonal_fisher(mlp_loss, params, inputs, labels, weights))
  # The two groups differ: an error that makes every class's Fisher the same cannot hide.
  assert not np.allclose(single["kernel1"][0], single["kernel1"][1], rtol=0.1)
  return params, inputs, labels, weights, single


# Each kind of axis with replicated and with sharded params; the other pairs where there is time.
MESHES = [
  (2, "Auto", ()),
  (8, "Auto", ("data",)),
  (2, "Explicit", ()),
  (4, "Explicit", ("data",)),
]
OTHERS = [(devices, kind, () if spec else ("data",)) for devices, kind, spec in MESHES]
OTHERS += [(devices, "Auto", spec) for devices in (1, 4) for spec in ((), ("data",))]


@pytest.mark.parametrize(
  ("devices", "axis_type", "spec"),
  [*MESHES, *(pytest.param(*mesh, marks=pytest.mark.long) for mesh in OTHERS)],
)
def test_jit_with_named_sharding_equals_one_device(devices, axis_type, spec):
  params, inputs, labels, weights, single = sharded_problem()
  mesh = cpu_mesh(devices, axis_type)
  kernels = {
    name: leaf for name, leaf in params.items() if leaf.ndim == 2
  }  # explicit axes forbid sharded biases
  params = place(params, mesh) | place(params if axis_type == "Auto" else kernels, mesh, *spec)
  inputs, labels = place((inputs, labels), mesh, "data")
  microbatch = mj.Execution(3 if devices == 4 else None)
  run = lambda *args: mj.diagonal_fisher(mlp_loss, *args, execution=microbatch)
  assert_trees_close(jax.jit(run)(params, inputs, labels, weights), single, 1e-5, 1e-9)
  if devices == 4:
    assert_trees_close(run(params, inputs, labels, weights), single, 1e-5, 1e-9)


@pytest.mark.parametrize(
  ("devices", "check_vma"),
  [
    *((devices, True) for devices in (1, 2, 8)),
    (4, False),
    *(pytest.param(*other, marks=pytest.mark.long) for other in ((4, True), (2, False))),
  ],
)
def test_shard_map_sums_local_examples_and_the_caller_reduces(devices, check_vma):
  params, inputs, labels, weights, single = sharded_problem()
  P = jax.sharding.PartitionSpec

  def run(params, inputs, labels, weights):
    local = mj.diagonal_fisher(
      mlp_loss, params, inputs, labels, weights, execution=mj.Execution(1 if devices == 4 else None)
    )
    return jax.lax.psum(local, "data")

  mapped = jax.shard_map(
    run,
    mesh=cpu_mesh(devices),
    in_specs=(P(), P("data"), P("data"), P(None, "data")),
    out_specs=P(),
    check_vma=check_vma,
  )
  assert_trees_close(jax.jit(mapped)(params, inputs, labels, weights), single, 1e-5, 1e-9)


def test_shard_map_without_weights_is_the_local_mean():
  params, inputs, labels, _, _ = sharded_problem()
  P = jax.sharding.PartitionSpec
  run = lambda p, x, y: jax.lax.pmean(mj.diagonal_fisher(mlp_loss, p, x, y), "data")
  mapped = jax.shard_map(run, mesh=cpu_mesh(4), in_specs=(P(), P("data"), P("data")), out_specs=P())
  assert_trees_close(
    jax.jit(mapped)(params, inputs, labels),
    host(mj.diagonal_fisher(mlp_loss, params, inputs, labels)),
    1e-5,
    1e-9,
  )


def test_shard_map_with_a_loss_that_closes_over_the_local_batch():
  params, inputs, labels, _, _ = sharded_problem()
  P = jax.sharding.PartitionSpec

  def run(params, inputs, labels):
    rows = jnp.arange(
      len(labels)
    )  # the same on every device: only what the loss closes over varies
    loss = lambda p, row, _: mlp_loss(p, inputs[row], labels[row])
    return jax.lax.pmean(mj.diagonal_fisher(loss, params, rows, rows), "data")

  mapped = jax.shard_map(run, mesh=cpu_mesh(4), in_specs=(P(), P("data"), P("data")), out_specs=P())
  assert_trees_close(
    jax.jit(mapped)(params, inputs, labels),
    host(mj.diagonal_fisher(mlp_loss, params, inputs, labels)),
    1e-5,
    1e-9,
  )


@pytest.mark.parametrize(
  "collective", ["all_gather", "psum", "pmean", "all_to_all", "ppermute", "pmax"]
)
def test_a_collective_inside_the_loss_is_refused_by_name(collective):
  P = jax.sharding.PartitionSpec
  gather = {
    "all_gather": lambda w: jax.lax.all_gather(w, "data", tiled=True),
    "psum": lambda w: jax.lax.psum(jnp.tile(w, 2), "data"),
    "pmean": lambda w: jax.lax.pmean(jnp.tile(w, 2), "data"),
    "pmax": lambda w: jax.lax.pmax(jnp.tile(w, 2), "data"),
    "all_to_all": lambda w: jnp.tile(jax.lax.all_to_all(w, "data", 0, 0, tiled=True), 2),
    "ppermute": lambda w: jnp.tile(jax.lax.ppermute(w, "data", [(0, 1), (1, 0)]), 2),
  }[collective]
  # Also where it hides inside a jitted part of the loss.
  loss = lambda w, x, y: x @ jax.jit(gather)(w)
  run = lambda w, x: mj.diagonal_fisher(loss, w, x, jnp.zeros(len(x)))
  mapped = jax.shard_map(run, mesh=cpu_mesh(2), in_specs=(P("data"), P()), out_specs=P("data"))
  name = {"pmean": "psum"}.get(collective, collective)
  with pytest.raises(
    ValueError, match=rf"loss_fn: calls the collective '{name}.*Gather the params before"
  ):
    jax.jit(mapped)(jnp.arange(4.0), jnp.ones((3, 4)))


@pytest.mark.parametrize("microbatch", [pytest.param(None, marks=pytest.mark.long), 1])
def test_inside_a_callers_pmap(microbatch):
  params, inputs, labels, weights, single = sharded_problem()
  split = lambda x: x.reshape(4, -1, *x.shape[1:])
  run = lambda x, y, w: jax.lax.psum(
    mj.diagonal_fisher(mlp_loss, params, x, y, w.T, execution=mj.Execution(microbatch)), "data"
  )
  mapped = jax.pmap(run, axis_name="data", devices=jax.devices("cpu")[:4])
  summed = mapped(split(inputs), split(labels), split(weights.T))
  assert_trees_close(jax.tree.map(lambda leaf: leaf[0], summed), single, 1e-5, 1e-9)


def test_mlp_and_regression_are_the_reference_models():
  # The twins are twins: otherwise nothing above means anything.
  for model, (ours, theirs, _) in MODELS.items():
    assert ours in (mlp, regression)
    params, (inputs, _) = make_params(model), make_batch()
    wanted = [theirs(host(params), np.asarray(x, np.float64)) for x in inputs]
    np.testing.assert_allclose(ours(params, inputs), wanted, rtol=1e-4, atol=1e-5)
