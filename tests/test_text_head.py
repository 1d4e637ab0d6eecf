"""The head that scores against text embeddings, with random unit vectors for a text model's."""

from __future__ import annotations

import math
import pathlib
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import FORGET_KEYS, TINY, call
from safetensors.numpy import save_file
from toys import cpu_mesh, place

import mnemonic_jax as mj
from mnemonic_jax import _trees, data, models
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import pretrained
from mnemonic_jax.rivals.head_edit import head_edit
from mnemonic_jax.runs.checkpoints import newest, restore_params, restore_parts, stored_shapes


def vectors(classes: int = 3, size: int = 6) -> np.ndarray:
  drawn = np.random.default_rng(0).normal(size=(classes, size)).astype(np.float32)
  return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def mlp() -> models.Model:
  return models.make("mlp", shape=(4, 4, 1), num_classes=3, hidden=7, text=9 * vectors())


@pytest.fixture(scope="module")
def images() -> jax.Array:
  return jax.random.uniform(jax.random.key(1), (5, 4, 4, 1))


def test_logits_are_scaled_cosines(mlp, images):
  params, model_state = mlp.init(jax.random.key(0))
  params["output"]["bias"] = jnp.array([0.5, 0.0, -1.0])
  features = np.asarray(mlp.features(params, model_state, images), np.float64)
  projected = features @ np.asarray(params["output"]["projection"]["kernel"], np.float64)
  cosines = (projected / np.linalg.norm(projected, axis=1, keepdims=True)) @ vectors().T
  logits = mlp.logits_fn(model_state)(params, images)
  np.testing.assert_allclose(logits, cosines / 0.07 + [0.5, 0.0, -1.0], rtol=1e-4, atol=1e-4)


def test_the_text_is_no_param_and_the_rest_of_the_model_is_as_with_a_linear_head(mlp):
  params, model_state = mlp.init(jax.random.key(0))  # the MLP has vectors of length 9
  linear, _ = models.make("mlp", shape=(4, 4, 1), num_classes=3, hidden=7).init(jax.random.key(0))
  chex.assert_trees_all_equal(params["hidden"], linear["hidden"])
  head = params["output"]
  shapes = jax.tree.map(jnp.shape, head)
  assert shapes == {"bias": (3,), "log_scale": (), "projection": {"kernel": (7, 6)}}
  assert float(head["log_scale"]) == pytest.approx(math.log(1 / 0.07)) and not head["bias"].any()
  np.testing.assert_allclose(model_state["output"]["text"], vectors(), rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "side", "features"),
  [("resnet18_small", 32, 512), ("vit_ti16", 32, 192), ("swin_t", 224, 768)],
)
def test_every_model_may_have_it(name, side, features):
  model = models.make(
    name, shape=(side, side, 3), num_classes=3, text=vectors(), dtype=jnp.bfloat16
  )
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  assert params["head"]["projection"]["kernel"].shape == (features, 6)
  assert model_state["head"]["text"].shape == (3, 6)
  assert {leaf.dtype for leaf in jax.tree.leaves((params, model_state))} == {jnp.dtype(jnp.float32)}


def test_training_moves_the_head_and_not_the_text(mlp, images):
  optimizer = optax.sgd(0.1)
  params, model_state = mlp.init(jax.random.key(0))
  state = mj.init_train_state(params, model_state, optimizer, jax.random.key(2))
  codes = mj.make_codes(jax.random.key(3), 3, (4, 4, 1))
  step = jax.jit(mj.make_train_step(mlp.apply, optimizer, rate=0.5))
  after, first = step(state, images, jnp.array([0, 1, 2, 0, 1]), codes)
  chex.assert_trees_all_equal(after.model_state, model_state)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, params)
  assert all(jax.tree.leaves(moved)), moved
  for _ in range(60):
    after, last = step(after, images, jnp.array([0, 1, 2, 0, 1]), codes)
  assert last["loss"] < first["loss"]


def test_its_fisher_is_exact(mlp, images):
  params, model_state = mlp.init(jax.random.key(0))
  labels = jnp.array([0, 1, 2, 0, 1])
  logits_fn = mlp.logits_fn(model_state)
  loss = lambda params, inputs, labels: mj.softmax_cross_entropy(logits_fn(params, inputs), labels)
  one = lambda image, label: jax.grad(lambda params: loss(params, image[None], label[None])[0])(
    params
  )
  wanted = jax.tree.map(lambda g: jnp.mean(g**2, axis=0), jax.jit(jax.vmap(one))(images, labels))
  assert all(bool((leaf > 0).any()) for leaf in jax.tree.leaves(wanted))
  chex.assert_trees_all_close(
    mj.diagonal_fisher(loss, params, images, labels), wanted, rtol=1e-4, atol=1e-9
  )


def test_the_head_edit_hides_a_class(mlp, images):
  params, model_state = mlp.init(jax.random.key(0))
  logits = mlp.logits_fn(model_state)(params, images)
  edited = mlp.logits_fn(model_state)(
    head_edit(params, mlp.head, [int(logits[0].argmax())]), images
  )
  assert (edited.argmax(1) != logits[0].argmax()).all() and bool(jnp.isfinite(edited).all())


def test_features_of_length_zero_have_a_finite_gradient(mlp, images):
  params, model_state = mlp.init(jax.random.key(0))
  params["output"]["projection"]["kernel"] *= 0
  total = lambda params: mlp.logits_fn(model_state)(params, images).sum()
  gradient = jax.jit(jax.grad(total))(params)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_file_gives_its_directions(tmp_path, suffix, dtype):
  file, text = tmp_path / f"text{suffix}", (9 * vectors()).astype(dtype)
  if suffix == ".npy":
    np.save(file, np.asfortranarray(text))
  else:
    save_file({"anything": text}, file)
  read = pretrained.load_text_embeddings(file, 3)
  assert read.dtype == np.float32
  np.testing.assert_allclose(read, vectors(), rtol=2e-3 if dtype == np.float16 else 1e-6)


class Trap:
  sprung = False

  def __reduce__(self):
    return (setattr, (Trap, "sprung", True))


def changed(row: int, value: float) -> np.ndarray:
  text = vectors()
  text[row] = value
  return text


def refusal(file: pathlib.Path) -> str:
  with pytest.raises(MnemonicError) as caught:
    pretrained.load_text_embeddings(file, 3)
  message = str(caught.value)
  assert message.startswith(f"{file}: ") and len(message) < 500
  return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
  ("value", "words"),
  [
    (vectors()[0], "has shape (6,); expected (3, E)"),
    (vectors()[:, 0], "has shape (3,); expected (3, E)"),
    (vectors()[..., None], "has shape (3, 6, 1); expected (3, E)"),
    (vectors(4), "has shape (4, 6); expected (3, E), a vector for each of the 3 classes"),
    (vectors()[:, :0], "has shape (3, 0)"),
    (changed(1, np.nan), "the vector of class 1 holds NaN or inf"),
    (changed(2, np.inf), "the vector of class 2 holds NaN or inf"),
    (changed(2, 0.0), "the vector of class 2 is zero"),
    (np.ones((3, 6), np.int32), "has dtype int32; expected floating"),
    (np.array([[Trap()]] * 3, dtype=object), "cannot be read"),
  ],
)
def test_vectors_that_cannot_be_scored_against_are_refused(tmp_path, value, words):
  np.save(tmp_path / "text.npy", value, allow_pickle=True)
  assert words in refusal(tmp_path / "text.npy")
  assert not Trap.sprung


def test_files_that_are_something_else_are_refused(tmp_path):
  file = tmp_path / "text.npy"
  assert "no such file. model.text_embeddings takes a local .npy or .safetensors file" in refusal(
    file
  )
  file.write_bytes(pickle.dumps(Trap()))
  assert "cannot be read" in refusal(file)
  np.savez(tmp_path / "text.npz", vectors())
  (tmp_path / "text.npz").rename(file)
  assert "cannot be read" in refusal(file)
  np.save(file, vectors())
  file.write_bytes(file.read_bytes()[:-4])
  assert "cannot be read" in refusal(file)
  (tmp_path / "text.pt").write_bytes(pickle.dumps(Trap()))
  assert "is neither .npy nor .safetensors" in refusal(tmp_path / "text.pt")
  two = tmp_path / "two.safetensors"
  save_file({"a": vectors(), "b": vectors()}, two)
  assert refusal(two).startswith("holds 2 arrays (a, b); expected one")
  two.write_bytes(two.read_bytes()[:-5])
  assert "cannot be read" in refusal(two)
  assert not Trap.sprung


@pytest.mark.long
def test_a_model_with_it_trains_and_forgets_by_command(tmp_path):
  """Digits are learned against fixed random vectors, and one is forgotten."""
  np.save(tmp_path / "text.npy", vectors(10, 16))
  run = tmp_path / "run"
  settings = (
    "--model.text_embeddings",
    tmp_path / "text.npy",
    "--model.hidden",
    64,
    "--train.learning_rate",
    0.005,
  )
  trained = call(
    "train", "digits_paper", "--out", run, *settings, "--train.epochs", 30, "--json"
  ).json
  assert trained["test_accuracy"] > 0.9
  strength = ("--set", "lambda1=0.01", "--set", "lambda2=1")
  forgotten = call("forget", run, "--classes", 3, *strength, "--json").json
  assert forgotten.keys() >= FORGET_KEYS
  assert forgotten["forget_error_after"] > 0.7 > 0.2 > forgotten["forget_error_before"]
  assert forgotten["retain_accuracy_after"] > 0.8
  assert forgotten["params_sha256_after"] != forgotten["params_sha256_before"]
  checkpoint = newest(run / "checkpoints")
  stored = stored_shapes(checkpoint)
  state = restore_parts(checkpoint, {name: stored[name] for name in ("params", "model_state")})
  np.testing.assert_allclose(state["model_state"]["output"]["text"], vectors(10, 16), rtol=1e-6)
  after = restore_params(run / "forgets" / "0001" / "params", state["params"])
  assert set(after["output"]) == {"bias", "log_scale", "projection"}
  evaluated = call("evaluate", run, "--json").json
  assert evaluated["forgotten"]["forget_error"] == forgotten["forget_error_after"]


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory) -> tuple[pathlib.Path, tuple, dict]:
  """A run that forgot a class while the file of its vectors was away, its settings, all JSON."""
  folder = tmp_path_factory.mktemp("text")
  text, away = folder / "text.npy", folder / "away.npy"
  np.save(text, vectors(10, 16))
  settings = ("--model.text_embeddings", text, "--model.hidden", 8)
  said = {}

  def say(name, *words) -> None:
    said[name] = call(*words, "--json").json

  run = folder / "run"
  say("train", "train", "digits_paper", "--out", run, *settings, "--train.epochs", 1)
  text.rename(away)
  say("forget", "forget", run, "--classes", 3)
  plain = ("--config", "digits_paper", *settings, "--classes", 3, "--out", folder / "plain")
  say("plain", "forget", newest(run / "checkpoints"), *plain)
  say("evaluate", "evaluate", run)
  refused = call("train", "digits_paper", "--out", folder / "new", *settings).refusal()
  assert "text.npy: no such file" in refused
  away.rename(text)
  return run, settings, said


def test_its_file_may_be_gone_when_a_class_is_forgotten(forgotten):
  """The vectors that the model was trained against are in its checkpoints."""
  _, _, said = forgotten
  for name in ("params_sha256_after", "retain_accuracy_after", "forget_error_after"):
    assert said["forget"][name] == said["plain"][name]
  counts = np.bincount(data.load("digits").test.labels)
  before = np.average(said["forget"]["per_class_accuracy_before"], weights=counts)
  assert before == pytest.approx(said["train"]["test_accuracy"])
  assert said["evaluate"]["forgotten"]["forget_error"] == said["forget"]["forget_error_after"]


def test_a_wrong_file_stops_the_command_before_it_trains(tmp_path):
  np.save(tmp_path / "text.npy", vectors(9))
  words = ("train", "digits_paper", "--out", tmp_path / "run", *TINY)
  refused = call(*words, "--model.text_embeddings", tmp_path / "text.npy").refusal()
  assert "text.npy: has shape (9, 6); expected (10, E)" in refused


def test_an_export_with_it_is_a_start_for_training(forgotten, tmp_path):
  run, settings, said = forgotten
  file = tmp_path / "exported.safetensors"
  assert call("export", run, "--out", file).code == 0
  still = ("--train.learning_rate", 0, "--train.weight_decay", 0)
  short = ("--train.epochs", 1, "--model.pretrained", file)
  start = lambda run, *more: call("train", "digits_paper", "--out", tmp_path / run, *short, *more)
  again = start("again", *settings, *still, "--json").json
  assert again["params_sha256"] == said["forget"]["params_sha256_after"]
  linear = start("linear", "--model.hidden", 8).refusal()
  assert "scores against text embeddings; pass them as model.text_embeddings" in linear
  np.save(tmp_path / "text.npy", vectors(10, 16)[::-1])
  other = (*settings, "--model.text_embeddings", tmp_path / "text.npy")
  refused = start("other", *other).refusal()
  assert "output.text differs from the vectors of model.text_embeddings" in refused
  assert start("new", *other, "--model.new_head", "true").code == 0


def test_a_file_on_a_mesh_must_have_the_vectors_too(tmp_path):
  model = models.make("mlp", shape=(4, 4, 1), num_classes=4, hidden=7, text=vectors(4))
  params, model_state = model.init(jax.random.key(0))
  file, arrays = (
    tmp_path / "weights.safetensors",
    _trees.by_path({**params, "model_state": model_state}),
  )
  save_file({path: np.asarray(leaf) for path, leaf in arrays.items()}, file)
  spread = place(model_state, cpu_mesh(4), "data")
  chex.assert_trees_all_equal(pretrained.load(file, "mlp", params, spread), (params, model_state))
  abstract = jax.eval_shape(lambda: (params, model_state))
  chex.assert_trees_all_equal(pretrained.load(file, "mlp", *abstract), (params, model_state))
  other = place(jax.tree.map(lambda text: text[::-1], model_state), cpu_mesh(4), "data")
  with pytest.raises(MnemonicError, match=r"output\.text differs from the vectors"):
    pretrained.load(file, "mlp", params, other)
