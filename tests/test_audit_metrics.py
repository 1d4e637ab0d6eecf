"""Each metric of the audit against a slow twin, or a case whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from scipy import stats

from mnemonic_jax.auditing import (
  distance,
  intervals,
  likelihood_ratio,
  linear_probe,
  membership,
  nearest_mean,
  outputs,
  prototype,
  routing,
  tow,
  trigger,
)
from mnemonic_jax.evaluation import Predictions


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def blobs(seed, count=60, classes=4, width=5, spread=1.0):
  """Overlapping classes around fixed centres; one channel never varies."""
  labels = np.arange(count) % classes
  features = 1.5 * draw(classes, width, seed=99)[labels] + spread * draw(count, width, seed=seed)
  features[:, -1] = 3.0
  return features, labels


# Intervals


@pytest.mark.parametrize(("right", "total"), [(0, 7), (7, 7), (3, 7), (900, 1000), (2.5, 9.5)])
def test_wilson_ends_are_where_the_score_test_rejects(right, total):
  found = intervals.wilson(right, total)
  z = stats.norm.ppf(0.975)
  np.testing.assert_allclose(found[1:], reference.wilson(right, total, z), atol=1e-9)
  assert found.low <= found.value == right / total <= found.high


def test_wilson_of_nothing_is_nan():
  assert np.isnan(intervals.wilson(0, 0)).all()


@pytest.mark.parametrize("digits", [8, 0])  # 0: many ties
def test_auc_and_its_variance_count_every_pair(digits):
  positives, negatives = np.round(draw(23) + 0.7, digits), np.round(draw(31, seed=1), digits)
  area, variance = reference.auc(positives, negatives)
  found = intervals.auc(positives, negatives)
  assert found.value == pytest.approx(area, abs=1e-12)
  assert found == pytest.approx(intervals.of_variance(area, variance, 23), abs=1e-9)


def test_the_interval_of_an_auc_covers_the_true_one():
  """Normal scores one deviation apart: the true AUC is Phi(1 / sqrt 2)."""
  truth, rng = stats.norm.cdf(1 / math.sqrt(2)), np.random.default_rng(0)
  found = [intervals.auc(rng.normal(1, 1, 40), rng.normal(0, 1, 40)) for _ in range(400)]
  covered = np.mean([each.low <= truth <= each.high for each in found])
  assert 0.92 <= covered <= 0.98


def test_an_auc_of_one_still_has_a_width():
  found = intervals.auc([2.0, 3.0], [0.0, 1.0])
  assert found.value == found.high == 1 and found.low == intervals.wilson(2, 2).low < 0.5


@pytest.mark.parametrize(("scores", "message"), [([1.0], "positives: got 1"), ([1, np.nan], "NaN")])
def test_auc_refuses(scores, message):
  with pytest.raises(ValueError, match=message):
    intervals.auc(scores, [0.0, 1.0])


# Outputs


def test_confidence_is_the_logit_of_the_probability():
  logits, labels = draw(6, 4), np.array([0, 1, 2, 3, 0, 1])
  p = np.exp(logits)[range(6), labels] / np.exp(logits).sum(1)
  np.testing.assert_allclose(outputs.confidences(logits, labels), np.log(p / (1 - p)))
  found = outputs.answers(logits, labels)
  np.testing.assert_allclose(found.losses, -np.log(p), rtol=1e-6)
  assert found.predictions.tolist() == logits.argmax(1).tolist()


def test_output_scores_are_those_of_one_example_at_a_time():
  rng = np.random.default_rng(0)
  labels, found, old = rng.integers(3, size=(3, 50))
  as_predictions = lambda x: Predictions(x, np.zeros(50), labels)
  scores = outputs.output_scores(as_predictions(found), 4, [2], as_predictions(old))
  a_r, e_f, per_class = reference.evaluate(found, labels, 4, [2])
  assert (scores.retain_accuracy.value, scores.forget_error.value) == pytest.approx((a_r, e_f))
  np.testing.assert_allclose([x.value for x in scores.per_class], per_class)
  drops = np.subtract(reference.evaluate(old, labels, 4, [2])[2], per_class)[:2]
  assert scores.worst_class == drops.argmax()
  assert scores.worst_drop.value == pytest.approx(drops.max())
  assert scores.worst_drop.half_width == pytest.approx(scores.per_class[drops.argmax()].half_width)
  assert np.isnan(scores.per_class[3].value)


def test_the_head_only_control_forgets_the_class_and_keeps_the_order_of_the_others():
  logits = draw(20, 4)
  edited = outputs.head_only(logits, [1, 2])
  assert set(edited.argmax(1)) == {0, 3}
  np.testing.assert_array_equal(edited[:, [0, 3]], logits[:, [0, 3]])
  assert np.isfinite(logits).all()  # the ones given are not modified


# Features


def test_the_probe_is_at_the_minimum():
  """Newton's method in float64 finds the same answers; a fit that is stopped early does not."""
  train, test = blobs(1), blobs(2, count=200)
  deviations = train[0].std(0)
  scale = np.where(deviations > 0, deviations, 1)
  standard = lambda x: (x - train[0].mean(0)) / scale
  weights = reference.softmax_regression(standard(train[0]), train[1], 4, ridge=1.0)
  logits = np.column_stack([standard(test[0]), np.ones(200)]) @ weights.T
  right = logits.argmax(1) == test[1]
  found = linear_probe.linear_probe(*train, *test)
  assert found.converged
  np.testing.assert_allclose(found.accuracy, [right[test[1] == c].mean() for c in range(4)])
  early = linear_probe.linear_probe(*train, *test, max_steps=1)
  assert not early.converged and (early.accuracy != found.accuracy).any()


def test_the_nearest_mean_measures_every_distance():
  train, test = blobs(1), blobs(2, count=80)
  answers = np.array(reference.nearest_mean(*train, test[0], 4))
  wanted = [np.mean(answers[test[1] == c] == c) for c in range(4)]
  assert len(set(wanted)) > 1
  np.testing.assert_allclose(nearest_mean.nearest_mean_accuracy(*train, *test), wanted)


def test_a_class_that_training_lacks_is_never_the_nearest():
  found = nearest_mean.nearest_mean_accuracy(
    [[0.0], [5.0]], [0, 2], [[0.0], [5.0], [0.1]], [0, 2, 1], num_classes=3
  )
  assert found.tolist() == [1.0, 0.0, 1.0]


# Prototype


def test_the_prototype_attack_writes_the_row_of_its_formula():
  rows, shots = draw(4, 6), draw(5, 6, seed=1)
  found = prototype.prototype_rows(rows, {2: shots})
  np.testing.assert_allclose(found[2], reference.prototype_row(rows, 2, shots))
  np.testing.assert_array_equal(found[[0, 1, 3]], rows[[0, 1, 3]])


def test_the_prototype_attack_on_two_classes_takes_the_length_of_kept_rows_alone():
  rows = np.diag([100.0, 2.0, 100.0, 4.0])
  found = prototype.prototype_rows(rows, {0: [[0, 7.0, 0, 0]], 2: [[0, 0, 0, 1.0]]})
  np.testing.assert_allclose(found[0], [50, 1.5, 0, 0])
  np.testing.assert_allclose(found[2], [0, 0, 50, 1.5])


def test_the_draws_of_examples_differ_and_repeat():
  labels = np.repeat([0, 1], 50)
  one, other, again = (prototype.draw(labels, [1], seed) for seed in (0, 1, 0))
  assert (labels[one[1]] == 1).all() and len(set(one[1])) == 5
  assert set(one[1]) != set(other[1]) and one[1].tolist() == again[1].tolist()
  with pytest.raises(ValueError, match="holds 50 examples of class 1; expected at least 51"):
    prototype.draw(labels, [1], 0, shots=51)


def test_the_interval_of_what_is_recovered_knows_both_noises():
  """Crossed effects of draws and of examples: the interval covers their common mean."""
  rng, covered = np.random.default_rng(0), 0
  for _ in range(200):
    p = np.clip(0.5 + 0.1 * rng.normal(size=(10, 1)) + 0.1 * rng.normal(size=50), 0, 1)
    found = prototype.recovered(rng.random((10, 50)) < p)
    covered += found.low <= 0.5 <= found.high
  assert covered >= 180


# Routing


def test_the_routes_of_the_same_answers_are_at_no_distance():
  labels = np.repeat([0, 1], 100)
  answers = np.random.default_rng(0).integers(2, 5, size=200)
  found = routing.routing_distance(answers, answers, labels, [0, 1], 5)
  assert found == intervals.wilson(0, 200)
  routes = routing.routes(answers, labels, [0, 1], 5)
  np.testing.assert_allclose(routes[1], [np.mean(answers[100:] == c) for c in range(5)])


def test_the_distance_of_routes_is_the_mean_over_classes():
  labels = np.array([0, 0, 1, 1])
  found = routing.routing_distance([2, 3, 2, 3], [3, 3, 2, 3], labels, [0, 1], 4)
  assert found.value == 0.25 and found.low < 0.25 < found.high


def test_an_attack_tells_models_apart_by_kept_logits_alone():
  logits = draw(200, 4)
  other = logits.copy()
  other[:, 0] -= 1e9  # the forgotten class, which it must not look at
  assert routing.separability(logits, other, [0]).value == pytest.approx(0.5, abs=0.01)
  sharper = np.where(np.arange(4) == 1, 3 * logits, logits)
  found = routing.separability(logits, sharper, [0])
  assert found.value > 0.65 and found.low > 0.6


def test_the_attack_has_not_seen_what_it_is_scored_on():
  """Noise of many numbers: an attack that is scored on its training examples would be at 1."""
  found = routing.separability(draw(30, 40), draw(30, 40, seed=1), [0])
  assert 0.3 < found.value < 0.7
  with pytest.raises(ValueError, match="4 forgotten examples"):
    routing.separability(draw(4, 3), draw(4, 3), [0])


# Membership


def test_the_loss_attack_takes_forgotten_examples_alone():
  made = lambda losses, labels: Predictions(
    np.zeros(len(labels)), np.array(losses), np.array(labels)
  )
  train, test = made([0.1, 0.3, 9.0], [1, 1, 0]), made([0.2, 0.4, 0.0], [1, 1, 0])
  assert membership.loss_attack(train, test, [1]).value == 0.75


@pytest.mark.parametrize("models", [8, 64])  # few: deviations are shared
def test_the_likelihood_ratio_is_that_of_two_normals(models):
  members = likelihood_ratio.halves(0, models, 6)
  confidences, target = draw(models, 6) + 2 * members, draw(6, seed=1)
  found = likelihood_ratio.likelihood_ratio(confidences, members, target)
  wanted = reference.likelihood_ratio(confidences, members, target, shared=models < 64)
  np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_the_likelihood_ratio_finds_members_that_differ():
  members = likelihood_ratio.halves(0, 16, 400)
  confidences = draw(16, 400) + draw(400, seed=2) * 5 + 2 * members
  scores = likelihood_ratio.likelihood_ratio(confidences[1:], members[1:], confidences[0])
  found = intervals.auc(scores[members[0]], scores[~members[0]])
  assert found.low > 0.85  # two deviations apart: Phi(sqrt 2) = 0.92


@pytest.mark.parametrize(
  ("confidences", "members", "message"),
  [
    (np.zeros((3, 1)), [[True], [True], [False]], "1 models did not see example 0"),
    (np.full((4, 1), np.nan), [[True], [True], [False], [False]], "NaN"),
    (np.zeros((4, 2)), [[True], [True], [False], [False]], "expected .M, N."),
  ],
)
def test_the_likelihood_ratio_refuses(confidences, members, message):
  with pytest.raises(ValueError, match=message):
    likelihood_ratio.likelihood_ratio(confidences, members, np.zeros(confidences.shape[1]))


# The rest


def test_tow_is_one_at_retrain_and_zero_where_one_accuracy_is_as_wrong_as_can_be():
  made = lambda *shares: tow.Accuracies(*(intervals.wilson(100 * x, 100) for x in shares))
  again = made(0.0, 0.9, 0.8)
  assert tow.tow(again, again).value == 1 and tow.tow(made(1.0, 0.9, 0.8), again).value == 0
  found = tow.tow(made(0.1, 0.8, 0.9), again)
  assert found.value == pytest.approx(0.9**3) and found.low < found.value < found.high <= 1


def test_tow_takes_forgotten_and_kept_from_training_and_test_from_kept():
  train = Predictions(np.array([0, 0, 1, 2]), np.zeros(4), np.array([0, 1, 1, 2]))
  test = Predictions(np.array([0, 1, 1, 2]), np.zeros(4), np.array([0, 0, 1, 2]))
  assert tow.accuracies(train, test, 3, [1]) == (
    intervals.wilson(1, 2),
    intervals.wilson(2, 2),
    intervals.wilson(2, 3),
  )


def test_distances_are_of_modules_and_of_the_whole():
  before = {"a": {"w": np.array([3.0, 0.0]), "b": np.array([4.0])}, "z": np.zeros(2)}
  after = {"a": {"w": np.array([3.0, 1.0]), "b": np.array([4.0])}, "z": np.array([0.0, 2.0])}
  found = distance.parameter_distance(before, after)
  assert found == {"a": pytest.approx(0.2), "z": np.inf, "whole": pytest.approx(5**0.5 / 5)}


def test_only_codes_that_trigger_their_own_class_count():
  found = trigger.trigger_rate([[0, 0], [0, 1], [1, 2]], [1, 2])
  assert found.value == 0.5 and found == intervals.wilson(2, 4)
