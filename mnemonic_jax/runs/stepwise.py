"""Keep the state of a forget that takes many steps, so that a stopped one goes on.

    .stepwise-HASH.safetensors     the leaves of the state, beside the result to come

HASH is of the request: params, state of the model, codes, classes, method, precision, versions and
the name of the result. Another request has a file of its own. The file knows the class: delete it
with the old checkpoints, if the request is not to be finished.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import load_file, save_file

from mnemonic_jax import methods
from mnemonic_jax.progress import Progress
from mnemonic_jax.runs import files

PyTree = Any

SECONDS_BETWEEN = 60.0  # writes
_PREFIX, _SUFFIX = ".stepwise-", ".safetensors"


class Keeper:
  """The states of one request, one for each copy of the params.

  Args:
    folder: where the result will lie.
    method: how it is forgotten.
    request: what else it depends on; JSON.
  """

  def __init__(self, folder: epath.Path, method: Any, request: dict[str, Any]) -> None:
    self._folder, self._name, self._states = folder, methods.name_of(method), list[Kept]()
    settings = {"name": self._name, **methods.settings(method)}
    self._request = {**request, "method": settings}

  def of(self, params: PyTree) -> Kept:
    """The state of the forget of these params."""
    request = {**self._request, "params_sha256": files.params_sha256(params)}
    text = json.dumps(request, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    self._states.append(Kept(self._folder / f"{_PREFIX}{name}{_SUFFIX}", self._name))
    return self._states[-1]

  def remove(self) -> None:
    """Delete the states of a request that is done."""
    for kept in self._states:
      kept.path.unlink(missing_ok=True)


class Kept:
  """The state of one forget in a file."""

  def __init__(self, path: epath.Path, name: str) -> None:
    self.path, self._written = path, time.monotonic()
    self._bar: Progress | None = None
    self._name, self._done = name, 0

  def load(self) -> list[jax.Array] | None:
    """The leaves of the state to go on from; None to begin, also where the file is damaged."""
    try:
      found = load_file(str(self.path))
      return [jnp.asarray(found[str(index)]) for index in range(len(found))]
    except (OSError, KeyError, safetensors.SafetensorError):
      return None

  def save(self, state: PyTree) -> None:
    """Write the state, once a minute."""
    if time.monotonic() - self._written < SECONDS_BETWEEN:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {str(i): np.asarray(leaf, order="C") for i, leaf in enumerate(jax.tree.leaves(state))}
    with files.written(self.path) as temporary:
      save_file(leaves, temporary)
    self._written = time.monotonic()

  def progress(self, done: int, of: int) -> None:
    """Show how many steps are done."""
    if self._bar is None:
      self._done = done - 1
      self._bar = Progress(self._name, of, "steps", self._done)
    self._bar.update(done - self._done)
    self._done = done
