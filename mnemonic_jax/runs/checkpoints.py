"""Checkpoints with Orbax: the whole train state and the codes, atomic, resumable."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import paths
from mnemonic_jax.training import TrainState

PyTree = Any

logging.getLogger("absl").setLevel(
  logging.ERROR
)  # Orbax logs each save; ours is the only voice on stderr


class Checkpoints:
  """The checkpoints of one run, by step: the latest `keep`, each written beside and renamed when whole.

  An older one is deleted when the newest is whole, so with one to keep there are two for a moment.
  """

  def __init__(self, folder: epath.PathLike, *, keep: int = 2, create: bool = True) -> None:
    self._folder, self._newest = epath.Path(folder), 0
    if create:
      require_plain(folder)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=create,
      cleanup_tmp_directories=create,
      enable_async_checkpointing=True,
    )
    try:
      self._manager = ocp.CheckpointManager(paths.absolute(folder), options=options)
    except (OSError, ValueError) as error:
      raise MnemonicError(
        f"{folder}: cannot be opened for checkpoints: {_first_line(error)}"
      ) from error

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if error is None:
      with self._write_errors(self._newest):
        self._manager.close()
    else:  # and a write in the background that fails too would hide it
      with contextlib.suppress(Exception):
        self._manager.close()

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, codes: jax.Array) -> None:
    """Begin to write the state at its step; a step that is there already is left alone.

    Returns when the state is copied, so that it may be donated. What goes wrong later is raised by the next call of
    `save` or `wait`.
    """
    step = int(state.step)
    if self.latest_step() == step:
      return
    with self._write_errors(step):
      self._manager.save(step, args=ocp.args.StandardSave(_as_tree(state, codes)))
    self._newest = step

  def wait(self) -> None:
    """Return when all that was begun is on disk."""
    with self._write_errors(self._newest):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextmanager
  def _write_errors(self, step: int) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      raise MnemonicError(
        f"{self._folder}: cannot write the checkpoint of step {step}: {_first_line(error)} "
        "Earlier checkpoints are untouched; make room or choose another --out, then run the same command to resume."
      ) from error

  def require_step(self) -> int:
    """Step of the newest whole checkpoint."""
    step = self.latest_step()
    if step is None:
      raise MnemonicError(
        f"{self._folder}: holds no whole checkpoint. Train first: mnemonic train CONFIG --out RUN"
      )
    return step

  def restore(self, state: TrainState, codes: jax.Array) -> tuple[TrainState, jax.Array]:
    """Read the newest checkpoint into the structure, shapes and shardings of `state` and `codes` (abstract or not)."""
    step = self.require_step()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(state, codes))
    try:
      tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
    except (
      Exception
    ) as error:  # Orbax raises many kinds for files that are damaged or of another model
      raise MnemonicError(
        f"{self._folder / str(step)}: cannot be restored as this config's model: {_first_line(error)} "
        "The files are damaged, or belong to another config. Move the folder away to fall back to the checkpoint before."
      ) from error
    key = jax.random.wrap_key_data(
      tree["key"], impl=jax.random.key_impl(jnp.empty((), state.key.dtype))
    )
    restored = TrainState(
      tree["params"], tree["model_state"], tree["optimizer_state"], tree["step"], key
    )
    return restored, tree["codes"]


def require_plain(folder: epath.PathLike) -> None:
  """Refuse to write where Orbax, which takes the whole path for a pattern, would not find its own files again."""
  path = str(paths.absolute(folder))
  if not fnmatch.fnmatchcase(path, path):
    raise MnemonicError(
      f"{path}: holds [ and ], which Orbax takes for a pattern; what it writes there cannot be read. Choose a path without."
    )


def newest(folder: epath.PathLike) -> epath.Path:
  """Where the newest whole checkpoint of a run has its arrays, as `stored_shapes` and `restore_parts` take it."""
  with Checkpoints(folder, create=False) as checkpoints:
    return epath.Path(folder) / str(checkpoints.require_step()) / "default"


def restore_codes(folder: epath.PathLike) -> np.ndarray:
  """The codes of the newest checkpoint of a run, on the host, whatever the model is."""
  checkpoint = newest(folder)
  return restore_parts(checkpoint, {"codes": stored_shapes(checkpoint)["codes"]})["codes"]


def is_checkpoint(folder: epath.PathLike) -> bool:
  """Tell whether Orbax wrote a tree of arrays right here."""
  return (epath.Path(folder) / "_METADATA").is_file()


def stored_shapes(folder: epath.PathLike) -> PyTree:
  """The tree of any Orbax checkpoint in nested containers, a `jax.ShapeDtypeStruct` for each array; reads no array."""
  if not is_checkpoint(folder):
    raise MnemonicError(
      f"{folder}: is no Orbax checkpoint, it has no _METADATA. Pass the folder that StandardCheckpointer().save wrote; "
      "a CheckpointManager's is STEP/default."
    )
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      found = checkpointer.metadata(paths.absolute(folder)).item_metadata
    if found is None:
      raise ValueError("_METADATA is damaged")
    shape = lambda x: (
      x if getattr(x, "dtype", None) is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    return jax.tree.map(shape, found.tree)
  except Exception as error:  # as in Checkpoints.restore
    raise MnemonicError(
      f"{folder}: cannot be restored: {_first_line(error)} The files are damaged."
    ) from error


def restore_parts(folder: epath.PathLike, parts: PyTree) -> PyTree:
  """Read a part of what `stored_shapes` found, and nothing else, as NumPy arrays, whatever devices wrote it."""
  on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      args = ocp.args.PyTreeRestore(parts, restore_args=on_host, partial_restore=True)
      return checkpointer.restore(paths.absolute(folder), args=args)
  except Exception as error:  # as in Checkpoints.restore
    raise MnemonicError(
      f"{folder}: cannot be restored: {_first_line(error)} The files are damaged."
    ) from error


def save_params(folder: epath.PathLike, params: PyTree) -> None:
  """Write params alone to a new folder, atomically."""
  require_plain(folder)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(paths.absolute(folder), params)
  except (OSError, ValueError, RuntimeError) as error:
    raise MnemonicError(f"{folder}: cannot write the params: {_first_line(error)}") from error


def restore_params(folder: epath.PathLike, params: PyTree) -> PyTree:
  """Read what `save_params` wrote, in the structure of `params`."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(
        paths.absolute(folder), jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
      )
  except Exception as error:  # as in Checkpoints.restore
    raise MnemonicError(
      f"{folder}: cannot be restored: {_first_line(error)} The files are damaged. Forget again to make new ones."
    ) from error


def _as_tree(state: TrainState, codes: jax.Array) -> dict[str, PyTree]:
  """The state as plain nested containers; a typed key is stored as its data."""
  return {
    "params": state.params,
    "model_state": state.model_state,
    "optimizer_state": state.optimizer_state,
    "step": state.step,
    "key": _key_data(state.key),
    "codes": codes,
  }


def _key_data(key: Any) -> Any:
  """The numbers of a typed key, which are what is stored; abstract for an abstract one."""
  if not isinstance(key, jax.ShapeDtypeStruct):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _first_line(error: BaseException) -> str:
  text = str(error).strip()
  for code in (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
  ):  # these come wrapped in a page of internals
    if (reason := os.strerror(code)) in text:
      return f"{reason}."
  line = textwrap.shorten(text, 200, placeholder=" ...") or type(error).__name__
  return line if line.endswith(".") else f"{line}."
