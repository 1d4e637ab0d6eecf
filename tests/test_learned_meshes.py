"""Learned codes and forgets of one step on meshes of 1, 2, 4 and 8 devices equal those on one."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from running import call, snapshot
from safetensors.numpy import load_file
from toys import assert_trees_close, host

import mnemonic_jax as mj
from mnemonic_jax import _trees
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.learning import match, measure, reads
from mnemonic_jax.models import vit
from mnemonic_jax.multihost import sharding
from mnemonic_jax.multihost.processes import Watchdog
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, scoring, setup
from mnemonic_jax.runs.checkpoints import restore_parts, stored_shapes
from mnemonic_jax.runs.folder import RunFolder

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments" / "imagenet_vit"))
import codes as codes_script
import forget as forget_script
import job as jobs

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def run(learned_once, tmp_path):
  return pathlib.Path(shutil.copytree(learned_once[0], tmp_path / "run"))


def on_mesh(devices, script, folder, *words, fsdp=None, **changed):
  """Do the work of a script on so many devices, as its command line would."""
  run = RunFolder.open(folder)
  parser = argparse.ArgumentParser()
  script.add_flags(parser)
  options = parser.parse_args(list(map(str, words)))
  overrides = {**changed, **script.overrides(options)}
  config = configs.build(run.config.name, configs.as_dict(run.config), overrides)
  mesh = sharding.make_mesh(None, fsdp or devices, jax.devices()[:devices])
  job = jobs.Job(config, setup.load_data(config, training=False), mesh, run, options)
  with jax.set_mesh(mesh):
    return files.plain(script.work(job))


def forgotten(result):
  folder = pathlib.Path(result["folder"]) / "params"
  return _trees.by_path(restore_parts(folder, stored_shapes(folder)))


def assert_same_params(found, expected):
  """Equal to 1e-5 of each leaf's largest entry."""
  assert found.keys() == expected.keys()
  for path, leaf in expected.items():
    largest = np.max(np.abs(leaf))
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5 * largest, err_msg=path)


SAME = ("classes", "codes_sha256", "method", "code_retain_accuracy", "code_forget_error")
SAME += ("retain_accuracy_after", "forget_error_after", "per_class_accuracy_after", "verdict")
LONG = pytest.mark.long


@pytest.mark.parametrize(
  ("words", "devices"),
  [
    (("--method", "projection", "--set", "depth=1"), 8),
    *(
      pytest.param(("--method", "projection", "--set", "depth=1"), devices, marks=LONG)
      for devices in (1, 2, 4)
    ),
    pytest.param(
      ("--method", "projection", "--set", "depth=1", "--set", "drop_row=false"), 4, marks=LONG
    ),
    pytest.param(("--method", "drop_row"), 2, marks=LONG),
    pytest.param(("--method", "dampening", "--set", "quantile=0.9"), 2, marks=LONG),
  ],
  ids=str,
)
def test_a_forget_from_learned_codes_is_that_of_one_device(words, devices, run):
  words = ("--classes", 3, 5, *words)
  alone = call("forget", run, *words, "--json").json
  found = on_mesh(devices, forget_script.SCRIPT, run, *words)  # the same classes once more
  assert {key: found[key] for key in SAME} == {key: alone[key] for key in SAME}
  assert_trees_close(found["info"], alone["info"], rtol=1e-6)
  assert_trees_close(found["predicted"], alone["predicted"], rtol=1e-4)
  assert_same_params(forgotten(found), forgotten(alone))


@pytest.mark.long
@pytest.mark.parametrize(("devices", "fsdp"), [(8, 4), (4, 4), (2, 2), (1, 1)])
def test_codes_that_are_learned_on_a_mesh_are_those_of_one_device(devices, fsdp, run):
  path = run / "codes" / "learned.safetensors"
  alone = load_file(path)
  path.unlink()
  found = on_mesh(devices, codes_script.SCRIPT, run, "--beside", 2, fsdp=fsdp)
  assert found["read"] == ["params", "training examples"] and found["recalled"] == 2
  assert_same_codes(load_file(path), alone)


def assert_same_codes(found, alone):
  """Judges stand for the same examples, and are learned to the same."""
  for name in ("judge_weights", "judge_accuracy"):
    np.testing.assert_allclose(found[name], alone[name], rtol=1e-6)
  np.testing.assert_allclose(found["judge_spread"], alone["judge_spread"], rtol=1e-4)
  for name in ("codes", "judges"):
    np.testing.assert_allclose(found[name], alone[name], rtol=1e-4, atol=1e-4)


def test_a_mesh_needs_codes(run):
  shutil.rmtree(run / "codes")
  with pytest.raises(
    MnemonicError, match=r"codes\.rate: got 0; the model was trained without codes"
  ):
    on_mesh(2, forget_script.SCRIPT, run, "--classes", 3, "--method", "drop_row")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "forget.settings.depth: missing; projection would search it.* --set depth=NUMBER"),
    (("--method", "projection"), "forget.settings.depth: missing"),
    (
      ("--method", "projection", "--set", "depth=1", "--set", "heal=20"),
      "forget.settings.heal: got 20 with the method projection; expected 0",
    ),
    (
      ("--method", "relearn", "--set", "depth=1", "--set", "steps=9"),
      "forget.method: got relearn, which takes 9 steps; expected a method of one step: projection",
    ),
    (("--method", "dampening"), "forget.settings.quantile: missing; dampening would search it"),
    (("--method", "perturbation"), "forget.settings.lambda1: missing.* or --search"),
    (("--method", "drop_row", "--search"), "--search: got the method drop_row; only perturbation"),
    (("--method", "cut"), "forget.method: got 'cut'; expected the name of a method"),
    (("--method", "drop_row", "--set", "depth"), "--set: got 'depth'; expected NAME=VALUE"),
  ],
)
def test_what_is_not_one_step_is_refused_before_anything_is_computed(
  words, message, learned_once, monkeypatch
):
  before = snapshot(learned_once[0])
  monkeypatch.setattr(forget_script.trained_run, "restore", lambda *_: pytest.fail("restored"))
  with pytest.raises(UsageError, match=message):
    on_mesh(2, forget_script.SCRIPT, learned_once[0], "--classes", 3, *words)
  assert snapshot(learned_once[0]) == before


def test_codes_are_not_learned_twice(learned_once):
  before = snapshot(learned_once[0])
  with pytest.raises(MnemonicError, match=r"is there already\. Nothing was changed"):
    on_mesh(2, codes_script.SCRIPT, learned_once[0])
  assert snapshot(learned_once[0]) == before


@pytest.mark.parametrize(
  ("script", "words", "message"),
  [
    (codes_script, ("--recall", "--beside", 2), "--beside: is for learned codes; with --recall"),
    (codes_script, ("--forget.method", "drop_row"), "only [execution] may differ"),
    (codes_script, ("--execution.fsdp", 3), "got data 2 x fsdp 3 for 8 devices"),
    (forget_script, ("--classes", 3, "--train.epochs", 2), "only [forget] and [execution] may"),
  ],
)
def test_a_wrong_command_line_is_one_message(
  script, words, message, learned_once, capsys, monkeypatch
):
  monkeypatch.setattr(jobs.compilation_cache, "enable", lambda: None)  # of this process
  monkeypatch.setattr(jobs.signals, "exit_at_once", lambda: None)
  with pytest.raises(SystemExit) as stopped:
    jobs.main(script.SCRIPT, list(map(str, (learned_once[0], *words))))
  out, err = capsys.readouterr()
  assert stopped.value.code == 2 and out == ""
  assert err.startswith("mnemonic: ") and message in err and err.count("\n") == 1


# A ViT whose layers are scanned, rematerialised and split over fsdp.

CLASSES, SIDE = 6, 32
VIT = {
  "data": {"name": "imagenet2012", "side": SIDE},
  "model": {"name": "vit_ti16", "pool": "mean", "scan": True, "remat": True},
}


@pytest.fixture
def small_vit(monkeypatch):
  """Its model, whose kernels are just large enough to be split, and params at random."""
  monkeypatch.setitem(vit.SIZES, "ti", (64, 2, 2))
  model = setup.make_model(configs.build("tiny", VIT), pictures())
  draw = np.random.default_rng(0).normal
  shapes = jax.eval_shape(model.init, jax.random.key(0))[0]
  return model, jax.tree.map(lambda x: draw(0, 0.2, x.shape).astype(np.float32), shapes)


def pictures(count=0):
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)
  split = Split(images, (np.arange(count) % CLASSES).astype(np.int32))
  return Dataset("imagenet2012", split, split, tuple("abcdef"), 255, (0.5,) * 3, (0.25,) * 3)


def drawn_codes():
  draw = np.random.default_rng(2).normal
  return draw(size=(CLASSES, 2, SIDE, SIDE, 3)).astype(np.float32)


MESHES = [(2, 4), *(pytest.param(shape, marks=LONG) for shape in ((1, 2), (4, 1), (1, 8)))]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_split_vit_is_projected_as_on_one_device(shape, small_vit):
  model, params = small_vit
  method, mask = mj.Projection(depth=3), np.arange(CLASSES) == 1
  step = lambda params, codes: mj.forget_step(
    model.logits_fn({}), params, codes, mask, ~mask, method, layer_axis=model.layer_axis
  )
  expected, said = jax.jit(step)(params, drawn_codes())
  mesh = sharding.make_mesh(*shape, jax.devices()[: np.prod(shape)])
  with jax.set_mesh(mesh):
    config = configs.build("tiny", VIT)
    program = forget_script.make_program(config, pictures(), mesh, model, drawn_codes())
    placed = jax.device_put(params, Layout(mesh).shardings(params))
    codes = forget_script.place_codes(drawn_codes(), program)
    found, info = program.step(placed, {}, codes, mask, ~mask, method)
  assert np.max(info.info["rank"]) == 1  # it was cut below the head
  assert_trees_close(host(info.info), host(said.info))
  assert float(info.code_forget_error) == float(said.code_forget_error)
  assert_same_params(_trees.by_path(host(found)), _trees.by_path(host(expected)))
  for leaf, wanted in zip(*map(jax.tree.leaves, (found, placed)), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 4), (1, 2), (4, 1), (1, 8)], ids=str)
def test_codes_of_a_split_vit_are_those_of_one_device(shape, small_vit):
  model, params = small_vit
  data = pictures(96)
  settings = {"num_classes": CLASSES, "min_members": 8, "steps": 20}

  def learned(params, layout):
    batches = scoring.batches(data.train, layout, Watchdog(), 6)
    inputs = ((data.preprocess(x), y, mask) for x, y, mask in batches)
    return mj.learn_codes(jax.random.key(0), model.logits_fn({}), params, inputs, **settings)

  alone = learned(params, Layout())
  layout = Layout(sharding.make_mesh(*shape, jax.devices()[: np.prod(shape)]))
  with layout.used():
    found = learned(jax.device_put(params, layout.shardings(params)), layout)
  for name in ("judge_weights", "judge_accuracy"):
    np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-6)
  functions, arrays = reads.split(model.logits_fn({}), None, None, params, CLASSES, "highest")
  whole = [(data.preprocess(data.train.images), data.train.labels)]
  known = measure.measure(functions, arrays, *measure.checked(whole, CLASSES, None), np.arange(2))
  targets = match.Targets(known.means, known.deviations, [np.ones(CLASSES)] * len(known.means))
  losses = [
    match.distances(reads.reads_program(functions, arrays, codes.codes[:, 0])[0], targets)
    for codes in (found, alone)
  ]
  np.testing.assert_allclose(*map(np.sum, losses), rtol=0.01)
