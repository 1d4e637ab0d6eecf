"""Checkpoints on other meshes: written on eight devices, read on fewer, and the other way round."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from running import HANG

from mnemonic_jax import training
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs.checkpoints import Checkpoints

# Read a checkpoint that more devices wrote, on one device, and write it again.
PROGRAM = """
import jax, test_checkpoints
import sys
assert len(jax.devices()) == 1
test_checkpoints.compare(sys.argv[1], 1, 1)
test_checkpoints.save(sys.argv[2], 1, 1)
print("well")
"""


def state_on_mesh(rows: int, columns: int, fill: float) -> tuple[training.TrainState, jax.Array]:
  """A train state and codes on a mesh, the kernel split over all its devices."""
  devices = jax.devices()[: rows * columns]
  mesh = jax.make_mesh((rows, columns), ("data", "model"), devices=devices)
  place = lambda x, *spec: jax.device_put(fill * x, NamedSharding(mesh, PartitionSpec(*spec)))
  params = {
    "kernel": place(jnp.arange(64.0).reshape(8, 8), "model", "data"),
    "bias": place(jnp.arange(8.0)),
  }
  model_state = {"mean": place(jnp.ones(8), "model")}
  optimizer, key = optax.sgd(0.1, momentum=0.9), jax.random.key(int(fill))
  state = training.init_train_state(params, model_state, optimizer, key)
  return state, place(jnp.arange(16.0).reshape(2, 1, 8))


def save(folder, rows: int, columns: int) -> None:
  state, codes = state_on_mesh(rows, columns, 1.0)
  with Checkpoints(pathlib.Path(folder)) as checkpoints:
    checkpoints.save(state._replace(step=jnp.int32(7)), codes)
    checkpoints.wait()


def compare(folder, rows: int, columns: int) -> None:
  """Read into a state of zeros on a mesh: values and placement."""
  wanted, wanted_codes = state_on_mesh(rows, columns, 1.0)
  zeros, zero_codes = state_on_mesh(rows, columns, 0.0)
  with Checkpoints(pathlib.Path(folder), create=False) as checkpoints:
    state, codes = checkpoints.restore(zeros, zero_codes)
  assert int(state.step) == 7 and state.key == jax.random.key(1)
  read = (state.params, state.model_state, state.optimizer_state[0].trace, codes)
  there = (wanted.params, wanted.model_state, wanted.optimizer_state[0].trace, wanted_codes)
  jax.tree.map(np.testing.assert_array_equal, read, there)
  same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
  assert jax.tree.all(jax.tree.map(same, read, there))


@pytest.mark.parametrize(
  ("written", "read"),
  [((2, 4), (4, 1)), pytest.param((4, 1), (2, 4), marks=pytest.mark.long)],
)
def test_a_checkpoint_is_read_on_another_mesh(written, read, tmp_path):
  save(tmp_path / "run", *written)
  compare(tmp_path / "run", *read)


def test_a_process_with_other_devices_reads_a_checkpoint(tmp_path):
  save(tmp_path / "eight", 2, 4)
  command = [sys.executable, "-c", PROGRAM, str(tmp_path / "eight"), str(tmp_path / "one")]
  flags = {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(
    command, text=True, capture_output=True, env=os.environ | flags, timeout=HANG
  )
  assert done.stdout == "well\n" and not done.stderr, done.stderr
  compare(tmp_path / "one", 2, 4)


def state_of(value: float) -> training.TrainState:
  return training.init_train_state(
    {"w": jnp.full((300, 300), value)}, {}, optax.sgd(0.1), jax.random.key(0)
  )


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
  overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state.params), donate_argnums=0)
  codes = jnp.ones((2, 1, 3))
  with Checkpoints(tmp_path / "run") as checkpoints:
    for step in range(1, 6):
      state = state_of(step)._replace(step=jnp.int32(step))
      checkpoints.save(state, codes)
      overwrite(state)  # as the next train step does
    checkpoints.wait()
    restored, _ = checkpoints.restore(state_of(0), codes)
    assert checkpoints.latest_step() == 5 and sorted(
      p.name for p in (tmp_path / "run").iterdir()
    ) == ["4", "5"]
  np.testing.assert_array_equal(restored.params["w"], 5.0)


@pytest.mark.parametrize("then", ["wait", "leave", "fail"])
def test_a_write_that_fails_in_the_background_is_told_once(then, tmp_path, monkeypatch):
  def fail(*arguments, **options):
    raise OSError(28, "No space left on device")

  told = {"fail": (KeyError, "other")}.get(
    then, (MnemonicError, r"the checkpoint of step 3: No space left on device\.")
  )
  with pytest.raises(told[0], match=told[1]), Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(state_of(1.0)._replace(step=jnp.int32(3)), jnp.ones((2, 1, 3)))
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
    if then == "wait":
      checkpoints.wait()
    elif then == "fail":
      raise KeyError("other")
