"""Checkpoints on other meshes: written on eight devices, read on fewer, and the other way round."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mnemonic_jax import training
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs.checkpoints import Checkpoints

# A train state on a mesh of this process's devices, the kernel split over them; `action` says
# whether to save or to compare it.
PROGRAM = """
import sys, pathlib, jax, jax.numpy as jnp, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mnemonic_jax import training
from mnemonic_jax.runs.checkpoints import Checkpoints
folder, action = pathlib.Path(sys.argv[1]), sys.argv[2]
rows, columns = map(int, sys.argv[3:])
assert len(jax.devices()) == rows * columns
mesh = jax.make_mesh((rows, columns), ("data", "model"))
place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
optimizer = optax.sgd(0.1, momentum=0.9)
fill = 1.0 if action == "save" else 0.0
params = {
  "kernel": place(fill * jnp.arange(64.0).reshape(8, 8), P("model", "data")),
  "bias": place(fill * jnp.arange(8.0), P()),
}
mean = place(fill * jnp.ones(8), P("model"))
state = training.init_train_state(params, {"mean": mean}, optimizer, jax.random.key(int(fill)))
codes = place(fill * jnp.arange(16.0).reshape(2, 1, 8), P())
with Checkpoints(folder, create=action == "save") as checkpoints:
  if action == "save":
    checkpoints.save(state._replace(step=jnp.int32(7)), codes)
    checkpoints.wait()
  else:
    state, codes = checkpoints.restore(state, codes)
    kernel, placed = state.params["kernel"], params["kernel"].sharding
    assert (kernel == jnp.arange(64.0).reshape(8, 8)).all()
    assert (state.params["bias"] == jnp.arange(8.0)).all()
    assert kernel.sharding.is_equivalent_to(placed, 2), kernel.sharding
    assert state.optimizer_state[0].trace["kernel"].sharding.is_equivalent_to(placed, 2)
    assert (state.model_state["mean"] == 1).all() and int(state.step) == 7
    assert (codes.ravel() == jnp.arange(16.0)).all()
    assert state.key == jax.random.key(1)
print("well")
"""


def on_devices(folder, action: str, rows: int, columns: int) -> None:
  flags = f"--xla_force_host_platform_device_count={rows * columns}"
  command = [sys.executable, "-c", PROGRAM, str(folder), action, str(rows), str(columns)]
  done = subprocess.run(
    command, text=True, capture_output=True, env=os.environ | {"XLA_FLAGS": flags}, timeout=120
  )
  assert done.stdout == "well\n" and not done.stderr, done.stderr


@pytest.mark.parametrize(("written", "read"), [((2, 4), [(4, 1), (1, 1)]), ((1, 1), [(2, 4)])])
def test_a_checkpoint_is_read_on_another_mesh(written, read, tmp_path):
  on_devices(tmp_path / "run", "save", *written)
  for mesh in read:
    on_devices(tmp_path / "run", "compare", *mesh)


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
