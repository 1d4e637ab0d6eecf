"""A finished training, restored: what forgetting and evaluation start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mnemonic_jax import _trees, data
from mnemonic_jax.data import Dataset
from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.models import Model
from mnemonic_jax.multihost.sharding import Layout
from mnemonic_jax.runs import files, setup
from mnemonic_jax.runs.checkpoints import Checkpoints, restore_parts, stored_shapes
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.folder import RunFolder
from mnemonic_jax.training import ema_params


class Trained(NamedTuple):
  """What the checkpoint of a finished training says, and its model."""

  model: Model
  params: Any
  ema_params: Any  # a moving average of the params, or None
  model_state: Any
  codes: Any  # (C, K, *shape), or LearnedCodes; None where there are none
  checkpoint: epath.Path
  logits_fn: Callable[[Any, jax.Array], jax.Array]  # in evaluation mode


def restore(run: RunFolder, dataset: Dataset, layout: Layout | None = None) -> Trained:
  """Restore the checkpoint of a run whose training is finished, or say how far it is.

  By default all goes to the first device, whatever devices wrote it.
  """
  resume = f"Finish it first: mnemonic train {run.config.name} --out {run.path}"
  if not run.checkpoints.is_dir():
    raise MnemonicError(f"{run.path}: has no checkpoint yet. {resume}")
  # Whatever the steps, the optimizer's state has the same structure.
  optimizer = setup.make_optimizer(run.config.train, steps=1)
  with Checkpoints(run.checkpoints, create=False) as checkpoints:
    if (newest := checkpoints.latest_step()) is None:
      raise MnemonicError(f"{run.path}: has no whole checkpoint yet. {resume}")
    model = _make_model(run.config, dataset, run.checkpoints / str(newest) / "default")
    first = jax.eval_shape(
      lambda: setup.init_state(run.config, dataset, model, optimizer, run.prng_impl)
    )
    state, codes = checkpoints.restore(*(layout or Layout()).abstract(first))
  done, asked, unit = _progress(run, dataset, int(state.step))
  if done < asked:
    raise MnemonicError(
      f"{run.path}: training stands at {unit} {done:.4g} of {asked:.4g}. {resume}"
    )
  checkpoint = run.checkpoints / str(int(state.step))
  logits_fn = model.logits_fn(state.model_state)
  return Trained(
    model, state.params, ema_params(state), state.model_state, codes, checkpoint, logits_fn
  )


def _make_model(config: Config, dataset: Dataset, checkpoint: epath.PathLike) -> Model:
  """Build the model of a config; its head's text vectors come from the checkpoint, not a file."""
  if not config.model.text_embeddings:
    return setup.make_model(config, dataset)
  stored = _trees.by_path(stored_shapes(checkpoint))
  found = (getattr(leaf, "shape", ()) for path, leaf in stored.items() if path.endswith(".text"))
  shape = next((shape for shape in found if len(shape) == 2), None)
  # Ones until the model state is restored.
  return setup.make_model(config, dataset, None if shape is None else np.ones(shape, np.float32))


def _progress(run: RunFolder, dataset: Dataset, step: int) -> tuple[float, float, str]:
  """How far a training is, how far it was to go, and what is counted.

  Read from its own records if there are any: images may have left the data set since.
  """
  train = run.config.train
  if train.steps:
    return step, train.steps, "step"
  if records := [
    record
    for record in run.metrics()
    if record.get("epoch") and record.get("step", step + 1) <= step
  ]:
    return records[-1]["epoch"] * step / records[-1]["step"], train.epochs, "epoch"
  if not dataset.train.num_examples:
    raise MnemonicError(
      f"{run.path / 'metrics.jsonl'}: has no line up to step {step}, so whether the training is "
      "finished cannot be told without its data set."
    )
  _, _, steps_per_epoch, total_steps = setup.plan(run.config, dataset)
  return step / steps_per_epoch, total_steps / steps_per_epoch, "epoch"


def without_data(config: Config, checkpoint: epath.PathLike) -> Dataset:
  """A stand-in for a config's data set, from the codes in a checkpoint."""
  stored = stored_shapes(checkpoint)
  codes = stored.get("codes") if isinstance(stored, dict) else None
  if len(getattr(codes, "shape", ())) != 5:
    raise MnemonicError(
      f"{checkpoint}: holds no codes (C, K, H, W, channels), from which the images' shape could be "
      "told."
    )
  num_classes, _, *shape = codes.shape  # type: ignore[union-attr]
  return data.absent(config.data.name, shape, num_classes)


def restore_plain(
  folder: epath.Path, config: Config, dataset: Dataset, *, needs_codes: bool = True
) -> Trained:
  """Restore the params, model state and codes of a checkpoint from a user's own training loop.

  The checkpoint is a tree {"params", "codes"}, with "model_state" where the model of the config has
  one and "ema_params" where a moving average of the params is kept (a checkpoint of
  `mnemonic train` has it in its optimizer state). What else it holds is not read, but a tree of the
  params' shape is refused: if that copy is served, it still knows the class.
  """
  model = _make_model(config, dataset, folder)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  stored = stored_shapes(folder)
  needed = {"params", "codes"} if needs_codes else {"params"}
  if not isinstance(stored, dict) or not needed <= set(stored):
    found = ", ".join(sorted(stored)) if isinstance(stored, dict) else f"a {type(stored).__name__}"
    remedy = " Without codes, learn them: mnemonic codes." if needs_codes else ""
    raise MnemonicError(
      f"{folder}: holds {found}; expected {' and '.join(map(repr, sorted(needed, reverse=True)))}, "
      f"and 'model_state' where there is one.{remedy}"
    )
  parts = {"params": params}
  if needs_codes:
    parts["codes"] = stored["codes"]
  if jax.tree.leaves(model_state):
    parts["model_state"] = model_state
  expected = {"params": params, "model_state": model_state}
  copies = _other_copies(stored)
  if "ema_params" in stored:
    expected["ema_params"] = parts["ema_params"] = params
  elif _AVERAGE in copies:
    copies.remove(_AVERAGE)
    expected["optimizer_state"] = parts["optimizer_state"] = {"average": params}
    stored = {**stored, "optimizer_state": {"average": stored["optimizer_state"]["average"]}}
  if copies:
    raise MnemonicError(
      f"{folder}: holds {copies[0]}, of the shapes of params. If it may be served, it must forget "
      "too: save it as ema_params, in the dtype of params. If not, save the checkpoint without it."
    )
  what = f"{config.model.name} of config {config.name!r} for {dataset.name}"
  _require_same(folder, what, stored, expected)
  if needs_codes:
    _require_codes(folder, stored["codes"], dataset)
  tree = jax.device_put(restore_parts(folder, parts))
  model_state = tree.get("model_state", model_state)
  average = tree.get("ema_params", tree.get("optimizer_state", {}).get("average"))
  logits_fn = model.logits_fn(model_state)
  return Trained(
    model,
    tree["params"],
    average,
    model_state,
    tree.get("codes"),
    files.absolute(folder),
    logits_fn,
  )


_AVERAGE = "optimizer_state.average"  # where the checkpoints of `mnemonic train` have it


def _other_copies(stored: dict[str, Any]) -> list[str]:
  """Find what else in a checkpoint has the params' paths and shapes: copies that may be served."""
  layout = lambda tree: {
    path: getattr(leaf, "shape", None) for path, leaf in _trees.by_path(tree).items()
  }
  state = stored.get("optimizer_state")
  trees = {**stored, _AVERAGE: state.get("average") if isinstance(state, dict) else None}
  return [
    n
    for n in trees
    if n not in ("params", "ema_params") and layout(trees[n]) == layout(stored["params"])
  ]


def _require_same(
  folder: epath.Path, what: str, stored: dict[str, Any], expected: dict[str, Any]
) -> None:
  """Refuse params or a model state of another structure, shape or dtype."""
  remedy = "Pass the --config, with the same --model fields, that the checkpoint was trained with."
  theirs = _trees.by_path({name: stored.get(name) for name in expected})
  ours = _trees.by_path(expected)
  for path, leaf in ours.items():
    if path not in theirs:
      raise MnemonicError(f"{folder}: has no {path}; {what} expects {_kind(leaf)}. {remedy}")
    if _kind(theirs[path]) != _kind(leaf):
      raise MnemonicError(
        f"{folder}: {path} is {_kind(theirs[path])} there; {what} expects {_kind(leaf)}. {remedy}"
      )
  if extra := next((path for path in theirs if path not in ours), None):
    raise MnemonicError(f"{folder}: holds {extra}, which {what} has no place for. {remedy}")


def _require_codes(folder: epath.Path, codes: Any, dataset: Dataset) -> None:
  """Refuse codes that are not one or more for each class, of the images' shape."""
  classes = len(dataset.class_names)
  shape: tuple[int, ...] = getattr(codes, "shape", ())
  fits = (
    len(shape) == 2 + len(dataset.shape)
    and (shape[0], *shape[2:]) == (classes, *dataset.shape)
    and shape[1]
  )
  if not fits or not jnp.issubdtype(codes.dtype, jnp.floating):
    raise MnemonicError(
      f"{folder}: codes is {_kind(codes)} there; expected floats "
      f"({classes}, K, {', '.join(map(str, dataset.shape))}), K codes for each class of "
      f"{dataset.name}, as mnemonic_jax.make_codes draws them."
    )


def _kind(leaf: Any) -> str:
  return f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__
