"""Where arrays lie on many devices: a mesh of two axes, and one table of rules over leaf paths.

Examples are split over both axes. Params, and all that is shaped like them, are split over `fsdp` and copied along `data`:
each layer is gathered when it is used, and its gradients or Fishers are summed onto the shards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any

DATA, FSDP = "data", "fsdp"
# Path pattern -> the first axis that may be split; the first match wins. Of the axes allowed, the largest that fsdp
# divides is split. Layers of a stack stay whole: a scan takes one after the other.
RULES = ((r"\bblocks\b", 1), (r"", 0))
# Leaves of fewer elements (biases, scales, counters) are copied to all devices.
_LEAST_SPLIT = 2**13


def make_mesh(
  data: int | None = None, fsdp: int | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
  """Arrange all devices as data x fsdp.

  Without sizes, fsdp is the devices of one process: params are gathered inside a host and only gradients travel between
  hosts. One size alone gives the other.

  Args:
    data, fsdp: sizes of the axes; data * fsdp must be the number of devices.
    devices: all devices of all processes if not given.

  Raises:
    ValueError: sizes that do not multiply to the number of devices.

  >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
  {'data': 1, 'fsdp': 1}
  """
  devices = list(jax.devices() if devices is None else devices)
  count = len(devices)
  if data is None and fsdp is None:
    fsdp = count // len({device.process_index for device in devices})
  if data is None:
    data = count // fsdp if fsdp else 0
  if fsdp is None:
    fsdp = count // data if data else 0
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise ValueError(
      f"mesh: got data {data} x fsdp {fsdp} for {count} devices; expected a product of {count}. Leave one of the two out."
    )
  return Mesh(np.array(devices).reshape(data, fsdp), (DATA, FSDP))


def tree_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """A NamedSharding for every leaf of a tree of arrays, by its path and shape: params, optimizer state, Fishers.

  Raises:
    ValueError: a large leaf of which fsdp divides no axis.

  >>> params = {"kernel": jax.ShapeDtypeStruct((256, 1000), "float32")}
  >>> tuple(tree_shardings(make_mesh(devices=jax.devices()[:1]), params)["kernel"].spec)
  (None, 'fsdp')
  """

  def place(path: Any, leaf: Any) -> NamedSharding:
    return NamedSharding(mesh, _spec(jax.tree_util.keystr(path), np.shape(leaf), mesh.shape[FSDP]))

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples, the leading axis, over all devices."""
  return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def require_batch(mesh: Mesh, name: str, size: int) -> None:
  """Refuse a number of examples that does not spread evenly."""
  if size % mesh.size:
    raise ValueError(
      f"{name}: got {size} for {mesh.size} devices; expected a multiple of {mesh.size}."
    )


def _spec(path: str, shape: Sequence[int], fsdp: int) -> PartitionSpec:
  if math.prod(shape) < _LEAST_SPLIT:
    return PartitionSpec()
  first = next(first for pattern, first in RULES if re.search(pattern, path))
  axes = [axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0]
  if not axes:
    most = max(math.gcd(size, fsdp) for size in shape[first:])
    raise ValueError(
      f"mesh: fsdp {fsdp} divides no axis of {path} {tuple(shape)}; {most} does. Use a smaller fsdp, and a larger data."
    )
  axis = max(axes, key=lambda axis: shape[axis])
  return PartitionSpec(*(FSDP if i == axis else None for i in range(axis + 1)))
