"""`mj.audit` on models whose answers are known: a class that differs in one input alone."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_projection as nets

import mnemonic_jax as mj
from mnemonic_jax._functions import Static
from mnemonic_jax.auditing import likelihood_ratio, prototype, relearn, stages

WIDTH, CLASSES = 5, 4


def examples(seed, count):
  """Class 0 looks like class 1 but for the first input, which no other class uses."""
  labels = np.arange(count) % CLASSES
  centres = 3 * np.eye(CLASSES, WIDTH)
  centres[0, 1] = 3
  noise = np.random.default_rng(seed).normal(size=(count, WIDTH))
  return (centres[labels] + 0.4 * noise).astype(np.float32), labels


def batches(seed, count, size=64):
  inputs, labels = examples(seed, count)
  return [(inputs[at : at + size], labels[at : at + size]) for at in range(0, count, size)]


def model(params, inputs):
  hidden = jax.nn.relu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def params_of(seed=0, knows=True):
  """Before reads the first input; a Retrain has no use for it, and draws its weights anew."""
  rng = np.random.default_rng(seed)
  hidden = np.eye(WIDTH) + 0.05 * rng.normal(size=(WIDTH, WIDTH))
  head = 4 * np.eye(WIDTH, CLASSES) + 0.1 * rng.normal(size=(WIDTH, CLASSES))
  head[0, 1] = -4.0
  if not knows:
    hidden[:, 0], head[:, 0], head[0, 1] = 0.05 * rng.normal(size=WIDTH), 0, 0
    hidden[0] = 0
  hidden, head = (x.astype(np.float32) for x in (hidden, head))
  return {
    "hidden": {"kernel": hidden, "bias": np.zeros(WIDTH, np.float32)},
    "head": {"kernel": head, "bias": np.float32([0 if knows else -2, 0, 0, 0])},
  }


def head_dropped():
  params = params_of()
  kernel, bias = params["head"]["kernel"].copy(), params["head"]["bias"].copy()
  kernel[:, 0], bias[0] = kernel[:, 1:].mean(1), bias[1:].mean() - 1
  return {**params, "head": {"kernel": kernel, "bias": bias}}


BEFORE, TRAIN, TEST = params_of(), batches(1, 240), batches(2, 200)
RETRAINED = [params_of(seed, knows=False) for seed in (1, 2, 3, 4)]
CODES = np.stack([examples(3, 4 * k)[0][-4:] for k in (1, 2, 3)], axis=1)  # (C, 3, WIDTH)


def audited(after, **more):
  arguments = {"train": TRAIN, "test": TEST, "classes": [0], "retrained": RETRAINED}
  return mj.audit(model, BEFORE, after, **{**arguments, **more})


@pytest.fixture(scope="module")
def told():
  """The results as they came, and the report of the head edit."""
  found = {}
  add = lambda name, result: found.update({name: json.loads(json.dumps(result))})
  return found, audited(head_dropped(), codes=CODES, on_metric=add)


def test_the_head_edit_passes_outputs_and_fails_features(told):
  report = told[1]
  passes, fails = "as retrained", "not as retrained"
  assert report.verdict("forget error") == report.verdict("codes as a trigger") == passes
  for stage in ("hidden.kernel", "head input"):
    assert report.verdict(f"probe, {stage}") == report.verdict(f"nearest mean, {stage}") == fails
  assert report.verdict("prototype attack") == report.verdict("relearned from shots") == fails
  assert report.probe_left == 1.0
  assert report.stages == ("hidden.kernel", "head input")


def test_a_retrain_that_it_has_not_seen_is_as_retrained():
  report = audited(params_of(9, knows=False), codes=CODES, metrics=["features", "prototype"])
  asked = {each.threshold.question.name: each for each in report.verdicts}
  for name in ("forget error", "probe, hidden.kernel", "nearest mean, head input"):
    assert asked[name].verdict == "as retrained", str(report)
  assert asked["prototype attack"].after.value < 0.9 and abs(report.probe_left) < 0.2
  assert all(each.threshold.passed >= 3 for each in report.verdicts)


def test_numbers_are_those_of_the_metrics(told):
  results, report = told
  inputs, labels = (np.concatenate(x) for x in zip(*TEST, strict=True))
  answers = np.asarray(model(BEFORE, inputs)).argmax(1)
  a_r, e_f, per_class = reference.evaluate(answers, labels, CLASSES, [0])
  outputs = results["before/outputs"]
  assert (outputs["retain_accuracy"][0], outputs["forget_error"][0]) == pytest.approx((a_r, e_f))
  np.testing.assert_allclose([x[0] for x in outputs["per_class"]], per_class)
  assert outputs["head_only"]["forget_error"][0] == 1.0
  routes = results["retrained 0/routing"]["routes"][0]
  assert routes[1] > 0.9 and routes[0] == 0  # to the class that it looks like
  assert results["after/distance"]["hidden"] == 0 < results["after/distance"]["head"]
  assert results["before/codes"]["triggered"][0] == 1
  assert 0.3 < results["before/membership"]["auc"][0] < 0.7
  assert report.results["before & retrained 0"]["separability"][0] > 0.9
  assert report.skipped == {}


def test_thresholds_are_told_before_anything_of_after(told):
  names = list(told[0])
  first = min(i for i, name in enumerate(names) if name.startswith("after"))
  assert names.index("thresholds") < first
  assert not any("after" in name for name in names[: names.index("thresholds")])
  assert set(told[0]["thresholds"]) == {each.threshold.question.name for each in told[1].verdicts}


def test_the_report_is_json_and_a_table(told):
  report = told[1]
  found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
  assert found["classes"] == [0] and found["retrained"] == 4
  row = next(x for x in found["verdicts"] if x["question"] == "probe, head input")
  assert row["verdict"] == "not as retrained" and row["low"] is None and row["high"] < 0.95
  lines = str(report).splitlines()
  assert lines[0].startswith("question") and any("4 of 4" in line for line in lines)
  assert any("A_R" in line and "head edited" in line for line in lines)
  assert any("all stages: 100.0 %" in line for line in lines)
  with pytest.raises(KeyError, match="got 'taste'; this audit asked retain accuracy"):
    report.verdict("taste")


def test_an_interrupted_audit_goes_on_and_ends_the_same(told):
  results, report = told
  names = list(results)
  missing = ["after/outputs", "after/features/head input", "after & retrained 1"]
  done = {name: results[name] for name in names if name not in missing}
  again = []
  resumed = audited(
    head_dropped(), codes=CODES, done=done, on_metric=lambda name, _: again.append(name)
  )
  assert sorted(again) == sorted(missing)
  assert resumed.as_dict() == report.as_dict()


def test_without_enough_retrains_there_is_no_reference(told):
  report = audited(head_dropped(), metrics=["outputs"], retrained=RETRAINED[:2])
  assert {each.verdict for each in report.verdicts} == {"no reference"}
  assert "a verdict needs 3" in str(report) and np.isnan(report.probe_left)


def test_too_few_examples_leave_an_attack_out():
  inputs, labels = examples(1, 240)
  few = np.concatenate([np.flatnonzero(labels == 0)[:4], np.flatnonzero(labels)])
  report = audited(
    head_dropped(),
    train=[(inputs[few], labels[few])],
    metrics=["prototype", "relearn"],
    retrained=[],
  )
  assert report.skipped["after/prototype"] == (
    "train has 4 examples of a forgotten class; it needs 5"
  )
  assert "not measured: after/relearn" in str(report)


def test_several_classes_are_audited_together(told):
  report = audited(head_dropped(), classes=[0, 3], retrained=[], codes=CODES)
  outputs = report.results["after/outputs"]
  assert outputs["forget_error"][0] == 0.5 and len(report.results["after/routing"]["routes"]) == 2
  assert report.results["after/prototype"]["recovered"][0] > 0.9
  assert report.results["before/codes"]["triggered"][0] == 1 and report.skipped == {}


def test_a_subject_brings_functions_of_its_own(told):
  """Retrains whose functions carry an array, which halves the inputs; their kernels are doubled."""
  halved = lambda scale, params, inputs: model(params, inputs / scale)
  double = lambda p: {**p, "hidden": {**p["hidden"], "kernel": p["hidden"]["kernel"] * 2}}
  function = jax.tree_util.Partial(halved, jnp.float32(2))
  again = [mj.Subject(function, double(params)) for params in RETRAINED]
  report = audited(head_dropped(), retrained=again, metrics=["features", "prototype"])
  for name, result in report.results.items():
    if not name.endswith("thresholds"):
      assert result == told[1].results[name]


def test_features_may_be_given():
  features_fn = lambda params, inputs: {"input": inputs[:, None], "shifted": inputs + 1}
  report = audited(head_dropped(), features_fn=features_fn, metrics=["features"])
  assert report.stages == ("input", "shifted")
  for name in report.stages:  # nothing that a Retrain could have lost
    assert report.verdict(f"probe, {name}") == "cannot tell"
  assert "all stages: cannot tell" in str(report)
  one = mj.Subject(model, BEFORE, lambda params, inputs: {"input": inputs})
  with pytest.raises(ValueError, match=r"retrained 0: its stages are .'input': 5., and"):
    audited(head_dropped(), retrained=[one], features_fn=features_fn, metrics=["features"])


# Bad input ---------------------------------------------------------------------------------------


def without(labels_of, wanted):
  return [(x[labels_of(y)], y[labels_of(y)]) for x, y in wanted]


def poisoned(value):
  return {**BEFORE, "hidden": {**BEFORE["hidden"], "bias": np.full(WIDTH, value, np.float32)}}


def wider(classes):
  return {
    **BEFORE,
    "head": {
      "kernel": np.ones((WIDTH, classes), np.float32),
      "bias": np.zeros(classes, np.float32),
    },
  }


BAD = {
  "iterator": ({"test": iter(TEST)}, TypeError, r"test: got an iterator.*test=list\(batches\)"),
  "no batches": ({"train": []}, ValueError, "train: yielded nothing"),
  "class not in test": (
    {"test": without(lambda y: y > 0, TEST)},
    ValueError,
    r"test: holds no example of classes \[0\]",
  ),
  "no kept class": (
    {"test": without(lambda y: y == 0, TEST)},
    ValueError,
    "forgotten classes alone",
  ),
  "unknown class": ({"classes": [7]}, ValueError, r"classes: got 7; expected integers in \[0, 4\)"),
  "all classes": ({"classes": range(4)}, ValueError, "expected at least one class to keep"),
  "one model for several": (
    {"retrained": BEFORE},
    TypeError,
    "retrained: got dict; expected a list",
  ),
  "other classes": (
    {"retrained": [wider(5)]},
    ValueError,
    r"retrained 0: params\['head'\]\['bias'\]",
  ),
  "other tree": ({"retrained": [{"head": BEFORE["head"]}]}, ValueError, "retrained 0: its tree"),
  "NaN params": (
    {"retrained": [poisoned(np.nan)]},
    ValueError,
    "retrained 0: NaN or inf in params",
  ),
  "saw the class": ({"retrained": [BEFORE]}, ValueError, "retrained 0: gets 100% of class 0 right"),
  "twice the same": (
    {"retrained": [RETRAINED[0], RETRAINED[0]]},
    ValueError,
    "retrained 1: has the same params as retrained 0",
  ),
  "unknown metric": ({"metrics": ["probes"]}, ValueError, "metrics: got 'probes'. Did you mean"),
  "one metric as text": ({"metrics": "outputs"}, TypeError, "expected a list of names"),
  "codes of other inputs": ({"codes": np.ones((4, 1, 2))}, ValueError, r"expected \(4, K, 5\)"),
  "done of another audit": (
    {"done": {"request": {"classes": [1]}}},
    ValueError,
    "done: is of another audit: classes, metrics",
  ),
  "done cut in the middle": ({"done": {"request": "{"}}, TypeError, "done: got dict"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
  more, error, message = BAD[case]
  with pytest.raises(error, match=message):
    audited(head_dropped(), **{"retrained": [], "metrics": ["outputs"], **more})


def test_logits_that_are_nan_are_refused():
  with pytest.raises(ValueError, match="after: NaN or inf among the logits"):
    audited(poisoned(np.float32(3e38)), retrained=[], metrics=["outputs"])


def test_shuffled_batches_are_refused():
  class Shuffled:
    def __init__(self):
      self.turn = 0

    def __iter__(self):
      self.turn += 1
      return iter(TEST if self.turn == 1 else [(x[::-1], y[::-1]) for x, y in TEST])

  with pytest.raises(ValueError, match="test: yielded other labels than the first time"):
    audited(head_dropped(), test=Shuffled(), retrained=[], metrics=["outputs"])


# Stages, the attacks on params -------------------------------------------------------------------


def test_stages_are_the_arrays_at_the_sites_of_a_projection():
  params, inputs = nets.draw(), nets.codes_of()[:, 0]
  found = jax.jit(functools.partial(stages.of_program, Static(nets.dense), []))(params, inputs)
  arrays, _ = reference.residual_net(nets.host(params), inputs.astype(np.float64))
  assert found.names == ("k1", "k2", "k3", "k4", "k5", "head input")
  wanted = [arrays[name].mean(1) for name in ("z1", "u", "z2", "v", "z3")]
  wanted.append(np.tanh(arrays["z3"]).mean(1))
  for array, mean in zip(found.arrays, wanted, strict=True):
    np.testing.assert_allclose(array, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["scan", "scan of remat"])
def test_stages_in_a_scan_are_those_of_its_layers_one_by_one(wrap):
  params, inputs = nets.stacked_params(), nets.codes_of(2)[:, 0]
  read = jax.jit(stages.of_program, static_argnums=0)
  found = read(Static(functools.partial(nets.scanned, wrap=wrap)), [], params, inputs)
  alone = read(Static(nets.unrolled), [], params, inputs)
  plan = mj.explain_projection(functools.partial(nets.scanned, wrap=wrap), params, inputs)
  assert found.names == (*(site.name for site in plan.sites), "head input")
  for array, wanted in zip(found.arrays, alone.arrays, strict=True):
    np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5)


def test_the_prototype_attack_edits_one_row_and_its_bias():
  features = np.random.default_rng(0).normal(size=(5, WIDTH))
  network = stages.look(Static(model), [], BEFORE, TEST[0][0])
  moved = prototype.attacked(network, BEFORE, {2: features})
  row = reference.prototype_row(BEFORE["head"]["kernel"].T, 2, features)
  np.testing.assert_allclose(moved["head"]["kernel"][:, 2], row, rtol=1e-5)
  assert moved["head"]["bias"][2] == pytest.approx(BEFORE["head"]["bias"][[0, 1, 3]].mean())
  kept = [0, 1, 3]
  np.testing.assert_array_equal(
    np.asarray(moved["head"]["kernel"])[:, kept], BEFORE["head"]["kernel"][:, kept]
  )
  np.testing.assert_array_equal(moved["hidden"]["kernel"], BEFORE["hidden"]["kernel"])


def test_relearning_takes_the_steps_of_sgd_with_momentum():
  """Softmax regression by hand; the gradient's norm is clipped at 2."""
  rng = np.random.default_rng(0)
  inputs, labels = 9 * rng.normal(size=(4, 3)), np.array([0, 1, 1, 0])
  params = {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}
  speed = {name: np.zeros_like(x) for name, x in params.items()}
  clipped = 0
  for _ in range(3):
    each = [
      reference.regression_gradient(params, *pair) for pair in zip(inputs, labels, strict=True)
    ]
    mean = {name: np.mean([one[name] for one in each], axis=0) for name in params}
    norm = np.sqrt(sum((x**2).sum() for x in mean.values()))
    clipped += norm > 2
    speed = {name: 0.9 * speed[name] + mean[name] * min(1, 2 / norm) for name in params}
    params = {name: params[name] - 0.01 * speed[name] for name in params}
  assert clipped, "the case must clip"
  start = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
  function = lambda p, x: x @ p["kernel"] + p["bias"]
  batch = jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)
  ((_, found),) = relearn.fine_tuned(function, start, lambda step: batch, (3,))
  for name, wanted in params.items():
    np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-7)


def test_each_of_many_models_learns_from_its_own_examples_alone():
  inputs, labels = examples(0, 40)
  members = np.stack([labels != 0, labels != 3])
  train = lambda x: likelihood_ratio.train_many(
    jax.random.key(0), x, labels, members, num_classes=CLASSES, hidden=8, steps=60, batch=16
  )
  found = train(inputs)
  answers = np.asarray(jax.vmap(likelihood_ratio.logits, (0, None))(found, inputs)).argmax(-1)
  for own, right in zip(members, answers == labels, strict=True):
    assert right[own].mean() > 0.95 and right[~own].mean() == 0
  other = train(np.where((labels == 0)[:, None], np.float32(7), inputs))
  same = jax.tree.map(lambda a, b: [bool((a[i] == b[i]).all()) for i in (0, 1)], found, other)
  assert same["hidden"]["kernel"] == [True, False], "the first model has not seen class 0"
