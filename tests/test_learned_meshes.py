"""Learned codes and forgets of one step on meshes of 1, 2, 4 and 8 devices equal those on one."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from running import call, snapshot
from safetensors.numpy import load_file
from toys import assert_trees_close

from mnemonic_jax import _trees
from mnemonic_jax.errors import UsageError
from mnemonic_jax.multihost import sharding
from mnemonic_jax.runs import config as configs
from mnemonic_jax.runs import files, setup
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
  """Judges stand for the same examples, and what codes were learned to be agrees to 1 %."""
  np.testing.assert_allclose(found["judge_weights"], alone["judge_weights"], rtol=1e-6)
  np.testing.assert_allclose(found["judge_accuracy"], alone["judge_accuracy"], rtol=1e-6)
  for name in ("codes", "judges"):
    print(name, np.max(np.abs(found[name]-alone[name])))
