"""Codes of a trained model: learned from one pass over data, or recalled from it alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from toys import compiled_programs, cpu_mesh, make_params, mlp, place

import mnemonic_jax as mj
from mnemonic_jax import models
from mnemonic_jax._functions import Bound
from mnemonic_jax.learning import judges, margins, match, measure, predict, reads
from mnemonic_jax.learning import recall as recalling
from mnemonic_jax.models.resnet import ResNet

KEY = jax.random.key(0)
SEED = np.array([7, 9], np.uint32)
CLASSES, FEATURES = 4, 5


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_data(examples=400, seed=0):
  """Inputs around a centre for each class, and labels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(CLASSES, size=examples).astype(np.int32)
  centres = rng.normal(size=(CLASSES, FEATURES)) * 3
  inputs = centres[labels] + rng.normal(size=(examples, FEATURES))
  return inputs.astype(np.float32), labels


def in_batches(data, *sizes):
  """Batches of these sizes, the last size again and again."""
  start, sizes = 0, list(sizes)
  while start < len(data[1]):
    size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
    yield tuple(x[start : start + size] for x in data)
    start += size


PARAMS, DATA = make_params("mlp"), make_data()


def functions_of(logits_fn=mlp, params=PARAMS, features_fn=None, statistics_fn=None):
  return reads.split(logits_fn, features_fn, statistics_fn, params, CLASSES, "highest")


def measured(data=DATA, sizes=(64,), **change):
  return measured_of(in_batches(data, *sizes), **change)


def measured_of(batches, **change):
  return measure.measure(*functions_of(**change), *measure.checked(batches, CLASSES, None), SEED)


def learn(batches=None, **change):
  batches = in_batches(DATA, 64) if batches is None else batches
  arguments = {"key": KEY, "logits_fn": mlp, "params": PARAMS, "batches": batches}
  settings = {"num_classes": CLASSES, "steps": 50, "num_judges": 2, "min_members": 30}
  return mj.learn_codes(**(arguments | settings | change))


def hidden(inputs, params=PARAMS):
  return jax.nn.sigmoid(inputs @ params["kernel1"] + params["bias1"][None])


# The pass over data


@pytest.mark.parametrize("sizes", [(400,), (64,), (37, 64), (399, 1)])
def test_class_means_and_deviations_are_those_of_the_twin_in_any_batches(sizes):
  found, (inputs, labels) = measured(sizes=sizes), DATA
  for mean, deviation, vectors in zip(
    found.means, found.deviations, (inputs, hidden(inputs)), strict=True
  ):
    np.testing.assert_allclose(mean, reference.class_means(vectors, labels, CLASSES), 1e-5, 1e-6)
    np.testing.assert_allclose(deviation, reference.deviations(vectors), rtol=1e-5)
  np.testing.assert_array_equal(found.low, inputs.min(0))
  np.testing.assert_array_equal(found.high, inputs.max(0))


def test_masked_rows_count_nowhere():
  inputs, labels = DATA
  mask = np.arange(len(labels)) % 3 != 0
  noise = np.where(mask[:, None], inputs, np.nan).astype(np.float32)
  labelled = np.where(mask, labels, 99)
  found = measured_of(in_batches((noise, labelled, mask), 64))
  wanted = measured(data=(inputs[mask], labels[mask]), sizes=(50,))
  for a, b in zip(found.means, wanted.means, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found.reservoir.hashes, wanted.reservoir.hashes)


def test_a_channel_that_is_far_from_zero_keeps_its_deviation():
  inputs, labels = DATA
  found = measured(data=(inputs + np.float32(1e4), labels))
  np.testing.assert_allclose(found.deviations[0], measured().deviations[0], rtol=1e-2)


@pytest.mark.parametrize("sizes", [(400,), (37, 64)])
def test_the_reservoir_keeps_the_smallest_hashes_in_any_batches(sizes):
  inputs, labels = DATA
  vectors = np.asarray(hidden(inputs))
  kept = measure.Reservoir(SEED, CLASSES, vectors.shape[1], size=20)
  for rows in in_batches((np.arange(len(labels)), labels), *sizes):
    kept.add(vectors[rows[0]], rows[0] % 2 == 0, rows[1])
  for label, positions in enumerate(reference.reservoir(SEED, labels, CLASSES, 20)):
    found, right = kept.of(label)
    np.testing.assert_array_equal(found, vectors[positions])
    np.testing.assert_array_equal(right, np.array(positions) % 2 == 0)


def test_the_hash_of_a_position():
  positions = [0, 1, 5, 2**31, 2**32 - 1]
  wanted = [reference.position_hash(SEED, p) for p in positions]
  assert measure.hashed(SEED, np.array(positions)).tolist() == wanted


def test_right_answers_are_those_of_the_model():
  inputs, labels = DATA
  answers = np.asarray(mlp(PARAMS, inputs)).argmax(1)
  for label in range(CLASSES):
    _, margins = measured().reservoir.of(label)
    assert (margins > 0).mean() == (answers[labels == label] == label).mean()


# What is matched


def walked(logits_fn, params, inputs):
  functions, arrays = reads.split(logits_fn, None, None, params, CLASSES, "highest")
  found, logits = reads.reads_program(functions, arrays, inputs)
  np.testing.assert_allclose(logits, logits_fn(params, inputs), rtol=1e-4, atol=1e-5)
  return found


def close(found, wanted):
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_each_iteration_of_a_scan_counts_as_a_contraction(reverse):
  params = {"layers": draw(0, 3, 5, 5), "last": draw(1, 5, CLASSES)}

  def logits_fn(params, x):
    block = jax.checkpoint(lambda h, kernel: (jnp.tanh(h @ kernel), None))
    return jax.lax.scan(block, x, params["layers"], reverse=reverse)[0] @ params["last"]

  inputs = draw(2, 6, 5)
  layers = params["layers"][::-1] if reverse else params["layers"]
  second = jnp.tanh(inputs @ layers[0])
  third = jnp.tanh(second @ layers[1])
  close(walked(logits_fn, params, inputs), [third, jnp.tanh(third @ layers[2])])


def test_each_use_of_a_tied_leaf_counts_and_positions_are_averaged():
  params = {"first": draw(0, 3, 5), "tied": draw(1, 5, 5), "head": draw(2, 5, CLASSES)}

  def arrays_of(params, x):
    tokens = jnp.tanh(x.reshape(len(x), 2, 3) @ params["first"])
    once = jnp.tanh(tokens @ params["tied"])
    twice = jnp.tanh(once @ params["tied"].T)
    return tokens, once, twice

  def logits_fn(params, x):
    return arrays_of(params, x)[-1].mean(1) @ params["head"]

  inputs = draw(3, 6, 6)
  _, once, twice = arrays_of(params, inputs)
  close(walked(logits_fn, params, inputs), [once.mean(1), twice.mean(1)])


def test_the_last_half_of_the_contractions_is_matched_and_two_at_least():
  params = [draw(i, 5, 5) for i in range(6)] + [draw(7, 5, CLASSES)]

  def deep(params, x):
    for kernel in params[:-1]:
      x = jnp.tanh(x @ kernel)
    return x @ params[-1]

  assert len(walked(deep, params, draw(8, 3, 5))) == 4
  assert len(walked(deep, params[-3:], draw(8, 3, 5))) == 2
  assert len(walked(deep, params[-1:], draw(8, 3, 5))) == 1


def test_features_override_and_the_last_in_their_order_is_clustered():
  features_fn = lambda params, x: {"z": jnp.stack([x, 3 * x], 1), "a": hidden(x, params)}
  found = measured(features_fn=features_fn)
  inputs, labels = DATA
  np.testing.assert_allclose(
    found.means[0], reference.class_means(2 * inputs, labels, CLASSES), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(
    found.reservoir.vectors[..., -6:], measured().reservoir.vectors[..., -6:], strict=True
  )


# Judges


def test_clusters_are_of_members_nearest_their_mean_and_none_is_small():
  vectors = np.random.default_rng(0).normal(size=(300, 6))
  cluster = judges.k_means(vectors, 5, np.random.default_rng(1))
  centres = np.stack([vectors[cluster == k].mean(0) for k in range(5)])
  nearest = ((vectors[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(cluster, nearest)
  sizes = np.bincount(judges.joined(vectors, cluster, 70))
  assert sizes[sizes > 0].min() >= 70 and sizes.sum() == 300


def test_equal_vectors_are_one_cluster():
  cluster = judges.k_means(np.ones((9, 2)), 3, np.random.default_rng(0))
  assert len(set(judges.joined(np.ones((9, 2)), cluster, 2).tolist())) == 1


def test_centroids_stand_for_shares_of_a_class_and_few_examples_have_none():
  inputs, labels = DATA
  rows = np.flatnonzero(labels != 0)
  rows = np.concatenate([rows, np.flatnonzero(labels == 0)[:30]])
  kept = measured(data=(inputs[rows], labels[rows])).reservoir
  found = judges.centroids(kept, 6, 3, 40, np.random.default_rng(0))
  np.testing.assert_allclose(found.weights.sum(1), [0, 1, 1, 1], rtol=1e-6)
  assert not any(x[0].any() for x in (found.vectors, found.accuracy, found.spread))
  for label in range(1, CLASSES):
    vectors, of_class = kept.of(label)
    logits = np.asarray(mlp(PARAMS, inputs[labels == label]))
    wanted = [reference.margin(row, label) for row in logits]
    np.testing.assert_allclose(np.sort(of_class), np.sort(wanted), rtol=1e-4, atol=1e-5)
    there = found.are_there[label]
    members = found.weights[label][there] * len(vectors)
    assert members.min() >= 40 - 1e-3 and list(members) == sorted(members, reverse=True)
    mean = found.weights[label] @ found.vectors[label]
    np.testing.assert_allclose(mean, vectors.mean(0), rtol=1e-4, atol=1e-6)
    accuracy = found.weights[label] @ found.accuracy[label]
    np.testing.assert_allclose(accuracy, np.mean(of_class > 0), 1e-5)
    whole = judges.centroids(kept, 6, 1, 40, np.random.default_rng(0))
    np.testing.assert_allclose(whole.spread[label, 0], of_class.std(), rtol=1e-5)
    assert (found.spread[label][there] > 0).all()


# Predictions


def judged(seed=0, num_judges=3):
  rng = np.random.default_rng(seed)
  before = rng.normal(1.5, 1, size=(CLASSES, num_judges))
  after = before + rng.normal(-1, 1, size=before.shape)
  weights = rng.dirichlet(np.ones(num_judges), size=CLASSES)
  accuracy = rng.uniform(0.3, 0.99, size=before.shape)
  accuracy[0, 0], accuracy[1, 0], accuracy[2, 1] = 1, 1, 0
  spread = rng.uniform(0.1, 2, size=before.shape)
  spread[1, 1] = 0
  return [jnp.asarray(x, jnp.float32) for x in (before, after, weights, accuracy, spread)]


SIDES = np.array([True, False, False, False]), np.array([False, True, True, False])


@pytest.mark.parametrize("seed", range(3))
def test_predictions_are_those_of_the_twin(seed):
  arrays = judged(seed)
  wanted = reference.predict(*(np.asarray(x, np.float64) for x in arrays), [0], [1, 2])
  for function in (predict, jax.jit(predict)):
    np.testing.assert_allclose(function(*arrays, *SIDES)[:2], wanted, rtol=1e-3)


def test_before_forgetting_the_accuracy_is_the_measured_one():
  before, _, weights, accuracy, spread = judged()
  everyone, nobody = np.ones(CLASSES, bool), np.zeros(CLASSES, bool)
  a_r, *_ = predict(before, before, weights, accuracy, spread, nobody, everyone)
  np.testing.assert_allclose(a_r, jnp.sum(weights * accuracy) / CLASSES, atol=0.005)


def test_a_class_without_a_judge_is_left_out_of_a_r_and_has_no_e_f():
  before, after, weights, accuracy, spread = judged()
  absent = weights.at[2].set(0)
  a_r, e_f, _ = predict(before, after, absent, accuracy, spread, *SIDES)
  wanted = reference.predict(
    *(np.asarray(x, np.float64) for x in (before, after, absent, accuracy, spread)), [0], [1, 2]
  )
  np.testing.assert_allclose((a_r, e_f), wanted, rtol=1e-3)
  _, nothing, _ = predict(before, after, weights.at[0].set(0), accuracy, spread, *SIDES)
  assert np.isnan(nothing)
  assert np.all(np.isnan(predict(before, after, 0 * weights, accuracy, spread, *SIDES)[:2]))


def test_margins():
  logits = np.asarray(draw(0, CLASSES, 3, CLASSES))
  wanted = [[reference.margin(row, c) for row in logits[c]] for c in range(CLASSES)]
  np.testing.assert_allclose(margins(jnp.asarray(logits)), wanted, rtol=1e-6)


# Learning


def test_learned_codes_read_as_their_class_and_judges_as_their_centroid():
  found, known = learn(steps=300), measured()
  inputs = found.codes[:, 0]
  for read, mean, deviation in zip(
    (inputs, hidden(inputs)), known.means, known.deviations, strict=True
  ):
    for c in range(CLASSES):
      start = reference.match_loss(0 * mean[c], mean[c], deviation)
      assert reference.match_loss(read[c], mean[c], deviation) < 0.02 * max(start, 1)
  # Codes and judges are matched to the inputs too, which here they can be exactly.
  centre = lambda of: np.einsum("cj,cjf->cf", found.judge_weights, of)
  assert np.all(np.abs(centre(found.judges) - known.means[0]) < 0.3 * known.deviations[0])
  for c in range(CLASSES):
    vectors = hidden(found.judges[c])
    mean = found.judge_weights[c] @ vectors
    assert reference.match_loss(mean, known.means[1][c], known.deviations[1]) < 0.15


def test_the_loss_is_that_of_the_twin():
  known = measured()
  inputs, labels = DATA[0][:6], DATA[1][:6]
  counts = [np.ones(6, np.float32), np.arange(6, dtype=np.float32) % 2]
  targets = match.Targets([mean[labels] for mean in known.means], known.deviations, counts)
  found = match.distances([jnp.asarray(inputs), hidden(inputs)], targets)
  for n in range(6):
    losses = [
      reference.match_loss(read[n], mean[labels[n]], deviation)
      for read, mean, deviation in zip(
        (inputs, hidden(inputs)), known.means, known.deviations, strict=True
      )
    ]
    np.testing.assert_allclose(found[n], losses[0] + (n % 2) * losses[1], rtol=1e-4)


def test_shapes_and_a_seed_gives_the_same_codes():
  calls = []
  settings = {"recall": 3, "per_class": 2, "recall_steps": 20}
  found = learn(progress=lambda done, of: calls.append((done, of)), **settings)
  again = learn(in_batches(DATA, 50), **settings)
  other = learn(key=jax.random.key(1), **settings)
  shapes = [(4, 2, 5), (4, 2, 5), (4, 2), (4, 2), (4, 2), (4, 3, 5)]
  assert [x.shape for x in jax.tree.leaves(found)] == shapes
  assert calls == [(n + 1, 70) for n in range(70)]
  np.testing.assert_allclose(found.codes, again.codes, rtol=1e-3, atol=1e-3)
  np.testing.assert_array_equal(found.judge_weights, again.judge_weights)
  assert not np.allclose(found.codes, other.codes, atol=1e-2)
  assert not np.allclose(found.codes[:, 0], found.codes[:, 1], atol=1e-3)
  same = learn(**settings)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(same), strict=True):
    np.testing.assert_array_equal(a, b)


def test_where_memory_is_short_judges_match_the_last_arrays_alone(monkeypatch):
  widths = [30, 20, 10]
  for limit, kept in ((0, 1), (10, 1), (30, 2), (59, 2), (60, 3)):
    monkeypatch.setattr(measure, "_RESERVOIR_BYTES", limit * 4 * measure.RESERVOIR * CLASSES)
    assert measure._that_fit(widths, CLASSES) == kept
  monkeypatch.setattr(measure, "_RESERVOIR_BYTES", 0)
  known = measured()
  assert known.kept == 1 and known.reservoir.vectors.shape[2] == 6
  found = learn(steps=300)
  for c in range(CLASSES):
    mean = found.judge_weights[c] @ hidden(found.judges[c])
    assert reference.match_loss(mean, known.means[1][c], known.deviations[1]) < 0.15


def test_more_codes_than_judges_and_no_judges():
  found = learn(per_class=3, num_judges=0, steps=2)
  assert found.codes.shape == (4, 3, 5) and found.judges.shape == (4, 0, 5)
  found = learn(per_class=3, steps=200)
  for k in range(3):
    read, known = hidden(found.codes[:, k]), measured()
    for c in range(CLASSES):
      assert reference.match_loss(read[c], known.means[1][c], known.deviations[1]) < 0.1


def test_codes_some_at_a_time_are_those_of_all_at_once():
  whole = learn()
  parts = learn(execution=mj.Execution(microbatch=5))
  np.testing.assert_allclose(parts.codes, whole.codes, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(parts.judges, whole.judges, rtol=1e-4, atol=1e-4)


def test_another_state_of_the_same_model_compiles_nothing():
  apply = lambda state, params, x: mlp(params, x) * state
  settings = {"num_judges": 1, "recall": 2, "recall_steps": 5, "steps": 5}
  learn(logits_fn=Bound(apply, jnp.float32(1)), **settings)
  other = make_params("mlp", 1)
  with compiled_programs() as names:
    learn(logits_fn=Bound(apply, jnp.float32(2)), params=other, **settings)
  assert names == []


def test_half_precision_inputs_give_codes_in_their_dtype():
  inputs, labels = DATA
  half = [(jnp.asarray(inputs, jnp.bfloat16), labels)]
  assert learn(half, recall=1, recall_steps=3, steps=3, num_judges=1).codes.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("devices", "split", "axes"),
  [(1, False, "Auto"), (2, True, "Auto"), (4, False, "Auto"), (4, False, "Explicit")],
)
def test_codes_on_a_mesh(devices, split, axes):
  mesh, data = cpu_mesh(devices, axes), tuple(x[:384] for x in DATA)
  single = learn([data])
  known = measured(data=data, sizes=(384,))
  params = place(PARAMS, mesh)
  if split:
    params["kernel1"] = place(PARAMS["kernel1"], mesh, None, "data")
  batches = lambda: [place(data, mesh, "data")]
  there = measured_of(batches(), params=params)
  for a, b in zip(there.means, known.means, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(there.reservoir.hashes, known.reservoir.hashes)
  found = learn(batches(), params=params)
  np.testing.assert_allclose(found.judge_weights, single.judge_weights, rtol=1e-6)

  def loss(codes):
    pairs = zip((codes, hidden(codes)), known.means, known.deviations, strict=True)
    return sum(jnp.mean(jnp.square((x - mean) / sd)) for x, mean, sd in pairs)

  np.testing.assert_allclose(loss(found.codes[:, 0]), loss(single.codes[:, 0]), rtol=0.01)


# Recalling


def normalized(params, inputs):
  """A BatchNorm in evaluation mode before the MLP, and what it reads."""
  values = inputs * 2.0 + 1.0
  mean, variance = jnp.arange(5.0), jnp.arange(1.0, 6.0)
  return (values - mean[None]) / jnp.sqrt(variance)[None], (values, mean, variance)


def normalized_logits(params, inputs):
  return mlp(params, normalized(params, inputs)[0])


def statistics_fn(params, inputs):
  return {"norm": normalized(params, inputs)[1]}


def test_the_recalled_loss_is_that_of_the_twin():
  inputs, labels = DATA[0][:12], DATA[1][:12]
  values, mean, variance = normalized(PARAMS, inputs)[1]
  tensor = np.asarray(draw(3, 6, 2, 3, 5))
  layers = {"a": (values, mean, variance), "b": (tensor, mean, variance)}
  found = recalling.statistics_distance(layers)
  np.testing.assert_allclose(found, reference.statistics_distance(layers.values()), rtol=1e-4)
  arguments = functions_of(normalized_logits, statistics_fn=statistics_fn)
  whole = recalling.loss_of(*arguments, jnp.asarray(inputs), jnp.asarray(labels))
  logits = np.asarray(normalized_logits(PARAMS, inputs), np.float64)
  entropy = np.mean(
    [reference.smoothed_cross_entropy(*p) for p in zip(logits, labels, strict=True)]
  )
  distance = reference.statistics_distance([(values, mean, variance)])
  np.testing.assert_allclose(whole, entropy + 5 * distance, rtol=1e-4)
  alone = recalling.loss_of(*functions_of(normalized_logits), jnp.asarray(inputs), labels)
  np.testing.assert_allclose(alone, entropy, rtol=1e-4)


def test_batches_hold_every_input_and_each_class_its_share():
  labels = np.repeat(np.arange(4), 8)
  rows = recalling.drawn(labels, 12, np.random.default_rng(0))
  assert rows.shape == (3, 11) and set(rows.ravel().tolist()) == set(range(32))
  assert all(len(set(batch.tolist())) == 11 for batch in rows)
  shares = [np.bincount(labels[batch], minlength=4) for batch in rows]
  assert np.min(shares) >= 2 and np.max(shares) <= 4
  other = recalling.drawn(labels, 12, np.random.default_rng(1))
  assert not np.array_equal(rows, other)


@pytest.mark.parametrize("microbatch", [None, 10])
def test_recalled_codes_are_their_class_with_the_statistics_of_the_model(microbatch):
  found = mj.learn_codes(
    KEY, normalized_logits, PARAMS, None, num_classes=CLASSES, shape=(FEATURES,),
    statistics_fn=statistics_fn, input_range=(-2.0, 3.0), recall_steps=300, recall=3,
    execution=mj.Execution(microbatch),
  )  # fmt: skip
  assert found.codes.shape == (CLASSES, 8, FEATURES)
  assert found.recalled.shape == (CLASSES, 3, FEATURES)
  assert found.judges.shape == (CLASSES, 0, FEATURES) and found.judge_weights.shape == (CLASSES, 0)
  both = np.concatenate([found.codes, found.recalled], axis=1).reshape(-1, FEATURES)
  labels = np.repeat(np.arange(CLASSES), 11)
  noise = np.random.default_rng(0).uniform(-2, 3, both.shape).astype(np.float32)

  def losses(x):
    logits = np.asarray(normalized_logits(PARAMS, x), np.float64)
    pairs = zip(logits, labels, strict=True)
    entropy = np.mean([reference.smoothed_cross_entropy(*pair) for pair in pairs])
    return entropy, reference.statistics_distance([normalized(PARAMS, x)[1]])

  (entropy, distance), (of_noise, far) = losses(both), losses(noise)
  assert entropy < 0.9 * of_noise and distance < 0.5 * far


def test_recalled_codes_start_in_their_range_and_are_the_same_for_a_seed():
  settings = {"num_classes": CLASSES, "shape": (FEATURES,), "recall_steps": 1}
  bounds = np.arange(5.0), np.arange(5.0) + 1
  settings |= {"learning_rate": 1e-9, "input_range": bounds, "per_class": 20}
  first, again = (mj.learn_codes(KEY, mlp, PARAMS, None, **settings) for _ in range(2))
  np.testing.assert_array_equal(first.codes, again.codes)
  assert np.all(first.codes >= bounds[0] - 1e-6) and np.all(first.codes <= bounds[1] + 1e-6)
  assert first.codes.max() > 4.5


# The library's models


@pytest.fixture(scope="module")
def resnet():
  """A small ResNet, its params and its state."""
  make = lambda rngs: ResNet((1, 1), CLASSES, channels=1, width=4, small_stem=True, rngs=rngs)
  model = models.functional(make, head=("head",))
  return model, *model.init(KEY)


def test_statistics_of_a_resnet_are_those_that_batchnorm_would_take(resnet):
  """In training mode BatchNorm moves its statistics by a tenth towards those of its inputs."""
  model, params, state = resnet
  images = draw(0, 6, 8, 8, 1)
  statistics = model.statistics_fn(state)
  assert statistics == model.statistics_fn(state)
  named = jax.jit(statistics)(params, images)
  assert list(named) == [
    *("stage1_block1.norm1", "stage1_block1.norm2", "stage2_block1.norm1", "stage2_block1.norm2"),
    *("stage2_block1.shortcut_norm", "stem_norm"),
  ]
  values, mean, variance = named["stem_norm"]
  _, after = jax.jit(model.apply, static_argnums=3)(params, state, images, True)
  moved, own = after["stem_norm"], np.asarray(values, np.float64).reshape(-1, 4)
  np.testing.assert_allclose(moved["mean"], 0.9 * mean + 0.1 * own.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(moved["var"], 0.9 * variance + 0.1 * own.var(0), rtol=1e-4, atol=1e-6)
  assert named["stage2_block1.norm2"][0].shape == (6, 4, 4, 8)


def test_a_model_without_batchnorm_has_no_statistics():
  model = models.make("mlp", shape=(4, 4, 1), num_classes=4, hidden=8)
  assert model.statistics_fn({}) is None


def test_a_resnet_learns_and_recalls(resnet):
  model, params, state = resnet
  images, labels = np.asarray(draw(0, 40, 8, 8, 1)), np.arange(40) % CLASSES
  found = learn(
    in_batches((images, labels), 16), logits_fn=model.logits_fn(state), params=params,
    statistics_fn=model.statistics_fn(state), num_judges=1, min_members=5, recall=2, steps=2,
    recall_steps=2,
  )  # fmt: skip
  assert found.codes.shape == (4, 1, 8, 8, 1) and found.recalled.shape == (4, 2, 8, 8, 1)
  assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))


# Real data


@pytest.fixture(scope="module")
def digits():
  """An MLP trained on the digits without codes; its training and test sets."""
  import optax

  from mnemonic_jax import data

  dataset = data.load("digits")
  split = lambda part: (np.asarray(dataset.preprocess(part.images)), part.labels)
  train, test = split(dataset.train), split(dataset.test)
  model = models.make("mlp", shape=(8, 8, 1), num_classes=10, hidden=64)
  params, state = model.init(KEY)
  logits_fn, optimizer = model.logits_fn(state), optax.adam(0.01)

  @jax.jit
  def step(params, state):
    loss = lambda params: mj.softmax_cross_entropy(logits_fn(params, train[0]), train[1]).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  optimizer_state = optimizer.init(params)
  for _ in range(100):
    params, optimizer_state = step(params, optimizer_state)
  return logits_fn, params, train, test


def test_codes_of_the_digits_are_classified_as_their_class(digits):
  logits_fn, params, train, _ = digits
  found = mj.learn_codes(KEY, logits_fn, params, in_batches(train, 256), num_classes=10, recall=2)
  for codes in (found.codes, found.recalled):
    logits = logits_fn(params, codes.reshape(-1, 8, 8, 1))
    np.testing.assert_array_equal(logits.argmax(1), np.repeat(np.arange(10), codes.shape[1]))
  number = np.sum(found.judge_weights > 0, axis=1)
  assert number.min() >= 1 and number.max() == 2  # of 143 examples a class


def test_judges_predict_what_lowering_a_class_does_to_the_test_digits(digits):
  logits_fn, params, train, (images, labels) = digits
  found = mj.learn_codes(
    KEY, logits_fn, params, in_batches(train, 256), num_classes=10, min_members=20
  )
  judged = found.judges.reshape(-1, 8, 8, 1)
  of_judges = lambda params: margins(logits_fn(params, judged).reshape(10, -1, 10))
  forget = np.arange(10) == 3
  for lowered in (0.0, 2.0, 4.0, 6.0, 8.0, 12.0):
    output = params["output"] | {"bias": params["output"]["bias"].at[3].add(-lowered)}
    edited = params | {"output": output}
    scores = mj.evaluate(logits_fn, edited, [(images, labels)], [3])
    weights = found.judge_weights, found.judge_accuracy, found.judge_spread
    a_r, e_f, _ = predict(of_judges(params), of_judges(edited), *weights, forget, ~forget)
    assert abs(a_r - scores.retain_accuracy) < 0.04
    assert abs(e_f - scores.forget_error) < 0.2


# Bad input

NAN_PARAMS = PARAMS | {"bias1": PARAMS["bias1"].at[0].set(jnp.nan)}
INPUTS, LABELS = DATA[0][:40], DATA[1][:40]
ROWS = {"values": jnp.ones((4, 5)), "vector": jnp.ones(5)}


def training_batchnorm(params, x):
  return mlp(params, (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True))


def recalled(**change):
  arguments = {"shape": (FEATURES,), "num_classes": CLASSES, "recall_steps": 2} | change
  return lambda: mj.learn_codes(KEY, arguments.pop("logits_fn", mlp), PARAMS, None, **arguments)


def with_data(*batches, **change):
  return lambda: learn(batches or [(INPUTS, LABELS)], **({"num_judges": 0, "steps": 2} | change))


def statistics(mean=ROWS["vector"], variance=ROWS["vector"], positions=()):
  values = lambda x: jnp.ones((len(x), *positions, FEATURES))
  return recalled(statistics_fn=lambda params, x: {"norm": (values(x), mean, variance)})


BAD = [
  ("key", with_data(key=0), TypeError, r"key: got 0 .*jax.random.key"),
  ("logits_fn", with_data(logits_fn=3), TypeError, r"logits_fn: got 3 .*expected a function"),
  ("num_classes", with_data(num_classes=1), ValueError, r"num_classes: got 1; expected at least 2"),
  ("per_class", with_data(per_class=0), ValueError, r"per_class: got 0; expected"),
  ("per_class float", with_data(per_class=1.5), TypeError, r"per_class: got 1.5"),
  ("recall", with_data(recall=-1), ValueError, r"recall: got -1; expected an integer"),
  ("num_judges", with_data(num_judges="8"), TypeError, r"num_judges: got '8'"),
  ("min_members", with_data(min_members=0), ValueError, r"min_members: got 0"),
  ("steps", with_data(steps=0), ValueError, r"steps: got 0"),
  ("learning_rate", with_data(learning_rate=0.0), ValueError, r"learning_rate: got 0.0; expected"),
  ("learning_rate NaN", with_data(learning_rate=np.nan), ValueError, r"learning_rate: got nan"),
  ("progress", with_data(progress=3), TypeError, r"progress: got 3"),
  ("execution", with_data(execution=3), TypeError, r"execution: got 3"),
  ("params NaN", with_data(params=NAN_PARAMS), ValueError, r"params: NaN or inf in \['bias1'\]"),
  ("params integer", with_data(params={"w": jnp.ones(3, int)}), TypeError, r"params\['w'\]: got"),
  ("shape missing", recalled(shape=None), ValueError, r"shape: got None with batches=None"),
  ("shape text", recalled(shape="5"), TypeError, r"shape: got '5'"),
  ("shape of no input", recalled(shape=(3,)), ValueError,
   r"logits_fn: fails on inputs of shape \(4, 3\).*check shape"),
  ("features without data", recalled(features_fn=lambda p, x: {}), ValueError,
   r"features_fn: got a function with batches=None"),
  ("range", recalled(input_range=(1.0, 1.0)), ValueError, r"input_range: got .*low < high"),
  ("range of a channel", recalled(input_range=(0.0, np.array([1, 1, 1, 1, -1.0]))), ValueError,
   r"input_range: got .*low < high everywhere"),
  ("range of another shape", recalled(input_range=(0.0, np.ones(3))), ValueError,
   r"input_range: got .*broadcast to the shape \(5,\)"),
  ("range with data", with_data(input_range=(2.0, 1.0)), ValueError, r"input_range: got"),
  ("range no pair", recalled(input_range=3.0), TypeError, r"input_range: got 3.0; expected a pair"),
  ("batches no iterable", lambda: learn(3), TypeError, r"batches: got 3 .*expected an iterable"),
  ("batches empty", lambda: learn([]), ValueError, r"batches: yielded nothing"),
  ("batches spent", lambda: learn(iter(())), ValueError, r"batches: yielded nothing.*fresh"),
  ("batch no pair", with_data(INPUTS), ValueError, r"batches: yielded ndarray; expected \(inputs"),
  ("batch of none", with_data((INPUTS[:0], LABELS[:0])), ValueError, r"at least one\s+example"),
  ("two shapes", with_data((INPUTS, LABELS), (INPUTS[:, :3], LABELS)), ValueError,
   r"inputs of shape \(40, 3\); expected \(N, 5\)"),
  ("another shape", with_data(shape=(3,)), ValueError, r"shape \(40, 5\); expected \(N, 3\)"),
  ("integers", with_data((INPUTS.astype(np.int32), LABELS)), TypeError,
   r"inputs of dtype int32; expected floating .*tokens, cannot be learned"),
  ("labels above", with_data((INPUTS, LABELS + 1)), ValueError,
   r"labels: got values from 1 to 4; expected integers in \[0, 4\)"),
  ("labels float", with_data((INPUTS, LABELS * 1.0)), TypeError, r"labels: got .*float"),
  ("labels of another size", with_data((INPUTS, LABELS[:3])), ValueError, r"labels: got shape"),
  ("mask", with_data((INPUTS, LABELS, LABELS)), ValueError, r"mask: got .*int32.*expected bool"),
  ("inputs NaN", with_data((INPUTS, LABELS), (INPUTS * np.nan, LABELS)), ValueError,
   r"batches: NaN or inf in the inputs of batch 1"),
  ("a class without any", with_data((INPUTS, LABELS % 3)), ValueError,
   r"batches: no example of class 3; expected examples of all 4 classes.*batches=None"),
  ("logits of other classes", with_data(num_classes=5), ValueError,
   r"logits_fn: returned shape \(40, 4\).*num_classes is 5"),
  ("train mode", with_data(logits_fn=training_batchnorm), ValueError,
   r"logits_fn: examples depend on each other.*BatchNorm or dropout in training mode"),
  ("train mode, recalled", recalled(logits_fn=training_batchnorm), ValueError,
   r"logits_fn: examples depend on each other"),
  ("no contraction", with_data(logits_fn=lambda p, x: x[:, :4] * p["bias2"][None]), ValueError,
   r"logits_fn: no leaf of params meets data .*features_fn"),
  ("NaN logits", with_data(logits_fn=lambda p, x: jnp.log(mlp(p, x) - 1e3)), ValueError,
   r"logits_fn: NaN or inf in the logits"),
  ("features no dict", with_data(features_fn=lambda p, x: x), ValueError, r"features_fn: returned"),
  ("features empty", with_data(features_fn=lambda p, x: {}), ValueError, r"features_fn: returned"),
  ("features without the batch", with_data(features_fn=lambda p, x: {"z": x.mean(0)}), ValueError,
   r"features_fn: 'z' has shape \(5,\).*the batch axis first"),
  ("features transposed", with_data(features_fn=lambda p, x: {"z": x.T}), ValueError,
   r"features_fn: 'z' has shape \(5, 40\).*for 40 inputs"),
  ("features NaN", with_data(features_fn=lambda p, x: {"z": x / 0}), ValueError,
   r"NaN or inf in logits or activations on batch 0"),
  ("statistics negative", statistics(variance=-ROWS["vector"]), ValueError,
   r"statistics_fn: the running variance of 'norm' has -1; expected variances"),
  ("statistics NaN", statistics(mean=jnp.nan * ROWS["vector"]), ValueError,
   r"statistics_fn: NaN or inf in the running statistics of 'norm'"),
  ("statistics of other channels", statistics(mean=jnp.ones(3)), ValueError,
   r"mean and variance of 'norm' have shapes \(3,\) and \(5,\); expected \(5,\)"),
  ("statistics no triple", recalled(statistics_fn=lambda p, x: {"norm": (x, x)}), ValueError,
   r"statistics_fn: 'norm' is a tuple; expected three arrays"),
  ("statistics without the batch",
   recalled(statistics_fn=lambda p, x: {"n": (x[:1], x[0], x[0])}), ValueError,
   r"statistics_fn: values of 'n' have shape \(1, 5\) for 4 inputs"),
  ("statistics no dict", recalled(statistics_fn=lambda p, x: x), ValueError,
   r"statistics_fn: returned .*expected a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in BAD],
                         ids=[case[0] for case in BAD])  # fmt: skip
def test_bad_input(call, error, message):
  with pytest.raises(error, match=f"(?s){message}"):
    call()


def test_nan_while_learning():
  """A function that is finite on the data and on the start, and not far from them."""
  wall = lambda params, x: mlp(params, x) + 0 * jnp.sqrt(0.9 - jnp.max(x, -1, keepdims=True))
  with pytest.raises(ValueError, match=r"the loss became NaN or inf at step \d+"):
    mj.learn_codes(KEY, wall, PARAMS, None, num_classes=CLASSES, shape=(FEATURES,),
                   input_range=(0.0, 0.89), learning_rate=0.5)  # fmt: skip


def test_too_few_examples_for_judges_warn():
  with pytest.warns(UserWarning, match=r"Classes without a judge: 0, 1, 2, 3\. .*min_members=30"):
    found = learn([(INPUTS, LABELS)], steps=2)
  assert not found.judge_weights.any() and not found.judges.any()
