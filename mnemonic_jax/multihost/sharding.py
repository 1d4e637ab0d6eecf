"""Where arrays lie on many devices: a mesh of two axes, and one table of rules over leaf paths.

Examples are split over both axes. Params, and all that is shaped like them, are split over `fsdp`
and copied along `data`: each layer is gathered when it is used, and its gradients or Fishers are
summed onto the shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any

DATA, FSDP = "data", "fsdp"
# Path pattern -> the first axis that may be split; the first match wins. Of the allowed axes, the
# largest that fsdp divides is split. Layers of a stack stay whole: a scan takes them one by one.
RULES = ((r"\bblocks\b", 1), (r"", 0))
# Leaves of fewer elements (biases, scales, counters) are copied to all devices.
_LEAST_SPLIT = 2**13


def make_mesh(
  data: int | None = None, fsdp: int | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
  """Arrange all devices as data x fsdp.

  Without sizes, fsdp is the devices of one process: params are gathered inside a host and only
  gradients travel between hosts. One size alone gives the other.

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
      f"mesh: got data {data} x fsdp {fsdp} for {count} devices; expected a product of {count}. "
      "Leave one of the two out."
    )
  return Mesh(np.array(devices).reshape(data, fsdp), (DATA, FSDP))


def tree_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """Make a NamedSharding for every leaf of a tree of arrays, by its path and shape.

  Params, optimizer state and Fishers, for example.

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
  """Split the leading axis, examples, over all devices."""
  return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
  """Put a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def _spec(path: str, shape: Sequence[int], fsdp: int) -> PartitionSpec:
  if math.prod(shape) < _LEAST_SPLIT:
    return PartitionSpec()
  first = next(first for pattern, first in RULES if re.search(pattern, path))
  axes = [axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0]
  if not axes:
    most = max(math.gcd(size, fsdp) for size in shape[first:])
    raise ValueError(
      f"mesh: fsdp {fsdp} divides no axis of {path} {tuple(shape)}; {most} does. "
      "Use a smaller fsdp, and a larger data."
    )
  axis = max(axes, key=lambda axis: shape[axis])
  return PartitionSpec(*(FSDP if i == axis else None for i in range(axis + 1)))


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of a job lie: over a mesh by the rules above, or all on the first device.

  >>> Layout().size
  1
  """

  mesh: Mesh | None = None

  @property
  def size(self) -> int:
    """How many devices there are."""
    return self.mesh.size if self.mesh else 1

  @property
  def process(self) -> tuple[int, int]:
    """Which part of the examples this process places, and how many parts there are."""
    return (jax.process_index(), jax.process_count()) if self.mesh else (0, 1)

  @property
  def copied(self) -> jax.sharding.Sharding:
    """The sharding of what every device has whole."""
    return replicated(self.mesh) if self.mesh else self._first

  @property
  def examples(self) -> jax.sharding.Sharding:
    """The sharding of examples along their leading axis."""
    return batch_sharding(self.mesh) if self.mesh else self._first

  def shardings(self, tree: PyTree) -> PyTree:
    """The shardings of params, or of what is shaped like them."""
    return tree_shardings(self.mesh, tree) if self.mesh else jax.tree.map(self._one, tree)

  def abstract(self, tree: PyTree) -> PyTree:
    """Shapes and shardings of params, or of what is shaped like them, without arrays."""
    return abstract(tree, self.shardings(tree))

  def place(self, parts: PyTree) -> PyTree:
    """Make this process's part of some examples, on the host, its part of arrays on all devices."""
    if not self.mesh:
      return jax.device_put(parts, self._first)
    make = jax.make_array_from_process_local_data
    return jax.tree.map(lambda part: make(self.examples, part), parts)

  def require_examples(self, name: str, count: int) -> None:
    """Refuse a number of examples that does not spread evenly."""
    if count % self.size:
      raise ValueError(
        f"{name}: got {count} for {self.size} devices; expected a multiple of {self.size}."
      )

  def used(self) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which programs are traced and run on the mesh."""
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  @property
  def _first(self) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def _one(self, leaf: Any) -> jax.sharding.Sharding:
    return self._first


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
  """Make a `jax.ShapeDtypeStruct` with its sharding of each leaf."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
