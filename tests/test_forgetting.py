"""`forget` against the reference end to end, at every edge, and under jit, vmap and sharding."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

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
  compiled_programs,
  cpu_mesh,
  host,
  make_codes,
  make_params,
  mlp,
  place,
  regression,
)

import mnemonic_jax as mj
from mnemonic_jax.fisher import passes
from mnemonic_jax.methods.problem import CodeScores
from mnemonic_jax.models import Model

LARGEST = float(np.finfo(np.float32).max)
STRENGTH = mj.Perturbation(0.1, 2.0)
# These models are drawn, not trained.
pytestmark = pytest.mark.filterwarnings("ignore:The model classifies")


def twin(model, params, codes, forget, method=STRENGTH, forgotten=(), **options):
  """What the reference does with the same request."""
  _, logits, gradient = MODELS[model]
  remain = [c for c in range(len(codes)) if c not in forget and c not in forgotten]
  codes = np.asarray(codes, np.float64)
  arguments = codes, list(forget), remain, method.lambda1, method.lambda2
  return reference.forget(logits, gradient, host(params), *arguments, overflow=LARGEST, **options)


def masks(classes, num_classes, forgotten=()):
  forget = np.isin(np.arange(num_classes), classes)
  return jnp.asarray(forget), jnp.asarray(~forget & ~np.isin(np.arange(num_classes), forgotten))


# --- against the reference


@pytest.mark.parametrize("classes", [[0], [3], [1, 2], [0, 1, 3]])
@pytest.mark.parametrize("model", MODELS)
def test_matches_the_reference(model, classes):
  params, codes = make_params(model), make_codes()
  result = mj.forget(MODELS[model][0], params, codes, classes, method=STRENGTH)
  wanted, sign, _ = twin(model, params, codes, classes)
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-4, atol=1e-5)
  assert not np.allclose(result.params[sorted(params)[0]], params[sorted(params)[0]])


@settings(deadline=None, max_examples=3)
@given(
  num_classes=st.integers(3, 4),  # with two classes both signs are the same to all but rounding
  per_class=st.integers(1, 2),
  features=st.integers(2, 3),
  seed=st.integers(0, 2**16),
  data=st.data(),
)
def test_matches_the_reference_for_any_classes_and_shapes(
  num_classes, per_class, features, seed, data
):
  classes = data.draw(
    st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=num_classes - 1)
  )
  params = make_params("regression", seed, features, num_classes)
  codes = make_codes(seed, num_classes, per_class, features)
  result = mj.forget(regression, params, codes, sorted(classes), method=STRENGTH)
  wanted, sign, _ = twin("regression", params, codes, sorted(classes))
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-3, atol=1e-4)


def test_both_signs_happen_and_each_is_the_better_one():
  signs = set()
  for seed in range(6):
    params, codes = make_params("mlp", seed), make_codes(seed)
    result = mj.forget(mlp, params, codes, [0], method=STRENGTH)
    signs.add(result.info["sign"])
    assert result.info["sign"] == twin("mlp", params, codes, [0])[1]
  assert signs == {1, -1}


def test_scores_on_the_codes_are_those_of_the_params_returned():
  for seed in range(4):
    params, codes = make_params("mlp", seed), make_codes(seed, per_class=2)
    result = mj.forget(mlp, params, codes, [1], method=STRENGTH)
    logits = np.asarray(mlp(result.params, codes.reshape(-1, 5)))
    right = logits.argmax(-1).reshape(4, 2) == np.arange(4)[:, None]
    assert result.code_retain_accuracy == pytest.approx(right[[0, 2, 3]].mean())
    assert result.code_forget_error == pytest.approx(1 - right[1].mean())
    assert isinstance(result.code_retain_accuracy, float)
    assert isinstance(result.info["sign"], int)
    assert set(result.seconds) == {"compile", "method", "total"}
    assert result.method == STRENGTH


def test_more_codes_a_class_are_averaged():
  params, codes = make_params("mlp"), make_codes(per_class=3)
  result = mj.forget(mlp, params, codes, [1, 2], method=STRENGTH)
  wanted, sign, _ = twin("mlp", params, codes, [1, 2])
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-4, atol=1e-5)
  # Copies of the codes are the same codes.
  copies = mj.forget(mlp, params, jnp.repeat(codes[:, :1], 3, axis=1), [1], method=STRENGTH)
  assert_trees_close(
    copies.params,
    host(mj.forget(mlp, params, codes[:, :1], [1], method=STRENGTH).params),
    rtol=1e-4,
  )


def test_forgotten_classes_belong_to_neither_side():
  params, codes = make_params("mlp"), make_codes()
  result = mj.forget(mlp, params, codes, [2], method=STRENGTH, forgotten=[0])
  wanted, sign, _ = twin("mlp", params, codes, [2], forgotten=[0])
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-4, atol=1e-5)
  # Their codes may be anything, even what breaks the gradient.
  changed = mj.forget(mlp, params, codes.at[0].set(7.0), [2], method=STRENGTH, forgotten=[0])
  assert_trees_close(changed.params, host(result.params), rtol=1e-6)


@pytest.mark.parametrize("microbatch", [None, 2, 1])
def test_a_microbatch_of_forgotten_classes_alone_has_no_say(microbatch):
  """The model is all wrong on the class forgotten before and sure of the others.

  The gradients of the others are 1e-30 of that class's.
  """
  rng = np.random.default_rng(0)
  codes, logits = np.eye(4) + 0.2 * rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
  logits[np.arange(1, 4), np.arange(1, 4)] += [69.0, 69.3, 69.8]
  logits[0] = [0.0, 3.0, 1.0, 2.0]
  params = {
    "kernel": jnp.asarray(np.linalg.solve(codes, logits), jnp.float32),
    "bias": jnp.zeros(4),
  }
  codes = jnp.asarray(codes, jnp.float32)[:, None]
  options = {"method": mj.Perturbation(1.0, 1.0), "execution": mj.Execution(microbatch)}
  result = mj.forget(regression, params, codes, [1], forgotten=[0], **options)
  wanted, sign, _ = twin("regression", params, codes, [1], mj.Perturbation(1.0, 1.0), forgotten=[0])
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-3, atol=1e-3)
  assert np.abs(result.params["kernel"] - params["kernel"]).max() > 0.5


def test_a_callers_loss_is_used():
  params, codes = make_params("mlp"), make_codes()
  doubled = lambda logits, labels: 2 * mj.softmax_cross_entropy(logits, labels)
  plain = mj.forget(mlp, params, codes, [0], method=STRENGTH)
  # eta does not see a factor, so neither does the result ...
  assert_trees_close(
    mj.forget(mlp, params, codes, [0], method=STRENGTH, loss=doubled).params,
    host(plain.params),
    rtol=1e-5,
  )
  # ... but it sees another loss.
  squares = lambda logits, labels: jnp.sum((logits - jax.nn.one_hot(labels, 4)) ** 2, axis=-1)
  other = mj.forget(mlp, params, codes, [0], method=STRENGTH, loss=squares)
  assert not np.allclose(other.params["kernel1"], plain.params["kernel1"], rtol=1e-2)


# --- numerical edges of the method


@pytest.mark.parametrize("margin", [17.0, 60.0])
def test_confident_codes_underflow_of_squares(margin):
  """At a margin of 60, squared gradients are 1e-52: eta and params still match float64."""
  classes = 4
  rng = np.random.default_rng(0)
  margins = margin + rng.normal(size=(classes, classes)) - margin * (1 - np.eye(classes))
  params = {
    "kernel": jnp.asarray(margins, jnp.float32),
    "bias": jnp.asarray(rng.normal(size=classes) / 4, jnp.float32),
  }
  codes = jnp.eye(classes)[:, None] + jnp.asarray(
    rng.normal(size=(classes, 1, classes)) / 50, jnp.float32
  )
  result = mj.forget(regression, params, codes, [1], method=mj.Perturbation(0.1, 2.0))
  wanted, sign, eta = twin("regression", params, codes, [1], mj.Perturbation(0.1, 2.0))
  assert result.info["sign"] == sign and max(np.max(e) for e in eta.values()) > 0.1
  assert_trees_close(result.params, wanted, rtol=1e-3)
  moved = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), result.params, params
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e15])
def test_gradients_of_any_size_give_the_same_step(size):
  # loss = size * w . x: the gradients are the codes times `size`, and eta does not see it.
  codes = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, size=(3, 1, 4)), jnp.float32)
  logits = lambda w, x: jnp.stack([x @ w, -(x @ w), 0 * (x @ w)], axis=-1)
  loss = lambda logits, labels: size * logits[:, 0]
  result = mj.forget(logits, jnp.ones(4), codes, [0], method=mj.Perturbation(0.01, 10.0), loss=loss)
  squares = np.asarray(codes[:, 0], np.float64) ** 2
  change = 0.01 * squares[0] / squares[1:].mean(0)
  np.testing.assert_allclose(result.params, 1 + result.info["sign"] * change, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_params_are_accumulated_in_float32(dtype):
  params, codes = make_params("mlp"), make_codes()
  low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  upcast = lambda p, x: mlp(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), x)
  result = mj.forget(upcast, low, codes, [0], method=STRENGTH)
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(result.params))
  full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
  wanted, sign, _ = twin("mlp", full, codes, [0])
  assert result.info["sign"] == sign
  # Gradients have the dtype of the leaf: two bits are lost in the squares' ratio, none in the sums.
  assert_trees_close(
    result.params,
    wanted,
    rtol=8 * float(jnp.finfo(dtype).eps),
    atol=8 * float(jnp.finfo(dtype).eps),
  )


def test_float64_params_match_to_float64():
  with jax.enable_x64(True):
    params, codes = jax.tree.map(
      lambda x: x.astype(jnp.float64), (make_params("mlp"), make_codes(classes=4))
    )
    result = mj.forget(mlp, params, codes, [0], method=STRENGTH)
    wanted, sign, _ = twin("mlp", params, codes, [0])
    assert result.info["sign"] == sign and result.params["bias1"].dtype == jnp.float64
    assert_trees_close(result.params, wanted, rtol=1e-10)


def dead_unit_model(params, x):
  """The last weight never has a gradient; the one before only where the last feature is not 0."""
  return regression({"kernel": params["kernel"][:5], "bias": params["bias"]}, x)


def test_f_forget_and_f_remain_zero_leaves_the_weight_alone():
  params, codes = make_params("regression", features=6), make_codes()
  result = mj.forget(dead_unit_model, params, codes, [0], method=STRENGTH)
  np.testing.assert_array_equal(result.params["kernel"][5], params["kernel"][5])
  assert not np.any(result.params["kernel"][:5] == params["kernel"][:5])


def test_f_forget_zero_leaves_the_weight_alone():
  params, codes = make_params("regression"), make_codes().at[0, :, 2].set(0)
  result = mj.forget(regression, params, codes, [0], method=STRENGTH)
  np.testing.assert_array_equal(result.params["kernel"][2], params["kernel"][2])
  assert_trees_close(result.params, twin("regression", params, codes, [0])[0], rtol=1e-4, atol=1e-5)


def test_f_remain_zero_takes_the_largest_finite_ratio():
  params, codes = make_params("regression"), make_codes().at[1:, :, 2].set(0)
  result = mj.forget(regression, params, codes, [0], method=mj.Perturbation(1e-3, 1e6))
  wanted, _, eta = twin("regression", params, codes, [0], mj.Perturbation(1e-3, 1e6))
  assert np.all(eta["kernel"][2] == eta["kernel"].max())
  assert_trees_close(result.params, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_with_no_finite_ratio_is_left_alone():
  # Only the forget code reaches the weights of `extra`.
  model = lambda p, x: regression(p["base"], x) + x[:, :1] @ p["extra"]
  params = {"base": make_params("regression"), "extra": jnp.ones((1, 4))}
  codes = make_codes().at[1:, :, 0].set(0)
  result = mj.forget(model, params, codes, [0], method=STRENGTH)
  np.testing.assert_array_equal(result.params["extra"], params["extra"])


@pytest.mark.parametrize(
  ("plus", "minus", "sign"),
  [
    ((1.0, 1.0, 0.0), (1.0, 0.5, 9.0), 1),
    ((0.5, 1.0, 9.0), (1.0, 1.0, 0.0), -1),
    ((0.0, 1.0, 1.0), (1.0, 0.5, 0.0), -1),  # the sum counts, not one of the two
    ((1.0, 0.5, 1.0), (0.5, 1.0, 2.0), -1),  # a tie: the larger gap
    ((0.5, 1.0, 2.0), (1.0, 0.5, 1.0), 1),
    ((1.0, 1.0, 3.0), (1.0, 1.0, 3.0), 1),  # a tie in both: plus
    ((1.0, 1.0, math.nan), (1.0, 1.0, 3.0), 1),
    ((1.0, 1.0, 3.0), (1.0, 1.0, math.nan), 1),
    ((1.0, 1.0, 3.0), (1.0, 1.0, math.inf), -1),
    ((math.nan, math.nan, math.nan), (0.0, 0.0, -9.0), -1),  # non-finite loses
    ((0.0, 0.0, -9.0), (math.nan, math.nan, math.nan), 1),
    ((math.nan, math.nan, math.nan), (math.nan, math.nan, math.nan), 1),
  ],
)
def test_choice_of_sign(plus, minus, sign):
  as_scores = lambda values: CodeScores(*(jnp.float32(v) for v in values))
  chosen = mj.choose_sign(as_scores(plus), as_scores(minus))
  assert chosen == sign and chosen.dtype == jnp.int32 and chosen.shape == ()


def test_choice_of_sign_within_the_resolution_is_a_tie():
  as_scores = lambda *values: CodeScores(*(jnp.float32(v) for v in values))
  plus, minus = as_scores(0.6, 0.3, 0.0), as_scores(0.3, 0.6 - 1e-6, 1.0)
  assert mj.choose_sign(plus, minus) == 1 and mj.choose_sign(plus, minus, resolution=1e-5) == -1


@pytest.mark.parametrize("seed", range(4))
def test_a_tie_on_the_codes_takes_the_larger_loss_gap_then_plus(seed):
  # A step this small changes no prediction: always a tie.
  params, codes, strength = make_params("mlp", seed), make_codes(seed), mj.Perturbation(1e-3, 1e-3)
  result = mj.forget(mlp, params, codes, [0], method=strength)
  wanted, sign, _ = twin("mlp", params, codes, [0], strength)
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-5, atol=1e-6)
  assert mj.forget(mlp, params, codes, [0], method=mj.Perturbation(0.0, 1.0)).info["sign"] == 1


def test_a_candidate_with_non_finite_logits_or_params_loses():
  codes, first_logit = (
    jnp.ones((2, 1, 1)),
    lambda logits, labels: logits[:, 0],
  )  # eta = 1: w = 1 +- 0.5
  above = lambda w, x: jnp.concatenate([x * w, jnp.where(w > 1.2, jnp.nan, 0.0) * x], axis=-1)
  below = lambda w, x: jnp.concatenate([x * w, jnp.where(w < 0.8, jnp.inf, 0.0) * x], axis=-1)
  for model, sign in ((above, -1), (below, 1)):
    result = mj.forget(
      model, jnp.ones((1, 1)), codes, [0], method=mj.Perturbation(0.5, 0.5), loss=first_logit
    )
    assert result.info["sign"] == sign
    np.testing.assert_allclose(result.params, [[1 + sign * 0.5]], rtol=1e-6)
  # Plus is inf in float16, and the logits do not show it: a tie, which would go to plus.
  hidden = lambda w, x: x * jnp.minimum(w.astype(jnp.float32), 7e4) * 1e-4 + jnp.array([[0.0, 1.0]])
  params = jnp.full((1, 1), 6.5e4, jnp.float16)
  result = mj.forget(hidden, params, codes, [0], method=mj.Perturbation(1e4, 1e4), loss=first_logit)
  assert result.info["sign"] == -1 and np.isfinite(result.params).all()


def test_both_candidates_non_finite_asks_for_a_smaller_strength():
  model = lambda w, x: jnp.concatenate(
    [x * w, jnp.where(jnp.abs(w - 1) > 0.1, jnp.nan, 0.0) * x], axis=-1
  )
  with pytest.raises(ValueError, match=r"method: Perturbation\(lambda1=0.5.*use a smaller"):
    first_logit = lambda logits, labels: logits[:, 0]
    mj.forget(
      model,
      jnp.ones((1, 1)),
      jnp.ones((2, 1, 1)),
      [0],
      method=mj.Perturbation(0.5, 0.5),
      loss=first_logit,
    )


# --- structure: layers, masks, trees


def test_stacked_and_unrolled_models_forget_identically():
  rng = np.random.default_rng(0)
  kernels = jnp.asarray(rng.normal(size=(3, 5, 5)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
  codes = make_codes()

  def unrolled(params, x):
    for i in range(3):
      x = jnp.tanh(x @ params[f"layer{i}"])
    return x @ params["head"]

  def scanned(params, x):
    return (
      jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), x, params["layers"])[0]
      @ params["head"]
    )

  def transposed(params, x):
    return scanned({"layers": jnp.moveaxis(params["layers"], -1, 0), "head": params["head"]}, x)

  strength = mj.Perturbation(0.05, 0.5)
  flat = mj.forget(
    unrolled,
    {f"layer{i}": kernels[i] for i in range(3)} | {"head": head},
    codes,
    [0],
    method=strength,
  )
  wanted = jnp.stack([flat.params[f"layer{i}"] for i in range(3)])
  for axis, model, stacked in (
    (0, scanned, kernels),
    (-1, transposed, jnp.moveaxis(kernels, 0, -1)),
  ):
    layer_axis = {"layers": axis, "head": None}
    result = mj.forget(
      model, {"layers": stacked, "head": head}, codes, [0], method=strength, layer_axis=layer_axis
    )
    assert result.info["sign"] == flat.info["sign"]
    np.testing.assert_allclose(
      jnp.moveaxis(result.params["layers"], axis, 0), wanted, rtol=1e-4, atol=1e-6
    )
  blind = mj.forget(scanned, {"layers": kernels, "head": head}, codes, [0], method=strength)
  assert not np.allclose(blind.params["layers"], wanted, rtol=1e-2)


def test_layer_axis_matches_the_reference():
  params, codes = make_params("regression"), make_codes()
  strength, axes = mj.Perturbation(1.0, 0.1), {"kernel": 1, "bias": None}
  result = mj.forget(regression, params, codes, [2], method=strength, layer_axis=axes)
  wanted, sign, _ = twin("regression", params, codes, [2], strength, layer_axis=axes)
  assert result.info["sign"] == sign
  assert_trees_close(result.params, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "layer_axis", [None, {"kernel": 1, "bias": 0}, {"kernel": 1, "bias": None}]
)
def test_mask_leaves_a_leaf_as_it_is(layer_axis):
  params, codes = make_params("regression"), make_codes()
  options = {"method": mj.Perturbation(0.1, 0.2), "layer_axis": layer_axis}
  result = mj.forget(
    regression, params, codes, [0], mask={"kernel": True, "bias": False}, **options
  )
  np.testing.assert_array_equal(result.params["bias"], params["bias"])
  assert np.mean(np.asarray(result.params["kernel"] != params["kernel"])) > 0.5
  # The bias is closed over instead: the same kernel comes out.
  alone = mj.forget(
    lambda kernel, x: regression({"kernel": kernel, "bias": params["bias"]}, x),
    params["kernel"],
    codes,
    [0],
    method=options["method"],
    layer_axis=layer_axis and layer_axis["kernel"],
  )
  np.testing.assert_allclose(result.params["kernel"], alone.params, rtol=1e-5)


def test_what_mask_leaves_out_may_be_no_array_at_all():
  params, codes = make_params("regression"), make_codes()
  mixed = {"net": params, "depth": 3, "table": jnp.arange(4), "none": None}
  result = mj.forget(
    lambda p, x: regression(p["net"], x), mixed, codes, [0], method=STRENGTH,
    mask={"net": True, "depth": False, "table": False, "none": None},
  )  # fmt: skip
  assert (
    result.params["depth"] == 3
    and isinstance(result.params["depth"], int)
    and result.params["none"] is None
  )
  assert result.params["table"].dtype == jnp.int32
  assert_trees_close(
    result.params["net"], twin("regression", params, codes, [0])[0], rtol=1e-4, atol=1e-5
  )


def test_result_keeps_structure_shapes_and_dtypes_and_the_params_given_are_not_modified():
  params = (
    make_params("regression"),
    [jnp.float32(2.0)],
    None,
    {"half": jnp.ones(4, jnp.bfloat16)},
  )
  model = lambda p, x: p[1][0] * regression(p[0], x) + p[3]["half"].astype(jnp.float32)[None]
  before = host(params)
  result = mj.forget(model, params, make_codes(), [0], method=STRENGTH)
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
  assert jax.tree.all(jax.tree.map(same, result.params, params))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == b)), params, before))
  from_numpy = mj.forget(model, before, np.asarray(make_codes(), np.float64), [0], method=STRENGTH)
  assert_trees_close(from_numpy.params, host(result.params), rtol=1e-6)


# --- jit, vmap, execution


@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_execution_changes_rounding_only(microbatch):
  params, codes = make_params("mlp"), make_codes(per_class=2)
  plain = mj.forget(mlp, params, codes, [1], method=STRENGTH)
  chunked = mj.forget(mlp, params, codes, [1], method=STRENGTH, execution=mj.Execution(microbatch))
  assert (chunked.info["sign"], chunked.code_retain_accuracy, chunked.code_forget_error) == (
    plain.info["sign"],
    plain.code_retain_accuracy,
    plain.code_forget_error,
  )
  assert_trees_close(chunked.params, host(plain.params), rtol=1e-4, atol=1e-6)


def test_forget_step_equals_forget():
  params, codes = make_params("mlp"), make_codes()
  result = mj.forget(mlp, params, codes, [1, 2], method=STRENGTH, forgotten=[3])
  moved, info = mj.forget_step(mlp, params, codes, *masks([1, 2], 4, [3]), STRENGTH)
  assert_trees_close(moved, host(result.params), rtol=1e-5, atol=1e-6)
  assert (
    info.info["sign"] == result.info["sign"]
    and info.code_retain_accuracy == result.code_retain_accuracy
  )
  assert info.code_forget_error == result.code_forget_error and info.method == STRENGTH


def test_vmap_over_classes_and_strengths_equals_one_by_one():
  params, codes = make_params("mlp"), make_codes()
  forget = jnp.eye(4, dtype=bool)
  strengths = mj.Perturbation(jnp.array([0.01, 0.3, 1.0]), jnp.array([1.0, 0.5, 9.0]))
  step = lambda side, strength: mj.forget_step(mlp, params, codes, side, ~side, strength)
  table, info = jax.jit(jax.vmap(jax.vmap(step, in_axes=(None, 0)), in_axes=(0, None)))(
    forget, strengths
  )
  assert info.info["sign"].shape == (4, 3)
  for c in range(4):
    for s in range(3):
      strength = mj.Perturbation(float(strengths.lambda1[s]), float(strengths.lambda2[s]))
      one = mj.forget(mlp, params, codes, [c], method=strength)
      assert info.info["sign"][c, s] == one.info["sign"] and info.code_retain_accuracy[
        c, s
      ] == pytest.approx(one.code_retain_accuracy)
      assert_trees_close(
        jax.tree.map(lambda leaf, c=c, s=s: leaf[c, s], table),
        host(one.params),
        rtol=1e-4,
        atol=1e-5,
      )


def counting(logits_fn):
  """The same function, and a list that grows each time Python calls it."""
  calls = []

  def counted(params, inputs):
    calls.append(1)
    return logits_fn(params, inputs)

  return counted, calls


def test_a_traced_step_serves_all_classes_and_strengths():
  params, codes = make_params("mlp"), make_codes()
  logits, calls = counting(mlp)
  step = jax.jit(
    lambda params, forget, remain, method: mj.forget_step(
      logits, params, codes, forget, remain, method
    )
  )
  step(params, *masks([0], 4), mj.Perturbation(1e-3, 1.0))
  calls.clear()
  step(params, *masks([1, 2], 4), mj.Perturbation(1e-2, 5.0))
  step(jax.tree.map(lambda leaf: leaf + 1, params), *masks([3], 4, [0]), mj.Perturbation(1.0, 1.0))
  assert not calls


def convnet(params, inputs):
  images = inputs.reshape(-1, 4, 4, 1)
  numbers = ("NHWC", "HWIO", "NHWC")
  hidden = jax.lax.conv_general_dilated(
    images, params["conv"], (1, 1), "SAME", dimension_numbers=numbers
  )
  return jax.nn.relu(hidden).reshape(len(inputs), -1) @ params["head"]


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_cold_forget_traces_the_model_four_times_and_compiles_two_programs_of_it(model):
  if model == "mlp":
    logits, params, codes = mlp, make_params("mlp"), make_codes()
  else:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"conv": draw(3, 3, 1, 2), "head": draw(32, 4)}
    logits, codes = convnet, make_codes(features=16)
  logits, calls = counting(logits)
  with compiled_programs() as programs:
    mj.forget(logits, params, codes, [0], method=mj.Perturbation(1e-3, 1.0))
  assert 1 <= len(calls) <= 4
  with_the_model = [name for name in programs if name.endswith("_program")]
  assert sorted(with_the_model) == ["fisher_program", "logits_program"]
  calls.clear()
  with compiled_programs() as programs:
    mj.forget(logits, params, codes, [1, 2], method=mj.Perturbation(1e-2, 5.0), forgotten=[0])
  assert not calls and not programs


def model_with_state():
  """(params, state, apply), the state standing for running statistics."""
  return make_params("mlp"), {"mean": jnp.full(5, 0.1)}


def apply_with_state(params, state, inputs, train):
  return mlp(params, inputs - state["mean"][None]), state


def bound(state):
  model = Model(None, apply_with_state, None, None, ("kernel2",))
  return model.logits_fn(state)


def test_functions_of_the_same_state_are_equal_and_another_state_compiles_nothing():
  params, state = model_with_state()
  codes = make_codes()
  first = bound(state)
  assert first == bound(state) and hash(first) == hash(bound(state))
  other = {"mean": jnp.full(5, 0.3)}
  assert first != bound(other)
  result = mj.forget(first, params, codes, [0], method=STRENGTH)
  with compiled_programs() as programs:
    again = mj.forget(bound(state), params, codes, [1], method=STRENGTH)
    changed = mj.forget(bound(other), params, codes, [0], method=STRENGTH)
  assert not programs
  plain = mj.forget(
    lambda p, x: apply_with_state(p, other, x, False)[0], params, codes, [0], method=STRENGTH
  )
  assert_trees_close(changed.params, host(plain.params), rtol=1e-5)
  assert not np.allclose(changed.params["kernel1"], result.params["kernel1"], rtol=1e-3)
  assert not np.allclose(again.params["kernel1"], result.params["kernel1"], rtol=1e-3)


def test_no_dropped_state_is_kept_alive():
  params, state = model_with_state()
  mj.forget(bound(state), params, make_codes(), [0], method=STRENGTH)
  alive = weakref.ref(state["mean"])
  del state
  gc.collect()
  assert alive() is None


@pytest.mark.parametrize("concrete_masks", [True, False])
def test_forget_step_in_a_jit_that_closes_over_concrete_params_codes_and_masks(concrete_masks):
  params, codes = make_params("mlp"), make_codes()
  sides = masks([0], 4)
  if concrete_masks:
    run = jax.jit(lambda strength: mj.forget_step(mlp, params, codes, *sides, strength))
    moved, _ = run(STRENGTH)
  else:
    run = jax.jit(lambda forget: mj.forget_step(mlp, params, codes, forget, ~forget, STRENGTH))
    moved, _ = run(sides[0])
  assert_trees_close(
    moved, host(mj.forget(mlp, params, codes, [0], method=STRENGTH).params), rtol=1e-5, atol=1e-6
  )


def test_a_traced_mask_without_any_class_changes_nothing_and_scores_nan():
  params, codes = make_params("mlp"), make_codes()
  nobody, everybody = jnp.zeros(4, bool), jnp.ones(4, bool)
  step = jax.jit(
    lambda forget, remain: mj.forget_step(mlp, params, codes, forget, remain, STRENGTH)
  )
  for forget, remain in ((nobody, everybody), (everybody, nobody)):
    moved, info = step(forget, remain)
    assert_trees_close(moved, host(params), rtol=0)
    assert np.isnan(info.code_forget_error) == (forget is nobody)
    assert np.isnan(info.code_retain_accuracy) == (remain is nobody)


def test_traced_nan_in_params_gives_nan_scores():
  params, codes = make_params("mlp"), make_codes()
  step = jax.jit(lambda params: mj.forget_step(mlp, params, codes, *masks([0], 4), STRENGTH))
  _, info = step(params | {"bias2": params["bias2"].at[0].set(jnp.nan)})
  assert np.isnan(info.code_retain_accuracy) and np.isnan(info.code_forget_error)


# --- sharding


@pytest.mark.parametrize(
  ("devices", "axis_type", "spec"),
  [
    pytest.param(1, "Auto", ("data",), marks=pytest.mark.long),
    (2, "Auto", ()),
    pytest.param(2, "Auto", ("data",), marks=pytest.mark.long),
    pytest.param(4, "Auto", ("data",), marks=pytest.mark.long),
    (8, "Auto", ("data",)),
    (4, "Explicit", ("data",)),
  ],
)
def test_any_device_count_gives_the_same_result_and_keeps_shardings(devices, axis_type, spec):
  params, codes = make_params("mlp", features=8, hidden=8, classes=4), make_codes(features=8)
  single = mj.forget(mlp, params, codes, [0], method=STRENGTH)
  other = mj.forget(mlp, params, codes, [1], method=STRENGTH)
  assert not np.allclose(single.params["kernel1"], other.params["kernel1"], rtol=1e-2)
  mesh = cpu_mesh(devices, axis_type)
  placed = place(params, mesh) | place(
    {"kernel1": params["kernel1"], "kernel2": params["kernel2"]}, mesh, *spec
  )
  result = mj.forget(mlp, placed, codes, [0], method=STRENGTH)
  assert result.info["sign"] == single.info["sign"]
  assert_trees_close(result.params, host(single.params), rtol=1e-4, atol=1e-5)
  assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, result.params, placed))


def test_codes_split_over_an_explicit_mesh_are_judged_without_a_loop(monkeypatch):
  params, codes, sides = make_params("mlp"), make_codes(), masks([0], 4)
  single = mj.forget(mlp, params, codes, [0], method=STRENGTH)
  monkeypatch.setattr(passes, "_PASS_BYTES", 1)  # a loop over single codes, if there were one
  mesh = cpu_mesh(4, "Explicit")
  step = jax.jit(lambda params, codes: mj.forget_step(mlp, params, codes, *sides, STRENGTH)[0])
  with jax.set_mesh(mesh):
    moved = step(place(params, mesh), place(codes, mesh, "data"))
  assert_trees_close(moved, host(single.params), rtol=1e-4, atol=1e-5)


def test_forget_step_inside_shard_map():
  params, codes = make_params("mlp"), make_codes()
  P = jax.sharding.PartitionSpec
  step = lambda params, codes: mj.forget_step(
    mlp, params, codes, *masks([0], 4), STRENGTH, execution=mj.Execution(3)
  )[0]
  mapped = jax.shard_map(step, mesh=cpu_mesh(4), in_specs=(P(), P()), out_specs=P())
  single = mj.forget(mlp, params, codes, [0], method=STRENGTH)
  assert_trees_close(jax.jit(mapped)(params, codes), host(single.params), rtol=1e-4, atol=1e-5)


def test_classes_one_to_a_device_inside_shard_map():
  # The masks vary from device to device, the params do not.
  params, codes = make_params("mlp"), make_codes()
  P = jax.sharding.PartitionSpec
  step = lambda forget: jax.tree.map(
    lambda leaf: leaf[None],
    mj.forget_step(mlp, params, codes, forget[0], ~forget[0], STRENGTH, execution=mj.Execution(3))[
      0
    ],
  )
  mapped = jax.shard_map(step, mesh=cpu_mesh(4), in_specs=P("data"), out_specs=P("data"))
  table = jax.jit(mapped)(jnp.eye(4, dtype=bool))
  for c in range(4):
    single = mj.forget(mlp, params, codes, [c], method=STRENGTH)
    assert_trees_close(
      jax.tree.map(lambda leaf, c=c: leaf[c], table), host(single.params), rtol=1e-4, atol=1e-5
    )


# --- models of every make


def hand_written(params):
  return mlp, params, lambda moved: moved


def linen(params):
  nn = pytest.importorskip("flax.linen")

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      hidden = nn.sigmoid(nn.Dense(6)(x))
      return nn.Dense(4)(hidden)

  net = Net()
  tree = {
    f"Dense_{i}": {"kernel": params[f"kernel{i + 1}"], "bias": params[f"bias{i + 1}"]}
    for i in range(2)
  }
  return (
    (lambda p, x: net.apply({"params": p}, x)),
    tree,
    lambda p: {
      f"{leaf}{i + 1}": p[f"Dense_{i}"][leaf] for i in range(2) for leaf in ("kernel", "bias")
    },
  )


def nnx(params):
  nnx = pytest.importorskip("flax.nnx")

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
      return self.second(nnx.sigmoid(self.first(x)))

  graphdef, state = nnx.split(Net(nnx.Rngs(0)))

  def logits(pure, x):
    fresh = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(fresh, pure)
    return nnx.merge(graphdef, fresh)(x)

  tree = {
    name: {"kernel": params[f"kernel{i}"], "bias": params[f"bias{i}"]}
    for i, name in ((1, "first"), (2, "second"))
  }
  return (
    logits,
    tree,
    lambda p: {
      f"{leaf}{i}": p[name][leaf]
      for i, name in ((1, "first"), (2, "second"))
      for leaf in ("kernel", "bias")
    },
  )


def equinox(params):
  eqx = pytest.importorskip("equinox")
  net = eqx.nn.MLP(5, 4, 6, 1, activation=jax.nn.sigmoid, key=jax.random.key(0))
  weights = lambda net: (
    net.layers[0].weight,
    net.layers[0].bias,
    net.layers[1].weight,
    net.layers[1].bias,
  )
  given_weights = (params["kernel1"].T, params["bias1"], params["kernel2"].T, params["bias2"])
  arrays, static = eqx.partition(eqx.tree_at(weights, net, given_weights), eqx.is_inexact_array)

  def back(moved):
    kernel1, bias1, kernel2, bias2 = weights(moved)
    return {"kernel1": kernel1.T, "bias1": bias1, "kernel2": kernel2.T, "bias2": bias2}

  return (lambda p, x: jax.vmap(eqx.combine(p, static))(x)), arrays, back


def haiku(params):
  hk = pytest.importorskip("haiku")
  net = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([6, 4], activation=jax.nn.sigmoid)(x))
  )
  tree = {
    f"mlp/~/linear_{i}": {"w": params[f"kernel{i + 1}"], "b": params[f"bias{i + 1}"]}
    for i in range(2)
  }
  names = {"kernel": "w", "bias": "b"}
  return (
    net.apply,
    tree,
    lambda p: {
      f"{leaf}{i + 1}": p[f"mlp/~/linear_{i}"][names[leaf]] for i in range(2) for leaf in names
    },
  )


@pytest.mark.lenient_numerics
@pytest.mark.parametrize("make", [hand_written, linen, nnx, equinox, haiku])
def test_models_of_every_make_forget_alike(make):
  params, codes = make_params("mlp"), make_codes()
  logits_fn, tree, back = make(params)
  result = mj.forget(logits_fn, tree, codes, [1], method=STRENGTH)
  assert jax.tree.structure(result.params) == jax.tree.structure(tree)
  wanted, sign, _ = twin("mlp", params, codes, [1])
  assert result.info["sign"] == sign
  assert_trees_close(back(result.params), wanted, rtol=1e-4, atol=1e-5)
  labels = jnp.arange(4)
  scores = mj.evaluate(logits_fn, result.params, [(codes[:, 0], labels)], classes=[1])
  assert (scores.retain_accuracy, scores.forget_error) == (
    pytest.approx(result.code_retain_accuracy),
    pytest.approx(result.code_forget_error),
  )


def test_forget_works_without_jit():
  """With a model of one leaf: each operation is a program of its own."""
  params, codes = make_params("regression")["kernel"], make_codes()
  logits_fn = lambda kernel, x: x @ kernel
  compiled = mj.forget(logits_fn, params, codes, [0], method=STRENGTH)
  with jax.disable_jit():
    eager = mj.forget(logits_fn, params, codes, [0], method=STRENGTH)
  assert_trees_close(eager.params, host(compiled.params), rtol=1e-5, atol=1e-6)


def nnx_in_training_mode(kind):
  """A model whose owner forgot `model.eval()`."""
  nnx = pytest.importorskip("flax.nnx")

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
      self.norm, self.drop = nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      hidden = self.first(x)
      hidden = self.drop(hidden) if kind == "dropout" else self.norm(hidden)
      return self.second(jax.nn.sigmoid(hidden))

  model = Net(nnx.Rngs(0))
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  if kind == "closed over":

    def logits(pure, x):
      nnx.update(model, pure)
      return model(x)
  else:
    logits = lambda pure, x: nnx.merge(graph, pure, rest)(x)
  return logits, params


@pytest.mark.lenient_numerics
@pytest.mark.parametrize("kind", ["batch norm", "dropout", "closed over"])
def test_a_model_left_in_training_mode_is_told_so(kind):
  logits, params = nnx_in_training_mode(kind)
  with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)") as told:
    mj.forget(logits, params, make_codes(), [0], method=STRENGTH)
  assert "Pass the codes" not in str(told.value)


def test_codes_that_say_nothing_are_a_warning():
  codes = jnp.eye(4)[:, None]
  known = {"kernel": 5 * jnp.eye(4), "bias": jnp.zeros(4)}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    mj.forget(regression, known, codes, [0], method=mj.Perturbation(1e-3, 1e-3))
  with pytest.warns(UserWarning, match=r"0% of the codes of the kept .*chance \(25%\).*Pass the"):
    mj.forget(regression, known, codes[::-1], [0], method=mj.Perturbation(1e-3, 1e-3))


# --- searching a strength


GRID = mj.Perturbation(
  np.float32([1e-6, 1e-3, 0.1, 3.0, 0.1, 1e-3]), np.float32([5.0, 2.0, 2.0, 8.0, 0.5, 2.0])
)


def knowing(codes):
  """Params of a softmax regression that knows its codes by heart."""
  return {"kernel": codes[:, 0].T, "bias": jnp.zeros(len(codes))}


def one_by_one(params, codes, forget, remain):
  """Per strength: A_R + E_F on the codes, how far the weights moved, and the params."""
  found = []
  for pair in zip(GRID.lambda1, GRID.lambda2, strict=True):
    moved, info = mj.forget_step(
      regression, params, codes, forget, remain, mj.Perturbation(*map(float, pair))
    )
    distance = sum(float(jnp.sum((moved[name] - params[name]) ** 2)) for name in params)
    found.append((float(info.code_retain_accuracy + info.code_forget_error), distance, host(moved)))
  return found


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_keeps_the_weakest_of_the_best(seed, traced):
  codes = make_codes(seed)
  params = knowing(codes)
  forget, remain = masks([seed % 4], 4)
  candidates = one_by_one(params, codes, forget, remain)
  step = lambda grid: mj.forget_step(regression, params, codes, forget, remain, grid)
  moved, info = (jax.jit(step) if traced else step)(GRID)
  best = max(score for score, _, _ in candidates)
  weakest = min((c for c in candidates if c[0] > best - 1e-3), key=lambda c: c[1])
  assert_trees_close(moved, weakest[2], rtol=1e-4, atol=1e-6)
  assert float(info.code_retain_accuracy + info.code_forget_error) == pytest.approx(best)
  tried = list(zip(GRID.lambda1, GRID.lambda2, strict=True))
  assert (info.method.lambda1, info.method.lambda2) in tried


def test_the_seeds_of_the_search_tell_its_rules_apart():
  """Somewhere a tie has to be broken, and somewhere the best is not the weakest of all."""
  ties = weak = 0
  for seed in range(4):
    candidates = one_by_one(knowing(make_codes(seed)), make_codes(seed), *masks([seed % 4], 4))
    best = max(candidates, key=lambda c: c[0])[0]
    ties += sum(c[0] > best - 1e-3 for c in candidates) > 1
    weak += min(candidates, key=lambda c: c[1])[0] < best - 1e-3
  assert ties and weak


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 2), (2, 2)), ((0,), (0,)), ((2,), ())])
def test_strengths_that_are_no_pairs_are_refused(shapes):
  with pytest.raises(ValueError, match="expected two numbers, or two arrays"):
    mj.Perturbation(*(np.ones(shape, np.float32) for shape in shapes))
