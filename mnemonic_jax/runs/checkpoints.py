"""Save and restore with Orbax: the whole train state and the codes."""

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
from mnemonic_jax.runs.files import absolute
from mnemonic_jax.training import TrainState

PyTree = Any

# Orbax logs each save; only we write to stderr.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
  """Keep the latest `keep` checkpoints of one run, by step; each is renamed when it is whole.

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
      self._manager = ocp.CheckpointManager(absolute(folder), options=options)
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
    else:  # a write in the background that fails too would hide the error
      with contextlib.suppress(Exception):
        self._manager.close()

  def latest_step(self) -> int | None:
    """Return the step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, codes: jax.Array) -> None:
    """Begin to write the state at its step; a step that is there already is left alone.

    It returns when the state is copied, so that it may be donated. Later errors are raised by the
    next call of `save` or `wait`.
    """
    step = int(state.step)
    if self.latest_step() == step:
      return
    with self._write_errors(step):
      self._manager.save(step, args=ocp.args.StandardSave(_as_tree(state, codes)))
    self._newest = step

  def wait(self) -> None:
    """Wait until everything that was begun is on disk."""
    with self._write_errors(self._newest):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextmanager
  def _write_errors(self, step: int) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      raise MnemonicError(
        f"{self._folder}: cannot write the checkpoint of step {step}: {_first_line(error)} Earlier "
        "checkpoints are untouched; make room or choose another --out, then run the same command "
        "to resume."
      ) from error

  def require_step(self) -> int:
    """Return the step of the newest whole checkpoint, or say that there is none."""
    step = self.latest_step()
    if step is None:
      raise MnemonicError(
        f"{self._folder}: has no whole checkpoint. Train first: mnemonic train CONFIG --out RUN"
      )
    return step

  def restore(self, state: TrainState, codes: jax.Array) -> tuple[TrainState, jax.Array]:
    """Read the newest checkpoint.

    `state` and `codes`, abstract or not, give the structure, shapes and shardings.
    """
    step = self.require_step()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(state, codes))
    try:
      tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
    except Exception as error:  # Orbax raises many kinds for damaged files and other models
      raise MnemonicError(
        f"{self._folder / str(step)}: cannot be restored as this config's model: "
        f"{_first_line(error)} The files are damaged, or belong to another config. Move the folder "
        "away to fall back to the checkpoint before."
      ) from error
    key = jax.random.wrap_key_data(
      tree["key"], impl=jax.random.key_impl(jnp.empty((), state.key.dtype))
    )
    restored = TrainState(
      tree["params"], tree["model_state"], tree["optimizer_state"], tree["step"], key
    )
    return restored, tree["codes"]


def require_plain(folder: epath.PathLike) -> None:
  """Refuse a path that Orbax reads as a pattern: it would not find its own files again."""
  path = str(absolute(folder))
  if not fnmatch.fnmatchcase(path, path):
    raise MnemonicError(
      f"{path}: has [ and ], which Orbax reads as a pattern; it could not read its files back. "
      "Choose a path without them."
    )


def newest(folder: epath.PathLike) -> epath.Path:
  """Return the folder with the arrays of the newest whole checkpoint of a run.

  `stored_shapes` and `restore_parts` take it.
  """
  with Checkpoints(folder, create=False) as checkpoints:
    return epath.Path(folder) / str(checkpoints.require_step()) / "default"


def restore_codes(folder: epath.PathLike) -> np.ndarray:
  """Read the codes of the newest checkpoint of a run, whatever the model is."""
  checkpoint = newest(folder)
  return restore_parts(checkpoint, {"codes": stored_shapes(checkpoint)["codes"]})["codes"]


def is_checkpoint(folder: epath.PathLike) -> bool:
  """Tell whether Orbax wrote a tree of arrays right here."""
  return (epath.Path(folder) / "_METADATA").is_file()


def stored_shapes(folder: epath.PathLike) -> PyTree:
  """Return the tree of any Orbax checkpoint, a `jax.ShapeDtypeStruct` for each array.

  No array is read.
  """
  if not is_checkpoint(folder):
    raise MnemonicError(
      f"{folder}: is no Orbax checkpoint, it has no _METADATA. Pass the folder that "
      "StandardCheckpointer().save wrote; for a CheckpointManager that is STEP/default."
    )
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      found = checkpointer.metadata(absolute(folder)).item_metadata
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
  """Read a part of the tree that `stored_shapes` returned, as NumPy arrays.

  Nothing else is read. It does not matter which devices wrote the arrays.
  """
  on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      args = ocp.args.PyTreeRestore(parts, restore_args=on_host, partial_restore=True)
      return checkpointer.restore(absolute(folder), args=args)
  except Exception as error:  # as in Checkpoints.restore
    raise MnemonicError(
      f"{folder}: cannot be restored: {_first_line(error)} The files are damaged."
    ) from error


def save_params(folder: epath.PathLike, params: PyTree) -> None:
  """Write params alone to a new folder, atomically."""
  require_plain(folder)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(absolute(folder), params)
  except (OSError, ValueError, RuntimeError) as error:
    raise MnemonicError(f"{folder}: cannot write the params: {_first_line(error)}") from error


def restore_params(folder: epath.PathLike, params: PyTree) -> PyTree:
  """Read what `save_params` wrote, in the structure of `params`."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(
        absolute(folder), jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
      )
  except Exception as error:  # as in Checkpoints.restore
    raise MnemonicError(
      f"{folder}: cannot be restored: {_first_line(error)} The files are damaged. Forget again to "
      "make new ones."
    ) from error


def _as_tree(state: TrainState, codes: jax.Array) -> dict[str, PyTree]:
  """Return the state as plain nested containers; a typed key becomes its data."""
  return {
    "params": state.params,
    "model_state": state.model_state,
    "optimizer_state": state.optimizer_state,
    "step": state.step,
    "key": _key_data(state.key),
    "codes": codes,
  }


def _key_data(key: Any) -> Any:
  """Return the numbers of a typed key, which can be stored; abstract for an abstract key."""
  if not isinstance(key, jax.ShapeDtypeStruct):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _first_line(error: BaseException) -> str:
  text = str(error).strip()
  for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # Orbax wraps these in pages of text
    if (reason := os.strerror(code)) in text:
      return f"{reason}."
  line = textwrap.shorten(text, 200, placeholder=" ...") or type(error).__name__
  return line if line.endswith(".") else f"{line}."
