"""Learned codes and forgets of one step on meshes of 1, 2, 4 and 8 devices equal those on one."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from running import call
from safetensors.numpy import load_file
from toys import assert_trees_close, host

import mnemonic_jax as mj
from mnemonic_jax import _trees
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
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


@pytest.mark.parametrize(
  ("devices", "fsdp"), [(8, 4), *(pytest.param(n, n, marks=LONG) for n in (1, 2, 4))]
)
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
  for name in ("codes", "judges"):
    np.testing.assert_allclose(found[name], alone[name], rtol=1e-4, atol=1e-4)


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
  of = lambda count: draw(size=(CLASSES, count, SIDE, SIDE, 3)).astype(np.float32)
  shares = np.full((CLASSES, 2), 0.5, np.float32)
  return mj.LearnedCodes(of(2), of(2), shares, shares, of(0))


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
  assert_trees_close(host(info.predicted), host(said.predicted), 1e-4)
  assert_same_params(_trees.by_path(host(found)), _trees.by_path(host(expected)))
  for leaf, wanted in zip(*map(jax.tree.leaves, (found, placed)), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.mark.parametrize("shape", MESHES, ids=str)
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
