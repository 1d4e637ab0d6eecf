"""The audit of the audit: thresholds come from Retrains alone, and each is judged by the others."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mnemonic_jax.auditing import questions, verdicts
from mnemonic_jax.auditing.intervals import Estimate
from mnemonic_jax.auditing.verdicts import Question, judge, limits, threshold, threshold_of_pairs

PROBE = Question("probe")


def exact(*values, noise=0.0):
  return [Estimate(x, x - noise, x + noise) for x in values]


@pytest.mark.parametrize("side", ["upper", "lower", "both"])
def test_one_more_retrain_passes_with_the_probability_that_is_claimed(side):
  rng = np.random.default_rng(0)
  inside = [
    low <= x[-1] <= high
    for x in rng.normal(size=(1500, 5))
    for low, high in [limits(list(x[:-1]), 0.0, side)]
  ]
  assert 0.93 <= np.mean(inside) <= 0.97


def test_what_few_examples_allow_is_the_least_margin():
  student = stats.t.ppf(0.95, 2)
  assert limits([0.1, 0.2, 0.3], 0.03, "upper")[1] == pytest.approx(
    0.2 + student * 0.1 * (4 / 3) ** 0.5
  )
  assert limits([0.5, 0.5, 0.5], 0.03, "both") == (0.47, 0.53)
  low, high = limits([0.0, 1.0], 0.03, "lower")
  assert low < -1 and high == np.inf


def test_each_retrain_is_judged_by_the_others():
  values = [0.50, 0.51, 0.52, 0.53, 0.90]
  fixed = threshold(PROBE, exact(*values), Estimate(0.95, 0.9, 1.0))
  wanted = [
    x <= limits(values[:i] + values[i + 1 :], 0.0, "upper")[1] for i, x in enumerate(values)
  ]
  assert wanted == [True] * 4 + [False]  # with itself in the reference the last one would pass
  assert fixed.passed == 4 and values[-1] <= fixed.high


def test_fewer_than_three_retrains_are_no_reference():
  fixed = threshold(PROBE, exact(0.1, 0.2), Estimate(0.9, 0.8, 1.0))
  assert fixed.passed is None and judge(fixed, Estimate(0.9, 0.8, 1.0)).verdict == "no reference"
  pairs = [[None, *exact(0.1)], [*exact(0.1), None]]
  assert threshold_of_pairs(PROBE, pairs, exact(0.3, 0.3)).passed is None
  assert threshold_of_pairs(PROBE, [], []).retrained == ()


@pytest.mark.parametrize(
  ("before", "after", "verdict"),
  [
    (0.80, 0.80, "not as retrained"),  # the head edit: features as before
    (0.80, 0.66, "as retrained"),
    (0.80, 0.10, "as retrained"),  # less is readable than in Retrain
    (0.66, 0.66, "cannot tell"),  # before is within what Retrains get
    (0.66, 0.80, "not as retrained"),
    (0.80, np.nan, "not measured"),
  ],
)
def test_the_verdict_on_features(before, after, verdict):
  fixed = threshold(PROBE, exact(0.64, 0.65, 0.66, noise=0.03), Estimate(before, 0, 1))
  assert judge(fixed, Estimate(after, 0, 1)).verdict == verdict


def test_where_before_may_pass_too_the_answer_still_counts():
  kept = Question("retain accuracy", "lower", separates=False)
  fixed = threshold(kept, exact(0.9, 0.91, 0.92), Estimate(0.91, 0, 1))
  assert judge(fixed, Estimate(0.91, 0, 1)).verdict == "as retrained"
  assert judge(fixed, Estimate(0.7, 0, 1)).verdict == "not as retrained"


def test_pairs_of_a_left_out_retrain_are_not_in_its_reference():
  passes = []
  for seed in range(30):
    matrix = np.random.default_rng(seed).random((4, 4)) ** 3
    matrix = matrix + matrix.T
    made = lambda i, j, of=matrix: None if i == j else Estimate(of[i, j], np.nan, np.nan)
    pairs = [[made(i, j) for j in range(4)] for i in range(4)]
    fixed = threshold_of_pairs(PROBE, pairs, exact(0.5, 0.5, 0.5, 0.5))
    passed = 0
    for left in range(4):
      others = [i for i in range(4) if i != left]
      values = [np.mean([matrix[i, j] for j in others if j != i]) for i in others]
      own = np.mean([matrix[left, j] for j in others])
      passed += own <= limits(values, 0.0, "upper")[1]
    assert fixed.passed == passed
    np.testing.assert_allclose(fixed.retrained[0], matrix[0, [1, 2, 3]].mean())
    assert fixed.before.value == 0.5
    passes.append(passed)
  assert len(set(passes)) > 1


def test_the_stand_in_for_idi_is_one_before_and_nought_at_retrain():
  before, again = [0.8, 0.9], [[0.4, 0.6], [0.6, 0.6]]
  assert verdicts.share_left(before, before, again) == pytest.approx(1)
  assert verdicts.share_left(before, [0.5, 0.6], again) == pytest.approx(0)
  assert np.isnan(verdicts.share_left(before, before, []))
  assert np.isnan(verdicts.share_left([0.5, 0.6], before, again))


def test_thresholds_are_fixed_without_the_model_under_audit():
  results = {
    f"{name}/outputs": {"retain_accuracy": [x, x - 0.01, x + 0.01], "forget_error": [1.0, 0.9, 1.0]}
    for name, x in (
      ("before", 0.9),
      ("retrained 0", 0.9),
      ("retrained 1", 0.91),
      ("retrained 2", 0.92),
    )
  }
  names = [f"retrained {i}" for i in range(3)]
  fixed = questions.thresholds(results, [], names)
  assert [each.question.name for each in fixed] == ["retain accuracy", "forget error"]
  with_after = {**results, "after/outputs": {"retain_accuracy": [0.1, 0.0, 0.2]}}
  assert questions.thresholds(with_after, [], names) == fixed
  found = questions.after(with_after, fixed[0].question, [], names)
  assert judge(fixed[0], found).verdict == "not as retrained"
