"""Projection(heal=) and Relearn: distilling the model as it was, against NumPy twins."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from toys import assert_trees_close, cpu_mesh, host, make_params, mlp, place

import mnemonic_jax as mj
from mnemonic_jax import models
from mnemonic_jax.methods import behind, distilling, network, projection, relearn
from mnemonic_jax.methods.problem import plan_of_logits
from mnemonic_jax.methods.request import resolve, sides_of

pytestmark = pytest.mark.filterwarnings("ignore:The model classifies")

CLASSES, FEATURES = 4, 5
PARAMS = make_params("mlp")
FORGET, KEPT = [1], np.array([True, False, True, True])


def recalled(per_class=8, classes=CLASSES, shape=(FEATURES,), seed=0):
  """Codes as they are recalled from a model alone: no judges."""
  codes = jax.random.normal(jax.random.key(seed), (classes, per_class, *shape))
  none = jnp.zeros((classes, 0))
  return mj.LearnedCodes(codes, codes[:, :0], none, none, none, codes[:, :0])


CODES = recalled()


def problem_of(logits_fn=mlp, params=PARAMS, codes=CODES, classes=FORGET, mask=None, kept=None):
  sides = sides_of(codes, classes, ())
  return resolve(logits_fn, params, codes, sides, None, mask, None, "highest", None, kept)


def changed(before, after):
  """The names of the leaves that differ."""
  paths = jax.tree.leaves_with_path(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after))
  return {jax.tree_util.keystr(path, simple=True, separator=".") for path, moved in paths if moved}


# Distilling --------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_twin():
  rng = np.random.default_rng(0)
  teacher, student = rng.normal(size=(2, 7, CLASSES)).astype(np.float32) * 3
  found = distilling.divergence(jnp.asarray(teacher), jnp.asarray(student), jnp.asarray(KEPT))
  wanted = reference.divergence(*(x.astype(np.float64) for x in (teacher, student)), KEPT)
  assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["small", "clipped"])
def test_healing_is_that_of_the_twin(scale):
  """Three steps of SGD on the batches that were drawn, from the params that the cut gives."""
  old = {**PARAMS, "kernel2": scale * PARAMS["kernel2"]}
  problem, method = problem_of(params=old), mj.Projection(depth=1, heal=3)
  state = method.init(problem)
  start = host(distilling.whole(problem, state.leaves))
  key = lambda step: jax.random.fold_in(jax.random.key(0), step)
  batches = [distilling.batch(problem, CODES.codes, key(step), step, 16) for step in range(3)]
  advance = jax.jit(lambda problem, state: method.advance(problem, state))
  for _ in range(3):
    state = advance(problem, state)
  found = distilling.whole(problem, state.leaves)
  wanted = reference.healed(
    start, host(old), host(batches), KEPT, list(PARAMS), rate=0.002, momentum=0.9, largest=2.0
  )
  moved = jax.tree.map(lambda new, old: new - old, host(found), start)
  expected = jax.tree.map(lambda new, old: new - old, wanted, start)
  for name in PARAMS:
    np.testing.assert_allclose(moved[name], expected[name], rtol=0.02, atol=2e-6 * scale)


def test_batches_hold_kept_classes_alone():
  """Class 1 is forgotten, 3 was before; each of the others is drawn as often."""
  one_hot = jnp.broadcast_to(jnp.eye(CLASSES)[:, None], (CLASSES, 8, CLASSES))
  codes = dataclasses.replace(CODES, codes=one_hot)
  sides = jnp.array([False, True, False, False]), jnp.array([True, False, True, False])
  linear = lambda p, x: x @ p
  problem = resolve(linear, jnp.eye(CLASSES), codes, sides, None, None, None, "highest", None)
  drawn = [
    distilling.batch(problem, one_hot, jax.random.key(i), step, 16)
    for i, step in enumerate((0, 2, 4, 1))
  ]
  total = np.asarray(sum(drawn[:3])).sum(0)
  assert total[1] == total[3] == 0 and abs(total[0] - total[2]) < 150
  mixed = np.asarray(drawn[3])
  assert np.any((mixed > 0.01) & (mixed < 0.99)) and np.all(mixed[:, [1, 3]] == 0)
  np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-5)


def test_pictures_are_flipped_and_shifted():
  """A code of one bright column, drawn at even steps: it moves by one place, and to the other side.

  A third of the side would be 5; an eighth is 2.
  """
  picture = jnp.zeros((16, 16, 1)).at[:, 4].set(1.0)
  codes = dataclasses.replace(CODES, codes=jnp.broadcast_to(picture, (CLASSES, 8, 16, 16, 1)))
  model = lambda p, x: x.reshape(len(x), -1) @ p
  problem = problem_of(model, jnp.ones((256, CLASSES)), codes)
  places = set()
  for i in range(30):
    drawn = np.asarray(distilling.batch(problem, codes.codes, jax.random.key(i), 0, 8))
    columns = drawn[..., 0].sum(1).argmax(1)
    places |= set(columns.tolist())
    assert len(set(columns.tolist())) == 2  # all are shifted together; half of them are flipped
  assert places == {2, 3, 4, 5, 6} | {9, 10, 11, 12, 13}


def test_half_of_a_batch_are_kept_examples():
  kept = [(np.full((3, FEATURES), 100.0, np.float32), np.array([0, 2, 3]))]
  problem = problem_of(kept=kept)
  drawn = np.asarray(distilling.batch(problem, CODES.codes, jax.random.key(0), 0, 16))
  assert np.sum(np.all(drawn == 100, axis=1)) == 64


# What is trained ---------------------------------------------------------------------------------

RESNET = models.make("resnet10_small", shape=(8, 8, 3), num_classes=3, width=4)
RESNET_PARAMS, RESNET_STATE = RESNET.init(jax.random.key(0))
PICTURES = recalled(64, 3, (8, 8, 3))


def test_what_comes_before_the_first_cut_of_a_resnet_is_not_trained():
  problem = problem_of(RESNET.logits_fn(RESNET_STATE), RESNET_PARAMS, PICTURES)
  model = network.look(problem)
  which = model.used_from(model.at_depth(2), RESNET_PARAMS)
  trained = jax.tree.unflatten(jax.tree.structure(RESNET_PARAMS), which)
  moved = {name for name, part in trained.items() if any(map(np.any, jax.tree.leaves(part)))}
  assert moved == {"stage3_block1", "stage4_block1", "head"}
  assert not trained["stage3_block1"]["conv1"]["kernel"]
  assert trained["stage3_block1"]["conv2"]["kernel"] and trained["stage4_block1"]["conv1"]["kernel"]


def stacked(params, inputs):
  def step(x, layer):
    return jax.nn.relu(x + jnp.tanh(x @ layer["k"]) @ layer["out"]), None

  x, _ = jax.lax.scan(step, inputs @ params["first"], params["layers"])
  return x @ params["head"] + params["bias"]


def unrolled(params, inputs):
  x = inputs @ params["first"]
  for i in range(3):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    x = jax.nn.relu(x + jnp.tanh(x @ layer["k"]) @ layer["out"])
  return x @ params["head"] + params["bias"]


def stacked_params():
  rng = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
  layers = {"k": draw(3, 6, 6), "out": draw(3, 6, 6)}
  return {"first": draw(FEATURES, 6), "layers": layers, "head": draw(6, 4), "bias": draw(4)}


def test_layers_that_are_scanned_heal_one_by_one():
  params, method = stacked_params(), mj.Projection(depth=2, heal=3)
  found = mj.forget(stacked, params, CODES, FORGET, method=method).params
  wanted = mj.forget(unrolled, params, CODES, FORGET, method=method).params
  kernels = found["layers"]["k"] != params["layers"]["k"]
  assert kernels.any((1, 2)).tolist() == [False, False, True]
  # Slices of one leaf are one leaf to the unrolled model: it heals where its first use is behind.
  assert not bool(jnp.any(wanted["layers"]["k"] != params["layers"]["k"]))
  scanned = {**found["layers"], "k": params["layers"]["k"]}
  assert changed(scanned, params["layers"]) == {"out"}


def test_what_is_masked_or_not_trained_stays():
  mask = {"kernel1": True, "bias1": False, "kernel2": True, "bias2": True}
  method = mj.Projection(depth=1, heal=3)
  found = mj.forget(mlp, PARAMS, CODES, FORGET, method=method, mask=mask).params
  assert changed(found, PARAMS) == {"kernel1", "kernel2", "bias2"}


# forget ------------------------------------------------------------------------------------------


def kept_distance(params):
  inputs = CODES.codes[KEPT].reshape(-1, FEATURES)
  return float(distilling.divergence(mlp(PARAMS, inputs), mlp(params, inputs), jnp.asarray(KEPT)))


def test_healing_brings_the_kept_logits_back_and_nothing_of_the_class():
  run = lambda heal: mj.forget(mlp, PARAMS, CODES, FORGET, method=mj.Projection(depth=1, heal=heal))
  cut, healed = run(0), run(300)
  assert kept_distance(healed.params) < 0.6 * kept_distance(cut.params)
  logits = np.asarray(mlp(healed.params, jax.random.normal(jax.random.key(5), (50, FEATURES))))
  np.testing.assert_allclose(logits[:, 1], logits[:, KEPT].mean(1) - 1, atol=1e-4)
  assert healed.info["margin"] and healed.method == mj.Projection(depth=1, heal=300)


def test_with_the_row_kept_the_head_is_cut_before_it_heals():
  method = mj.Projection(depth=1, drop_row=False, heal=2)
  healed = mj.forget(mlp, PARAMS, CODES, FORGET, method=method)
  cut = mj.forget(mlp, PARAMS, CODES, FORGET, method=dataclasses.replace(method, heal=0))
  assert_trees_close(healed.params, cut.params, rtol=0.05, atol=0.02)
  assert "kernel2" in changed(healed.params, cut.params) and not healed.info["margin"]


METHODS = {
  "heal": mj.Projection(depth=1, heal=4),
  "relearn": mj.Relearn(2, make_params("mlp", 7), 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_one_goes_on_bit_for_bit(name):
  method, codes, states, calls = METHODS[name], recalled(64), [], []
  whole = mj.forget(
    mlp, PARAMS, codes, FORGET, method=method, on_state=states.append,
    progress=lambda *done: calls.append(done),
  )  # fmt: skip
  rest = mj.forget(mlp, PARAMS, codes, FORGET, method=method, state=states[1])
  assert whole.info.get("training_mode", False) is False  # no train_fn was given
  assert not changed(whole.params, rest.params) and calls == [(i, 4) for i in (1, 2, 3, 4)]
  with pytest.raises(ValueError, match="state: got"):
    mj.forget(mlp, PARAMS, codes, FORGET, method=method, state=states[0]._replace(leaves=[]))


def test_the_depth_is_searched_before_healing(monkeypatch):
  """With judges that are right, and then at any price, so that the deepest is taken."""
  inputs = 2 * jax.random.normal(jax.random.key(7), (800, FEATURES))
  params = {**PARAMS, "bias2": PARAMS["bias2"] - mlp(PARAMS, inputs).mean(0)}
  data = [(inputs, jnp.argmax(mlp(params, inputs), -1))]
  codes = mj.learn_codes(jax.random.key(8), mlp, params, data, num_classes=CLASSES, recall=8)
  monkeypatch.setattr(projection, "_CHEAP", 1.0)
  found = mj.forget(mlp, params, codes, FORGET, method=mj.Projection(heal=2))
  assert found.method == mj.Projection(depth=1, heal=2)
  assert found.info["curve_retain_accuracy"].shape == (2,)
  wanted = mj.forget(mlp, params, codes, FORGET, method=found.method)
  assert not changed(found.params, wanted.params)
  monkeypatch.setattr(projection, "_CHEAP", -1.0)
  with pytest.raises(ValueError, match="heal: got 2, but the search takes depth 0"):
    mj.forget(mlp, params, codes, FORGET, method=mj.Projection(heal=2))


def test_a_state_of_another_request_is_refused():
  codes, states = recalled(64), []
  method = METHODS["heal"]
  mj.forget(mlp, PARAMS, codes, FORGET, method=method, on_state=states.append)
  other = make_params("mlp", 3)
  calls = {
    "params": lambda state: mj.forget(mlp, other, codes, FORGET, method=method, state=state),
    "classes": lambda state: mj.forget(mlp, PARAMS, codes, [2], method=method, state=state),
    "codes": lambda state: mj.forget(mlp, PARAMS, CODES, FORGET, method=method, state=state),
    "steps": lambda state: mj.forget(
      mlp, PARAMS, codes, FORGET, method=mj.Projection(depth=1, heal=5), state=state
    ),
    "done": lambda state: mj.forget(
      mlp, PARAMS, codes, FORGET, method=method, state=state._replace(done=jnp.int32(9))
    ),
  }
  for call in calls.values():
    with pytest.raises(ValueError, match="state: it is of another request"):
      call(states[1])


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_params_keep_their_dtype_and_learn_in_float32(name):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  fresh = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params("mlp", 7))
  method = {"heal": METHODS["heal"], "relearn": mj.Relearn(2, fresh, 4)}[name]
  codes = jax.tree.map(lambda x: x.astype(jnp.bfloat16), recalled(64))
  states = []
  found = mj.forget(mlp, half, codes, FORGET, method=method, on_state=states.append)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {"bfloat16"}
  assert {leaf.dtype.name for leaf in states[-1].leaves} == {"float32"}


@pytest.mark.parametrize("name", METHODS)
def test_params_on_a_mesh_heal_alike(name):
  codes, mesh = recalled(64), cpu_mesh(4)
  on_one = mj.forget(mlp, PARAMS, codes, FORGET, method=METHODS[name])
  placed = place(PARAMS, mesh)
  found = mj.forget(mlp, placed, codes, FORGET, method=METHODS[name])
  assert_trees_close(found.params, on_one.params, rtol=1e-4, atol=1e-5)
  same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found.params, placed)
  assert all(jax.tree.leaves(same))


# Relearn -----------------------------------------------------------------------------------------


def renewed_modules(logits_fn, params, inputs, depth):
  return set(relearn.modules(relearn.renewed(logits_fn, params, inputs, depth)))


@pytest.mark.parametrize(
  ("depth", "wanted"),
  [(1, {"stage4_block1"}), (2, {"stage3_block1", "stage4_block1"})],
)
def test_a_stage_of_a_resnet_starts_at_what_two_kernels_read(depth, wanted):
  inputs = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
  fn = RESNET.logits_fn(RESNET_STATE)
  assert renewed_modules(fn, RESNET_PARAMS, inputs, depth) == wanted


def test_a_stage_of_a_plain_model_starts_at_a_site():
  inputs = jax.ShapeDtypeStruct((1, FEATURES), "float32")
  three = {"a": jnp.eye(5), "b": jnp.eye(5), "c": jnp.eye(5), "head": jnp.ones((5, 4))}
  plain = lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]) @ p["head"]
  assert renewed_modules(plain, three, inputs, 2) == {"c"}
  assert renewed_modules(plain, three, inputs, 3) == {"b", "c"}
  assert renewed_modules(plain, three, inputs, 4) == {"a", "b", "c"}
  with pytest.raises(ValueError, match="depth: got 5; this model has 4 arrays"):
    relearn.renewed(plain, three, inputs, 5)


def test_a_stage_of_a_transformer_with_one_kernel_for_attention_starts_at_its_stream():
  """In a scan too, where a leaf of stacked blocks is renewed in part."""
  sizes = {"shape": (16, 16, 3), "num_classes": 3}
  inputs = jax.ShapeDtypeStruct((1, 16, 16, 3), "float32")
  apart, scanned = (models.make("vit_ti16", **sizes, scan=scan) for scan in (False, True))
  params, state = jax.eval_shape(apart.init, jax.random.key(0))
  assert renewed_modules(apart.logits_fn(state), params, inputs, 1) == {"norm"}
  assert renewed_modules(apart.logits_fn(state), params, inputs, 3) == {"norm", "block12"}
  params, state = jax.eval_shape(scanned.init, jax.random.key(0))
  stacked = relearn.renewed(scanned.logits_fn(state), params, inputs, 3)["blocks"]
  for leaf in jax.tree.leaves(stacked):
    assert np.asarray(leaf).ravel().tolist() == [False] * 11 + [True]


def attending(params, inputs):
  """A stage starts at what queries, keys and values are read from."""
  for layer in params["layers"]:
    x = jnp.tanh(inputs)
    q, k, v = (x @ layer[name] for name in "qkv")
    inputs = inputs + jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v @ layer["out"]
  return inputs.mean(1) @ params["head"]


def test_a_stage_starts_at_what_three_kernels_read():
  layer = {name: jnp.eye(5) for name in ("q", "k", "v", "out")}
  params = {"layers": [layer, layer], "head": jnp.ones((5, 4))}
  which = relearn.renewed(attending, params, jnp.ones((1, 3, 5)), 1)
  found = [[bool(np.all(leaf)) for leaf in jax.tree.leaves(part)] for part in which["layers"]]
  assert found == [[False] * 4, [True] * 4] and not which["head"]


def renew(steps=40, **settings):
  fresh, _ = RESNET.init(jax.random.key(9))
  training = {
    "train_fn": RESNET.train_fn(("stage4_block1",)),
    "fold_fn": RESNET.fold_fn(RESNET_STATE),
    "statistics": RESNET_STATE,
  }
  return mj.Relearn(1, fresh, steps, **(training | settings))


def test_the_last_stage_is_learned_anew_in_training_mode():
  states = []
  logits_fn = RESNET.logits_fn(RESNET_STATE)
  found = mj.forget(logits_fn, RESNET_PARAMS, PICTURES, [1], method=renew(), on_state=states.append)
  assert found.info["training_mode"] and found.info["margin"]
  moved = changed(found.params, RESNET_PARAMS)
  assert {name.split(".")[0] for name in moved} == {"stage4_block1", "head"}
  # The folded params give, with the old statistics, what the trained ones give with theirs.
  problem = problem_of(logits_fn, RESNET_PARAMS, PICTURES)
  trained = distilling.whole(problem, states[-1].leaves)
  inputs = PICTURES.codes[:, :4].reshape(-1, 8, 8, 3)
  wanted = RESNET.logits_fn(states[-1].statistics)(trained, inputs)[:, jnp.array([0, 2])]
  logits = logits_fn(found.params, inputs)
  np.testing.assert_allclose(logits[:, jnp.array([0, 2])], wanted, atol=1e-4)
  distance = lambda params: float(
    distilling.divergence(
      logits_fn(RESNET_PARAMS, inputs), logits_fn(params, inputs), jnp.array([True, False, True])
    )
  )
  assert distance(found.params) < distance({**RESNET_PARAMS, **_fresh_stage()})


def _fresh_stage():
  return {"stage4_block1": RESNET.init(jax.random.key(9))[0]["stage4_block1"]}


def test_folding_statistics_that_stayed_changes_no_bit():
  """Trained scales are no round numbers: s * a / a is not always s."""
  draw = lambda leaf: leaf * jax.random.uniform(jax.random.key(9), leaf.shape, minval=0.5)
  params, state = jax.tree.map(draw, (RESNET_PARAMS, RESNET_STATE))
  assert_trees_close(RESNET.fold_fn(state)(params, state), params, 0, 0)


def test_folding_changes_nothing_but_whose_statistics_serve():
  inputs = jax.random.normal(jax.random.key(2), (16, 8, 8, 3))
  _, statistics = RESNET.apply(RESNET_PARAMS, RESNET_STATE, 3 * inputs, True)
  folded = RESNET.fold_fn(RESNET_STATE)(RESNET_PARAMS, statistics)
  wanted = RESNET.logits_fn(statistics)(RESNET_PARAMS, inputs)
  assert_trees_close(RESNET.logits_fn(RESNET_STATE)(folded, inputs), wanted, 1e-4, 1e-4)
  assert float(jnp.abs(RESNET.logits_fn(RESNET_STATE)(RESNET_PARAMS, inputs) - wanted).max()) > 1e-2


# Bad input ---------------------------------------------------------------------------------------

HEAL = mj.Projection(depth=1, heal=2)
EXAMPLES = np.zeros((2, FEATURES), np.float32)
FRESH = make_params("mlp", 7)
BAD = {
  "heal below 0": (
    lambda: mj.Projection(heal=-1), "heal: got -1; expected an integer of at least 0"
  ),
  "too few codes to heal": (
    lambda: mj.forget(mlp, PARAMS, recalled(7), FORGET, method=HEAL),
    "codes: got 7 recalled codes a class; Projection.heal=2. learns from 8 or more. Make them: .*"
    "recall=8",
  ),
  "plain codes": (
    lambda: mj.forget(mlp, PARAMS, CODES.codes, FORGET, method=HEAL),
    "codes: got 0 recalled codes a class",
  ),
  "too few codes to relearn from": (
    lambda: mj.forget(mlp, PARAMS, CODES, FORGET, method=mj.Relearn(1, FRESH, 2)),
    "codes: got 8 recalled codes a class; Relearn learns from 64 or more",
  ),
  "heal in a traced step": (
    lambda: mj.forget_step(mlp, PARAMS, CODES, *problem_sides(), HEAL),
    "method: Projection takes 2 steps from Python.*mnemonic_jax.forget",
  ),
  "relearn in a traced step": (
    lambda: mj.forget_step(mlp, PARAMS, CODES, *problem_sides(), mj.Relearn(1, FRESH, 2)),
    "method: Relearn takes 2 steps",
  ),
  "kept without heal": (
    lambda: mj.forget(mlp, PARAMS, CODES, FORGET, kept=[(EXAMPLES, [0, 2])]),
    "kept: Projection.* reads no examples",
  ),
  "kept examples of the class": (lambda: with_kept(EXAMPLES, [0, 1]), r"examples of classes \[1\]"),
  "labels beyond C": (lambda: with_kept(EXAMPLES, [0, 4]), r"examples of classes \[4\]"),
  "kept of another shape": (lambda: with_kept(EXAMPLES[:, :4], [0, 2]), "expected .N, 5. and"),
  "kept labels missing": (lambda: with_kept(EXAMPLES, [0]), "with labels .1,."),
  "kept without examples": (
    lambda: with_kept(EXAMPLES[:0], np.zeros(0, int)), "kept: holds no example"
  ),
  "kept NaN": (lambda: with_kept(EXAMPLES + np.nan, [0, 2]), "not finite"),
  "kept no batches": (lambda: forget_with(3), "kept: got .*expected batches"),
  "kept arrays": (lambda: forget_with([EXAMPLES]), "kept: yielded .*expected batches"),
  "fresh of another shape": (
    lambda: renewed_by(make_params("mlp", 7, hidden=7)), "fresh: got .*; expected params of the"
  ),
  "fresh of another dtype": (
    lambda: renewed_by(jax.tree.map(lambda x: x.astype(jnp.bfloat16), FRESH)), "fresh: got"
  ),
  "fresh of another structure": (lambda: renewed_by(list(FRESH.values())), "fresh: got"),
  "fresh that is not": (lambda: renewed_by(PARAMS), "fresh: equals params"),
  "fresh NaN": (
    lambda: renewed_by({**FRESH, "bias1": FRESH["bias1"] * jnp.nan}), "fresh: got NaN or inf"
  ),
  "a depth of 0": (lambda: mj.Relearn(0, FRESH, 2), "depth: got 0"),
  "no steps": (lambda: mj.Relearn(1, FRESH, 0), "steps: got 0"),
  "too deep": (
    lambda: mj.forget(mlp, PARAMS, recalled(64), FORGET, method=mj.Relearn(3, FRESH, 2)),
    "depth: got 3; this model has 2",
  ),
  "nothing behind": (
    lambda: mj.forget(mlp, PARAMS, recalled(64), FORGET, method=mj.Relearn(1, FRESH, 2)),
    "depth: no kernel lies behind",
  ),
  "train_fn without fold_fn": (lambda: renew(2, fold_fn=None), "train_fn: got one of train_fn and"),
  "train_fn without statistics": (lambda: renew(2, statistics=None), "statistics: got"),
  "all masked": (
    lambda: mj.forget(
      mlp, PARAMS, recalled(64), FORGET, method=mj.Relearn(2, FRESH, 2),
      mask={"kernel1": False, "bias1": True, "kernel2": True, "bias2": True},
    ),
    "depth: no kernel lies behind .* or the mask leaves them out",
  ),
  "heal without a cut": (
    lambda: mj.Projection(depth=0, heal=2), "heal: got 2 with depth=0, which cuts nothing"
  ),
  "no depth for recalled codes": (
    lambda: mj.forget(mlp, PARAMS, CODES, FORGET, method=mj.Projection(heal=2)),
    "heal: got 2, but the search takes depth 0",
  ),
  "one kept class": (
    lambda: mj.forget(mlp, PARAMS, CODES, [0, 1, 2], method=HEAL), "classes: one class is kept"
  ),
  "a rate of 0": (lambda: mj.Relearn(1, FRESH, 2, rate=0.0), "rate: got 0.0; expected a positive"),
  "a rate that is none": (lambda: mj.Relearn(1, FRESH, 2, rate="x"), "rate: got 'x'"),
  "recalled of other classes": (
    lambda: with_recalled(CODES.codes[:3]), r"codes: recalled ones have shape \(3, 8, 5\)"
  ),
  "recalled of another shape": (
    lambda: with_recalled(CODES.codes[:, :, :4]), "codes: recalled ones have shape"
  ),
  "recalled integers": (lambda: with_recalled(CODES.codes.astype(int)), "codes: recalled ones are"),
  "recalled NaN": (lambda: with_recalled(CODES.codes * jnp.nan), "recalled ones hold NaN or inf"),
  "training mode before the stage": (
    lambda: renewed_net(train_fn=RESNET.train_fn()), "train_fn: moves the statistics behind"
  ),
  "a train_fn of another shape": (
    lambda: renewed_net(train_fn=lambda p, s, x: (x[:, 0, 0, :1], s)), "train_fn: returned logits"
  ),
  "a train_fn without statistics": (
    lambda: renewed_net(train_fn=lambda p, s, x: x), "train_fn, fold_fn: fail"
  ),
  "a fold_fn that fails": (
    lambda: renewed_net(fold_fn=lambda p, s: p["none"]), "train_fn, fold_fn: fail"
  ),
}  # fmt: skip


def with_recalled(codes):
  learned = dataclasses.replace(CODES, recalled=codes)
  return mj.forget(mlp, PARAMS, learned, FORGET, method=HEAL)


def renewed_net(**settings):
  method = renew(2, **settings)
  return mj.forget(RESNET.logits_fn(RESNET_STATE), RESNET_PARAMS, PICTURES, [1], method=method)


def problem_sides():
  return jnp.asarray(~KEPT), jnp.asarray(KEPT)


def forget_with(kept):
  return mj.forget(mlp, PARAMS, CODES, FORGET, method=HEAL, kept=kept)


def with_kept(inputs, labels):
  return forget_with([(inputs, np.asarray(labels))])


def renewed_by(fresh, logits_fn=mlp):
  return mj.forget(logits_fn, PARAMS, recalled(64), FORGET, method=mj.Relearn(2, fresh, 2))


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
  call, message = BAD[name]
  with pytest.raises((ValueError, TypeError), match=message):
    call()


# Positions ---------------------------------------------------------------------------------------


def test_arrays_before_count_what_comes_first():
  params = {"a": jnp.eye(5), "b": jnp.eye(5), "bias": jnp.ones(5), "head": jnp.ones((5, 4))}
  model = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"] + p["bias"]) @ p["head"]
  planned = plan_of_logits(*relearn._functions.split(model), params, jnp.ones((1, 5)), (True,) * 4)
  seen = network.of_plan(planned, params)
  found = behind.arrays_before(planned, seen.places)
  assert {i: int(found[i]) for i in range(4)} == {0: 0, 1: 1, 2: 1, 3: 2}


def normed(params, inputs):
  """A cast of all params at the top; a bias and a scale that each example has a copy of."""
  p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  x = jnp.tanh(inputs @ p["a"])
  shortcut = x @ p["short"]  # before the other branch
  h = jnp.tanh(x @ p["b"] + p["b_bias"])
  x = jnp.tanh(shortcut + h @ p["c"]) * (1 + p["scale"] ** 2)
  return x @ p["head"] + p["bias"]


def test_casts_at_the_top_and_shortcuts_are_no_use_before_the_cut():
  names = {"a": (5, 5), "short": (5, 5), "b": (5, 5), "b_bias": (5,), "c": (5, 5), "scale": (5,)}
  names |= {"head": (5, 4), "bias": (4,)}
  params = {name: jnp.ones(shape) for name, shape in names.items()}
  planned = plan_of_logits(*relearn._functions.split(normed), params, jnp.ones((1, 5)), (True,) * 8)
  seen = network.of_plan(planned, params)
  which = dict(
    zip(sorted(params), map(bool, seen.used_from(seen.at_depth(1), params)), strict=True)
  )
  assert {name for name, used in which.items() if used} == {"short", "c", "scale", "head", "bias"}
