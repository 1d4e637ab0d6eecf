"""experiments/imagenet_vit/forget.py with the paper's networks that are no ViT: 8 devices as one."""

from __future__ import annotations

import pathlib
import sys

import jax
import numpy as np
import pytest
from toys import host

import mnemonic_jax as mj
from mnemonic_jax.data import Dataset
from mnemonic_jax.data.split import Split
from mnemonic_jax.multihost import sharding
from mnemonic_jax.runs import config as configs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments" / "imagenet_vit"))
import forget as forget_script

CLASSES = 8


def forgotten(name, side, mesh):
  """Params, forgotten params and info of a model with its first weights, on a mesh."""
  config = configs.build(
    "tiny", {"data": {"name": "imagenet2012", "side": side}, "model": {"name": name}}
  )
  nothing = Split(np.zeros((0, side, side, 3), np.uint8), np.zeros(0, np.int32))
  dataset = Dataset(
    "imagenet2012", nothing, nothing, tuple(map(str, range(CLASSES))), 255, (0.5,) * 3, (0.25,) * 3
  )
  chosen = np.arange(CLASSES) == 3
  with jax.set_mesh(mesh):
    program = forget_script.make_program(config, dataset, mesh)
    placed = tuple(sharding.tree_shardings(mesh, tree) for tree in program.arguments[:2])
    params, model_state = jax.jit(program.model.init, out_shardings=placed)(jax.random.key(0))
    codes = mj.make_codes(jax.random.key(1), CLASSES, dataset.shape)
    codes = forget_script.place_codes(np.asarray(codes), program)
    method = mj.Perturbation(np.float32(1e-5), np.float32(1e-2))
    moved, info = program.step(params, model_state, codes, chosen, ~chosen, method)
  return host(params), host(moved), jax.device_get(info)


@pytest.mark.long
@pytest.mark.parametrize(
  ("name", "side"), [("resnet18", 32), ("resnext50_32x4d", 32), ("swin_t", 224)]
)
def test_a_forget_on_a_mesh_is_that_on_one_device(name, side):
  alone = forgotten(name, side, sharding.make_mesh(1, 1, jax.devices()[:1]))
  spread = forgotten(name, side, sharding.make_mesh(2, 4))
  assert int(spread[2].info["sign"]) == int(alone[2].info["sign"])
  flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
  before, there, here = flat(alone[0]), flat(spread[1]), flat(alone[1])
  assert 1e-3 < np.max(np.abs(here - before)) <= 1.01e-2
  assert (
    np.mean(np.abs(there - here) > 1e-2 * np.abs(here - before) + 1e-6) < 0.01
  )  # small Fishers are rounding alone
