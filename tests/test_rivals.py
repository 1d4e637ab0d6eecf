"""Every rival passes one protocol, and each equals its formula in NumPy or a known answer."""

from __future__ import annotations

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_rivals as twin
from toys import assert_trees_close, host, make_params, mlp, regression

from mnemonic_jax.evaluation import Scores
from mnemonic_jax.rivals import (
  RIVALS,
  NotApplicable,
  boundary_shrink,
  damp,
  descent,
  kernels,
  kodge,
  lwsf,
  make_request,
  model,
  random_labels,
  salun,
  search,
  sfdn,
  synthetic_embeddings,
  unsir,
)
from mnemonic_jax.rivals.request import ALL, NOTHING
from mnemonic_jax.training import epoch_rows

CLASSES, FEATURES, EACH = 4, 5, 12
KEY = jax.random.key(3)
FRESH = make_params("mlp", seed=9)


def clusters():
  """Twelve examples of each class around its centre, in an order of no meaning; and the centres."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(CLASSES, FEATURES)) * 2
  labels = rng.permutation(np.repeat(np.arange(CLASSES, dtype=np.int32), EACH))
  inputs = centres[labels] + rng.normal(size=(len(labels), FEATURES))
  return inputs.astype(np.float32), labels, centres.astype(np.float32)[:, None]


INPUTS, LABELS, CODES = clusters()


@functools.cache
def trained():
  """Params that know the classes and the codes."""
  request = make_request(
    mlp, make_params("mlp"), (INPUTS, LABELS), key=KEY, epochs=30, batch_size=16
  )
  return RIVALS["fine_tune"].forget_fn(request, None, (), 0.3)


def request_of(classes=(1,), params=None, **settings):
  """A request to forget classes of the trained model."""
  gone = np.isin(LABELS, classes)
  sides = {"kept": (INPUTS[~gone], LABELS[~gone]), "forgotten": (INPUTS[gone], LABELS[gone])}
  defaults = {"key": KEY, "epochs": 2, "batch_size": 8, "fresh": FRESH, "codes": CODES, **sides}
  return make_request(settings.pop("logits_fn", mlp), params or trained(), **defaults | settings)


def forgotten(name, strength, classes=(1,), **settings):
  request = request_of(classes, **settings)
  rival = RIVALS[name]
  return request, rival.forget(request, rival.prepare(request), classes, strength)


def batches(request, examples, number, residual):
  """The batches of an epoch, as the twin takes them; residual(label or row) of each example."""
  count = len(examples[0])
  order = epoch_rows(request.key, number, count, min(request.batch_size, count))
  rows = [np.asarray(rows) for rows in order]
  return [(examples[0][some], [residual(*(x[i] for x in examples[1:])) for i in some])
          for some in rows]  # fmt: skip


# The protocol ------------------------------------------------------------------------------------


def applicable(name):
  """The strongest strength for the toy: one stage lies before its head."""
  return RIVALS[name].strengths[-1]


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_changes_weights_only_and_says_the_same_twice(name):
  rival, request = RIVALS[name], request_of()
  before = host(request.params)
  state = rival.prepare(request)
  found = rival.forget(request, state, [1], applicable(name))
  layout = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert layout(found) == layout(request.params)
  assert jax.tree.all(jax.tree.map(np.array_equal, host(request.params), before))
  assert not jax.tree.all(jax.tree.map(np.array_equal, host(found), before))
  again = rival.forget(request_of(), rival.prepare(request), [1], applicable(name))
  assert jax.tree.all(jax.tree.map(np.array_equal, host(found), host(again)))
  assert rival.training_mode(request) is (False if rival.trains else None)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_refuses_what_belongs_to_another_model(name):
  rival, request = RIVALS[name], request_of()
  other = request._replace(params={**request.params, "bias3": jnp.zeros(1)})
  state = rival.prepare(request)
  with pytest.raises(ValueError, match=f"state: got one of {name}"):
    rival.forget(other, state, [1], applicable(name))
  with pytest.raises(ValueError, match="forgotten: holds examples of classes"):
    rival.forget(request, state, [2], applicable(name))


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_declares_itself(name):
  rival = RIVALS[name]
  assert rival.name == name and rival.source and isinstance(rival.reconstruction, bool)
  assert 1 <= len(rival.strengths) <= 8
  assert rival.default is None or rival.default in rival.strengths
  assert bool(rival.reads.times) == (rival.reads.forget != NOTHING) or name == "lwsf"


@pytest.mark.parametrize("name", [n for n in RIVALS if not RIVALS[n].reads.optional])
def test_a_rival_without_its_data_does_not_apply(name):
  rival = RIVALS[name]
  request = request_of(kept=None, forgotten=None, shape=(FEATURES,))
  if (rival.reads.forget, rival.reads.prepare) == (NOTHING, NOTHING):
    assert rival.forget(request, rival.prepare(request), [1], applicable(name))
    return
  with pytest.raises(NotApplicable, match="there are none to read"):
    rival.forget(request, rival.prepare(request), [1], applicable(name))


def test_a_request_is_checked():
  arrays = INPUTS, LABELS
  with pytest.raises(ValueError, match="Expected the params of this model"):
    make_request(mlp, make_params("regression"), arrays, key=KEY)
  with pytest.raises(ValueError, match="together, or none"):
    make_request(mlp, trained(), arrays, key=KEY, train_fn=mlp)
  with pytest.raises(TypeError, match="expected floats"):
    make_request(mlp, trained(), (LABELS[:, None], LABELS), key=KEY)
  with pytest.raises(ValueError, match="or `shape`"):
    make_request(mlp, trained(), key=KEY)
  with pytest.raises(ValueError, match=r"values from 0 to 9"):
    make_request(mlp, trained(), (INPUTS, LABELS + 6 * (LABELS == 3)), key=KEY)
  in_batches = make_request(mlp, trained(), [(INPUTS[:5], LABELS[:5]), (INPUTS[5:], LABELS[5:])],
                            key=KEY)  # fmt: skip
  assert np.array_equal(in_batches.kept.inputs, INPUTS)
  masked = make_request(mlp, trained(), [(INPUTS, LABELS, np.arange(len(LABELS)) < 5)], key=KEY)
  assert np.array_equal(masked.kept.inputs, INPUTS[:5]), "padding counts nowhere"


# Training ----------------------------------------------------------------------------------------


def test_fine_tuning_and_ascent_are_those_of_the_twin():
  request, found = forgotten("fine_tune", 0.1)
  steps = [b for n in range(2) for b in batches(request, request.kept, n, twin.entropy)]
  assert_trees_close(found, twin.sgd(host(trained()), steps, 0.1), rtol=1e-3, atol=1e-5)
  request, found = forgotten("gradient_ascent", 0.03)
  up = lambda label: twin.entropy(label, -1.0)
  steps = [b for n in range(2) for b in batches(request, request.forgotten, n, up)]
  assert_trees_close(found, twin.sgd(host(trained()), steps, 0.03), rtol=1e-3, atol=1e-5)


def test_random_labels_are_of_kept_classes_and_salun_moves_half_of_the_weights():
  classes = (1, 2)
  request, found = forgotten("random_labels", 0.03, classes)
  examples = random_labels.relabelled(request, classes)
  assert set(examples.labels.tolist()) == {0, 3} and len(examples.labels) == len(LABELS)
  steps = [b for n in range(2) for b in batches(request, examples, n, twin.entropy)]
  assert_trees_close(found, twin.sgd(host(trained()), steps, 0.03), rtol=1e-3, atol=1e-5)
  mean = dict.fromkeys(trained(), 0.0)
  for x, label in zip(*request.forgotten, strict=True):
    for name, g in reference.mlp_gradient(host(trained()), x.astype(np.float64), label).items():
      mean[name] = mean[name] + g / len(request.forgotten.labels)
  median = np.median(np.concatenate([np.abs(g).ravel() for g in mean.values()]))
  moves = {name: np.abs(g) >= median for name, g in mean.items()}
  salient = salun.salient(descent.gradient(request, request.forgotten))
  assert_trees_close(dict(zip(sorted(moves), salient, strict=True)), moves)
  _, found = forgotten("salun", 0.03, classes)
  wanted = twin.sgd(host(trained()), steps, 0.03, moves)
  assert_trees_close(found, wanted, rtol=1e-3, atol=1e-5)
  still = [np.array_equal(found[n][~moves[n]], trained()[n][~moves[n]]) for n in moves]
  assert all(still) and 0.4 < np.mean(np.concatenate([m.ravel() for m in moves.values()])) < 0.6


def test_scrub_is_that_of_the_twin():
  """Two epochs: away and towards, then towards alone."""
  request, found = forgotten("scrub", 0.03)
  old = host(trained())
  teacher = lambda x: np.array([reference.mlp_logits(old, one) for one in x.astype(np.float64)])
  away = lambda _, t: twin.divergence(t, -1.0)

  def towards(label, t):
    apart, wrong = twin.divergence(t, 0.5), twin.entropy(label)
    return lambda logits: apart(logits) + wrong(logits)

  sides = [(*side, teacher(side.inputs)) for side in (request.forgotten, request.kept)]
  steps = batches(request, sides[0], 0, away)
  steps += batches(request, sides[1], 1, towards) + batches(request, sides[1], 2, towards)
  assert_trees_close(found, twin.sgd(old, steps, 0.03), rtol=1e-3, atol=1e-5)


def test_boundary_shrink_takes_the_class_behind_the_boundary():
  """In a linear model the gradient by the input is K (p - one_hot)."""
  classes, params = (1, 2), make_params("regression")
  request = request_of(classes, params, logits_fn=regression, fresh=None)
  found = boundary_shrink.nearest(request, request.forgotten, classes)
  kernel, wanted = np.asarray(params["kernel"], np.float64), []
  for x, label in zip(*request.forgotten, strict=True):
    slope = kernel @ reference.residual(reference.regression_logits(host(params), x), label)
    moved = x + 0.1 * np.ptp(request.forgotten.inputs) * np.sign(slope)
    logits = reference.regression_logits(host(params), moved)
    wanted.append(0 if logits[0] > logits[3] else 3)
  assert found.tolist() == wanted and len(set(wanted)) == 2
  request, found = forgotten("boundary_shrink", 0.03)
  labels = boundary_shrink.nearest(request, request.forgotten, (1,))
  examples = request.forgotten.inputs, labels
  steps = [b for n in range(2) for b in batches(request, examples, n, twin.entropy)]
  assert_trees_close(found, twin.sgd(host(trained()), steps, 0.03), rtol=1e-3, atol=1e-5)


def test_unsir_noise_is_that_of_the_twin_and_is_not_taken_for_the_class():
  request = request_of()
  found, old = np.asarray(unsir.noise(request, 1)), host(trained())
  start = jax.random.normal(jax.random.fold_in(KEY, 1), found.shape)[0]

  def slope(x):
    r = reference.residual(reference.mlp_logits(old, x), 1)
    hidden = 1 / (1 + np.exp(-(x @ old["kernel1"] + old["bias1"])))
    wrong = old["kernel1"] @ (hidden * (1 - hidden) * (old["kernel2"] @ r))
    return 0.2 * x - wrong

  # Adam does not see the factor 1/128 of the mean, but for its epsilon.
  assert_trees_close(found[0], twin.adam(start, slope, 40, 0.1), rtol=1e-2, atol=1e-2)
  logits = np.asarray(mlp(trained(), found))
  assert np.mean(logits.argmax(1) == 1) < 0.1
  kept = unsir.some(request)
  assert sorted(kept.labels.tolist()) == sorted(request.kept.labels.tolist())


def test_lwsf_is_that_of_the_twin_and_needs_codes():
  request, old = request_of(epochs=1), host(trained())
  fisher = reference.fisher(reference.mlp_gradient, old, INPUTS, LABELS)
  assert_trees_close(lwsf.prepare(request), fisher, rtol=1e-3, atol=1e-7)
  fisher = {name: 0.02 + 0.1 * fisher[name] for name in old}
  found = lwsf.forget(request, fisher, (1,), 0.003)
  anchor = lambda now: {name: 100 * fisher[name] * (now[name] - old[name]) for name in old}
  kept = np.array([0, 2, 3])
  ten = lambda label: twin.entropy(label, 10.0)
  steps = [b for n in range(100) for b in batches(request, (CODES[kept, 0], kept), n, ten)]
  wanted = twin.sgd(old, steps, 0.003, penalty=anchor)
  assert_trees_close(found, wanted, rtol=1e-3, atol=1e-4)
  rival = lwsf.RIVAL
  for settings, why in (({"codes": None}, "the request has none"),
                        ({"codes": CODES[::-1]}, "knows only")):  # fmt: skip
    request = request_of(**settings)
    with pytest.raises(NotApplicable, match=why):
      rival.forget(request, rival.prepare(request), [1], 0.1)


def test_eu_k_learns_what_lies_before_the_head_and_drops_the_row():
  request, found = forgotten("eu_k", 2, epochs=20)
  assert not np.allclose(found["kernel1"], trained()["kernel1"], atol=0.1)
  kernel, bias = reference.row_dropped(trained()["kernel2"], trained()["bias2"], np.arange(4) != 1)
  assert_trees_close({"k": found["kernel2"], "b": found["bias2"]}, {"k": kernel, "b": bias})
  right = lambda p, x, y: np.mean(np.asarray(mlp(p, x)).argmax(1) == y)
  start = {**trained(), "kernel1": FRESH["kernel1"], "bias1": FRESH["bias1"]}
  assert right(found, *request.kept) > max(0.8, right(start, *request.kept) + 0.2)
  assert right(found, *request.forgotten) == 0
  for settings, k, why in (({"fresh": None}, 2, "none are given"), ({}, 1, "no kernel"),
                           ({}, 3, "k = 3")):  # fmt: skip
    with pytest.raises(NotApplicable, match=why):
      forgotten("eu_k", k, **settings)


def test_eu_k_is_that_of_the_twin():
  """Seven steps with a one-cycle rate; the row is dropped at the end."""
  request, found = forgotten("eu_k", 2, epochs=1, batch_size=5)
  start = {**host(trained()), "kernel1": FRESH["kernel1"], "bias1": FRESH["bias1"]}
  steps = batches(request, request.kept, 0, twin.entropy)
  rates = [optax.cosine_onecycle_schedule(7, 0.05, pct_start=0.2)(i) for i in range(7)]
  assert max(rates) == pytest.approx(0.05, rel=1e-3) and len(steps) == 7
  moves = {"kernel1": 1, "bias1": 1, "kernel2": 0, "bias2": 0}
  wanted = twin.sgd(start, steps, rates, moves, relearn=True)
  for name in ("kernel1", "bias1"):
    assert_trees_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def counting(params, statistics, inputs):
  return mlp(params, inputs), {"steps": statistics["steps"] + 1}


def shifted(params, statistics):
  return {**params, "bias2": params["bias2"] + statistics["steps"]}


def test_training_mode_is_used_where_it_is_given_and_said():
  modes = {"train_fn": counting, "fold_fn": shifted, "statistics": {"steps": jnp.float32(0)}}
  plain = forgotten("fine_tune", 0.1)[1]
  request, found = forgotten("fine_tune", 0.1, **modes)
  assert_trees_close(found, {**plain, "bias2": plain["bias2"] + 2 * (36 // 8)}, atol=1e-5)
  assert RIVALS["fine_tune"].training_mode(request) is True
  asked = []
  some = lambda names: asked.append(names) or counting
  forgotten("eu_k", 2, train_some=some, **modes)
  assert asked == [("bias1", "kernel1")]


# Fishers -----------------------------------------------------------------------------------------


def test_ssd_is_that_of_the_twin():
  old = host(trained())
  fisher = lambda x, y: reference.fisher(reference.mlp_gradient, old, x, y)
  gone = LABELS == 1
  for alpha in (2.0, 0.5):
    _, found = forgotten("ssd", alpha)
    wanted = twin.dampened(old, fisher(INPUTS, LABELS), fisher(INPUTS[gone], LABELS[gone]), alpha)
    assert_trees_close(found, wanted, rtol=1e-3, atol=1e-6)
  _, found = forgotten("ssd", len(LABELS) / gone.sum() + 0.01)  # I_F <= I_D N / N_F
  assert_trees_close(found, trained(), rtol=0)


def test_sfdn_is_that_of_the_twin():
  classes, alpha = (1,), 1e-3
  request, found = forgotten("sfdn", alpha, classes)
  old = host(trained())
  fisher = twin.fisher_of_all_labels(old, request.kept.inputs)
  assert_trees_close(sfdn.fisher(request), fisher, rtol=1e-3, atol=1e-9)
  for index, name in enumerate(sorted(old)):
    head = name in ("kernel2", "bias2")
    mean, variance = old[name].astype(np.float64), alpha / (fisher[name] + 1e-8)
    variance = np.minimum(variance, alpha * (1e2 if head else 1e3))
    if variance.ndim > 1:
      variance = np.broadcast_to(variance.mean(0), variance.shape).copy()
    if head or variance.ndim == 1:
      variance = 10 * variance
    if head:
      mean[..., 1], variance[..., 1] = 0, 1e-4
    noise = np.asarray(jax.random.normal(jax.random.fold_in(KEY, index), mean.shape))
    assert_trees_close(found[name], mean + np.sqrt(variance) * noise, rtol=1e-3, atol=1e-5)


# Closed forms ------------------------------------------------------------------------------------


def hidden_of(params, inputs):
  return 1 / (1 + np.exp(-(inputs @ params["kernel1"] + params["bias1"])))


def test_the_head_edit_lowers_one_bias_and_the_head_projection_takes_out_a_row():
  _, found = forgotten("head_edit", None)
  assert np.asarray(found["bias2"])[1] == -1e9
  assert_trees_close({**found, "bias2": 0}, {**trained(), "bias2": 0})
  _, found = forgotten("head_projection", 1.0, (1, 2))
  kernel = np.asarray(trained()["kernel2"], np.float64)
  first = kernel[:, 1] / np.linalg.norm(kernel[:, 1])
  second = kernel[:, 2] - (first @ kernel[:, 2]) * first
  second /= np.linalg.norm(second)
  wanted = kernel - np.outer(first, first @ kernel) - np.outer(second, second @ kernel)
  assert_trees_close(found["kernel2"], wanted, rtol=1e-4, atol=1e-6)
  assert np.allclose(np.asarray(found["kernel2"])[:, 1], 0, atol=1e-6)


def test_kodge_is_that_of_the_twin():
  strength = 30.0, 300.0
  request, found = forgotten("kodge", strength)
  old, wanted = host(trained()), {}
  for name, read in (("kernel1", lambda x: x), ("kernel2", lambda x: hidden_of(old, x))):
    kept, gone = (
      read(side.inputs.astype(np.float64)) for side in (request.kept, request.forgotten)
    )
    p_r, p_f = twin.importance(kept, strength[0]), twin.importance(gone, strength[1])
    w = old[name].T.astype(np.float64)
    wanted[name] = (w @ (np.eye(len(p_f)) - p_f @ (np.eye(len(p_f)) - p_r))).T
  assert_trees_close({n: found[n] for n in wanted}, wanted, rtol=1e-3, atol=1e-4)
  assert_trees_close(found["bias1"], old["bias1"])
  assert len(kodge.some(request, "kept")) == len(request.kept.inputs)


def test_damp_is_that_of_the_twin():
  """Layer by layer: the second is edited by what it reads of the model with the first edited."""
  classes = (1,)
  request, found = forgotten("damp", 1.0, classes)
  old = {name: np.asarray(leaf, np.float64) for name, leaf in trained().items()}
  inputs, labels = damp.some(request)
  assert sorted(labels.tolist()) == sorted(LABELS.tolist())
  start = old
  for name in ("kernel1", "kernel2"):
    read = (lambda p: inputs) if name == "kernel1" else (lambda p: hidden_of(p, inputs))
    alpha = np.clip(2 * damp.separability(read(start), labels == 1) - 1, 0, 1)
    assert alpha > 0.3
    means = np.array([read(old)[labels == c].mean(0) for c in range(CLASSES)])
    r = twin.prototype_residual(means[1], means[[0, 2, 3]])
    old = {**old, name: old[name] - alpha * np.outer(r, r @ old[name]) / (r @ r)}
  assert_trees_close(found, old, rtol=1e-3, atol=1e-4)


def test_residuals_where_the_fit_would_be_exact():
  read, labels = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 4
  means = np.array([read[labels == c].mean(0) for c in range(4)])
  wanted = [twin.prototype_residual(means[c], means[[1, 2, 3]]) for c in (0,)]
  assert_trees_close(damp.residuals(read, labels, (0,)).T, np.array(wanted))


def test_synthetic_embeddings_are_drawn_and_learned_as_said():
  request = request_of()
  planned, old = model.plan_of(request), host(trained())
  head = model.network_of(request).require_head()
  assert kernels.place_of(planned, head.step) == 1
  mean, deviation = synthetic_embeddings.spread(request, 6)
  hidden = hidden_of(old, request.kept.inputs)
  assert_trees_close(mean, hidden.mean(0), rtol=1e-4)
  assert_trees_close(deviation, hidden.std(0), rtol=1e-4)
  matrix, bias = trained()["kernel2"], trained()["bias2"]
  vectors, labels = synthetic_embeddings.drawn(KEY, matrix, bias, mean, deviation)
  assert np.array_equal(np.argmax(vectors @ matrix + bias, 1), labels)
  assert np.bincount(labels).max() == 1000 and len(np.unique(vectors, axis=0)) == len(vectors)
  rate = 0.1
  found = RIVALS["synthetic_embeddings"].forget_fn(request, None, (1,), rate)
  matrix, bias = old["kernel2"].astype(np.float64), old["bias2"].astype(np.float64)
  one_hot, gone = np.eye(CLASSES)[labels], labels == 1
  share = np.where(gone, -1 / gone.sum(), 1 / (~gone).sum())[:, None]
  for _ in range(100):
    logits = vectors @ matrix + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    r = share * (odds / odds.sum(1, keepdims=True) - one_hot)
    matrix, bias = matrix - rate * vectors.T @ r, bias - rate * r.sum(0)
  assert_trees_close(found["kernel2"], matrix, rtol=1e-3, atol=1e-3)
  assert_trees_close(found["bias2"], bias, rtol=1e-3, atol=1e-3)
  without = request_of(kept=None)
  assert synthetic_embeddings.spread(without, 6)[1].tolist() == [1.0] * 6


def test_the_head_edit_is_finite_in_half_precision():
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), trained())
  for name in ("head_edit", "head_projection"):
    _, found = forgotten(name, RIVALS[name].strengths[0], params=half)
    assert np.isfinite(np.asarray(found["bias2"], np.float32)).all()
    assert not (np.asarray(mlp(found, INPUTS)).argmax(1) == 1)[LABELS == 1].any()


@pytest.mark.parametrize("name", ["salun", "damp"])
def test_half_precision_is_forgotten_much_like_single(name):
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained())
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
  strength = {"salun": 0.1, "damp": 1.0}[name]
  found, wanted = (forgotten(name, strength, params=params)[1] for params in (half, wide))
  answers = [np.asarray(mlp(p, INPUTS)).argmax(1) for p in (found, wanted)]
  assert np.mean(answers[0] == answers[1]) > 0.9


# Models ------------------------------------------------------------------------------------------


def conv_net(params, pictures):
  """A strided convolution, a grouped one, and a head that reads means over positions."""
  conv = functools.partial(
    jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), padding="SAME"
  )
  x = jnp.tanh(conv(pictures, params["a"], (2, 2)))
  x = jnp.tanh(conv(x, params["grouped"], (1, 1), feature_group_count=2))
  return x.mean((1, 2)) @ params["head"]


@functools.cache
def conv_request():
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"a": draw(3, 3, 2, 4), "grouped": draw(1, 1, 2, 4), "head": draw(4, 3)}
  pictures, labels = np.asarray(draw(9, 5, 5, 2)), np.arange(9) % 3
  sides = [(pictures[labels != 0], labels[labels != 0]), (pictures[labels == 0], labels[:3] * 0)]
  return make_request(conv_net, params, *sides, key=KEY, batch_size=4)


def test_patches_are_those_of_a_loop_and_kernels_go_there_and_back():
  request = conv_request()
  found = kernels.operators(model.plan_of(request))
  assert [operator.place for operator in found] == [0, 2]  # the grouped one is left out
  pictures = request.kept.inputs
  wanted = twin.patches(pictures, 3, 2, 1, 1)
  gram = kernels.grams_of(request, pictures, 4)[0]
  assert_trees_close(gram, wanted.T.astype(np.float64) @ wanted, rtol=1e-4, atol=1e-4)
  kernel, leaf = found[0].kernel(taps=True), request.params["a"]
  matrix = kernel.matrix(leaf)
  written = jax.lax.conv_general_dilated(
    pictures, leaf, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  assert_trees_close(wanted @ matrix, written.reshape(-1, 4), rtol=1e-4, atol=1e-4)
  assert_trees_close(kernel.put(leaf, matrix), leaf)
  by_channel = found[0].kernel()
  assert by_channel.matrix(leaf).shape == (2, 36)
  assert_trees_close(by_channel.put(leaf, 2 * by_channel.matrix(leaf)), 2 * leaf)
  reads = kernels.reads_of(request, request.params, pictures)
  assert [read.shape for read in reads] == [(6, 2), (6, 4), (6, 4)]
  assert_trees_close(reads[0], pictures.mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kodge", "damp"])
def test_a_grouped_convolution_stays_as_it_is(name):
  request, rival = conv_request(), RIVALS[name]
  found = rival.forget(request, rival.prepare(request), [0], rival.strengths[-1])
  assert np.array_equal(found["grouped"], request.params["grouped"])
  assert name == "damp" or not np.allclose(found["a"], request.params["a"])


LAYOUTS = {
  "class axis first": (lambda p, x: (p["kernel"] @ x.T).T, lambda kernel: kernel.T),
  "scaled": (lambda p, x: (x @ p["kernel"].reshape(FEATURES, CLASSES)) / 2, jnp.ravel),
  "with taps": (
    lambda p, x: jax.lax.conv_general_dilated(
      x[:, None], p["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )[:, 0],
    lambda kernel: kernel[None],
  ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_is_edited_in_any_layout(name):
  """As that of `inputs @ kernel`, by the rows and by random vectors."""
  logits_fn, laid_out = LAYOUTS[name]
  kernel = make_params("regression")["kernel"]
  plain = lambda p, x: x @ p["kernel"] / (2 if name == "scaled" else 1)
  for rival, strength in (("head_projection", 1.0), ("synthetic_embeddings", 0.1)):
    _, wanted = forgotten(rival, strength, params={"kernel": kernel}, logits_fn=plain)
    params = {"kernel": laid_out(kernel)}
    _, found = forgotten(rival, strength, params=params, logits_fn=logits_fn)
    assert_trees_close(found["kernel"], laid_out(wanted["kernel"]), rtol=1e-4, atol=1e-5)


def scanned(params, inputs):
  return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), inputs, params["layers"])[0]


def cosine(params, inputs):
  kernel = params["kernel"] / jnp.linalg.norm(params["kernel"], axis=0)
  return inputs @ kernel


def test_models_that_a_rival_cannot_edit_are_told():
  draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  in_a_scan = request_of(params={"layers": draw(2, 5, 5)}, logits_fn=scanned, fresh=None)
  for name in ("kodge", "damp"):
    with pytest.raises(NotApplicable, match="inside a scan"):
      RIVALS[name].forget(
        in_a_scan, RIVALS[name].prepare(in_a_scan), [1], RIVALS[name].strengths[0]
      )
  no_head = request_of(params={"kernel": draw(5, 4)}, logits_fn=cosine)
  for name in ("head_edit", "head_projection", "sfdn", "synthetic_embeddings"):
    with pytest.raises(NotApplicable, match="head of this model cannot be edited"):
      RIVALS[name].forget(no_head, RIVALS[name].prepare(no_head), [1], RIVALS[name].strengths[0])


# The search --------------------------------------------------------------------------------------


def test_a_search_takes_the_best_and_of_equals_the_weakest():
  rival, request = RIVALS["ssd"], request_of()
  state, seen = rival.prepare(request), []

  def search_with(*pairs):
    given = iter(pairs)
    seen.clear()
    score = lambda params: seen.append(params) or Scores(*next(given), np.zeros(4))
    return search(rival, request, state, [1], score)

  low = [(0.1, 0.1)] * 5
  found = search_with((0.9, 0.99), (0.9, 1.0), (0.91, 0.97), *low)
  assert found.strength == rival.strengths[0] and len(found.curve) == len(rival.strengths)
  assert found.params is seen[0] and found.training_mode is None
  assert found.curve[1] == (rival.strengths[1], 0.9, 1.0)
  found = search_with((math.nan, 1.0), (0.5, 0.6), (0.6, 0.6), *low)
  assert found.strength == rival.strengths[2]


def test_a_search_leaves_out_what_does_not_apply():
  rival, request = RIVALS["eu_k"], request_of(epochs=1)
  score = lambda params: Scores(0.5, 0.5, np.zeros(4))
  found = search(rival, request, rival.prepare(request), [1], score)
  assert [tried.strength for tried in found.curve] == [2] and found.training_mode is False
  without = request._replace(fresh=None)
  with pytest.raises(NotApplicable, match="none are given"):
    search(rival, without, rival.prepare(without), [1], score)


def test_all_examples_are_read_where_a_rival_prepares():
  request = request_of()
  assert len(request.side(ALL).labels) == len(LABELS)
  with pytest.raises(NotApplicable, match="it reads all examples"):
    request._replace(forgotten=None).side(ALL)


def test_the_page_on_own_methods_and_rivals_runs(capsys):
  names: dict = {}
  page = (pathlib.Path(__file__).parent.parent / "docs" / "own_method.md").read_text("utf-8")
  for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
    exec(block, names)
  assert names["result"].code_forget_error == 1.0 == names["result"].code_retain_accuracy
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == ["lower_bias", "gradient_ascent", "head_edit"]
  assert all(float(line.split()[2]) > 0.9 for line in lines[1:])
  rows = re.findall(r"^\| (\w+) \| .*;.* \|$", page, re.MULTILINE)
  assert rows == list(RIVALS)
