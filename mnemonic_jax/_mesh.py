"""How arrays lie on devices: placements, explicit meshes, and what varies inside shard_map."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mnemonic_jax import _checks

PyTree = Any


class Spread(NamedTuple):
  """Put examples on all axes of a mesh; `sums` are those that split the params, and so the sums."""

  mesh: jax.sharding.Mesh
  sums: tuple[str, ...]

  def examples(self, x: jax.Array) -> jax.Array:
    """Each device its part of (N, ...)."""
    return jax.lax.with_sharding_constraint(
      x, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
    )


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the params of a computation lie, and so where everything else goes; static under jit.

  Attributes:
    platform: "cpu", "gpu" or "tpu", where it can be told.
    shardings: a NamedSharding for each leaf of params on a mesh; None elsewhere.
  """

  platform: str | None = None
  shardings: tuple[NamedSharding, ...] | None = None

  @staticmethod
  def of(params: PyTree, others: PyTree, shardings: tuple[NamedSharding, ...] | None) -> Placement:
    """Read the placement off concrete params, unless `shardings` says it for traced ones."""
    leaves = jax.tree.leaves(params)
    if shardings is not None and len(shardings) != len(leaves):
      raise ValueError(
        f"execution.shardings: got {len(shardings)} for {len(leaves)} leaves of params; expected "
        "one for each."
      )
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if not arrays or not _checks.is_concrete(params):
      return Placement(None, shardings)
    platform = next(iter(arrays[0].devices())).platform
    found = [getattr(leaf, "sharding", None) for leaf in leaves]
    meshes = {sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)}
    if shardings is not None or len(meshes) != 1 or not _checks.is_concrete(others):
      return Placement(platform, shardings)
    copied = NamedSharding(meshes.pop(), PartitionSpec())
    placed = (sharding if isinstance(sharding, NamedSharding) else copied for sharding in found)
    return Placement(platform, tuple(placed))

  @property
  def spread(self) -> Spread | None:
    """How examples and sums are spread; None without a mesh, on an explicit one, on one device."""
    if not self.shardings or self.mesh.explicit_axes or self.mesh.size == 1:
      return None
    entries = [entry for sharding in self.shardings for entry in sharding.spec if entry]
    split = {
      name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))
    }
    return Spread(self.mesh, tuple(name for name in self.mesh.axis_names if name in split))

  @property
  def mesh(self) -> Any:
    """The mesh that the params lie on."""
    return self.shardings[0].mesh if self.shardings else None

  def of_sums(self, mask: tuple[bool, ...]) -> list[NamedSharding] | None:
    """Where the sums of each leaf under a mask go: like it, with the axis of groups in front."""
    if self.shardings is None:
      return None
    grouped = lambda p: NamedSharding(p.mesh, PartitionSpec(None, *p.spec))
    return [grouped(p) for p, kept in zip(self.shardings, mask, strict=False) if kept]


NOWHERE = Placement()  # where nothing is known


def on_one_device(tree: PyTree) -> bool:
  """Whether no array of a tree is spread over several devices."""
  arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
  return all(isinstance(array.sharding, jax.sharding.SingleDeviceSharding) for array in arrays)


def with_automatic_axes(
  function: Callable[..., PyTree], batch: PyTree, *arguments: Any, out_specs: PyTree
) -> PyTree:
  """Return `function(batch, *arguments)`; inside jit only.

  A batch that is sharded over axes of an explicit mesh is computed with these axes automatic. As
  explicit axes they would not let the examples be cut into chunks or mapped over beside sharded
  params, and a lookup would have no sharding of its own.
  """
  shardings = (jax.typeof(leaf).sharding for leaf in jax.tree.leaves(batch))
  mesh = next((s.mesh for s in shardings if s.mesh.explicit_axes and any(s.spec)), None)
  if mesh is None:
    return function(batch, *arguments)
  with jax.sharding.use_abstract_mesh(mesh):
    automatic = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out_specs)
    return automatic(batch, *arguments)


def varying_axes(tree: PyTree) -> frozenset[str]:
  """Mesh axes of the surrounding `jax.shard_map` along which any leaf varies."""
  abstract = [
    x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(tree)
  ]
  # If a later jax renames this attribute, fail here: without it every Fisher is silently wrong.
  return frozenset().union(
    *(x.manual_axis_type.varying for x in abstract if x.manual_axis_type is not None)
  )


def varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """Mark `x` as varying along `axes`.

  Without it shard_map sums gradients of replicated params *before* the square.
  """
  missing = tuple(sorted(axes - varying_axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape: Sequence[int], dtype: Any, like: PyTree) -> jax.Array:
  """Zeros to start a loop with, varying along the mesh axes that `like` varies along."""
  return varying(jnp.zeros(shape, dtype), varying_axes(like))


def gathered(tree: PyTree) -> PyTree:
  """Return whole copies of arrays on every device of the mesh that `jax.set_mesh` has set, if any.

  Params that are split over a mesh meet examples that are split over it too: gather the smaller of
  the two, a layer at a time, rather than let the compiler choose.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or mesh.explicit_axes:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)
