"""What methods that learn need of a trained model: recalled codes, fresh weights, training mode."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mnemonic_jax.data import Dataset
from mnemonic_jax.forgetting import forget_step
from mnemonic_jax.learning import LearnedCodes
from mnemonic_jax.methods import DropRow, Projection, Relearn
from mnemonic_jax.methods.relearn import modules, renewed
from mnemonic_jax.runs import files, learned
from mnemonic_jax.runs.config import Config
from mnemonic_jax.runs.trained import Trained

_KEY = 1  # of the fresh weights; trainings draw theirs from other keys


def require_possible(method: Any, trained: Trained, classes: list[int], shape: Any) -> None:
  """Refuse a method that this model cannot do, before minutes go into recalling codes for it.

  Args:
    shape: of one input.
  """
  num_classes = len(getattr(trained.codes, "codes", trained.codes))
  codes = jax.ShapeDtypeStruct((num_classes, 1, *shape), "float32")
  forget = jnp.asarray(np.isin(np.arange(num_classes), classes))
  if isinstance(method, Relearn):
    renewed(trained.logits_fn, trained.params, codes.update(shape=(1, *shape)), method.depth)
    method = DropRow()
  elif isinstance(method, Projection):
    method = dataclasses.replace(method, heal=0, depth=None if method.sites else method.depth or 0)
  step = partial(forget_step, trained.logits_fn, forget=forget, remain=~forget, method=method)
  jax.eval_shape(step, trained.params, codes)


def completed(method: Relearn, trained: Trained, shape: Any) -> Relearn:
  """Give a method fresh weights, and the training mode of the modules that it learns anew.

  Args:
    shape: of one input.
  """
  model, state = trained.model, trained.model_state
  fresh, _ = model.init(jax.random.key(_KEY))
  if not jax.tree.leaves(state):
    return dataclasses.replace(method, fresh=fresh)
  one = jax.ShapeDtypeStruct((1, *shape), "float32")
  which = renewed(trained.logits_fn, trained.params, one, method.depth)
  return dataclasses.replace(
    method,
    fresh=fresh,
    train_fn=model.train_fn(modules(which)),
    fold_fn=model.fold_fn(state),
    statistics=state,
  )


def with_recalled(
  trained: Trained, per_class: int, config: Config, dataset: Dataset, folder: epath.Path | None
) -> Trained:
  """The trained model with at least `per_class` recalled codes a class beside its own.

  They are recalled from the model alone where they are missing, and kept in `folder` if there is
  one, for the next request.
  """
  codes = trained.codes
  if not isinstance(codes, LearnedCodes):
    none = jnp.zeros((len(codes), 0))
    codes = LearnedCodes(codes, codes[:, :0], none, none, none, codes[:, :0])
  own = codes.recalled if codes.judges.shape[1] or codes.recalled.shape[1] else codes.codes
  from_model = isinstance(trained.codes, LearnedCodes) and own.shape[1] >= per_class
  if from_model:
    return trained
  with tempfile.TemporaryDirectory() as temporary:
    path = (folder or epath.Path(temporary)) / f"recalled_{per_class}.safetensors"
    if not path.exists():
      request = learned.Request(from_model=True, per_class=per_class)
      learned.learn(trained, config, dataset, path, request)
    params = files.params_sha256(trained.params)
    found = learned.load(path, params, len(dataset.class_names), dataset.shape)
  return trained._replace(codes=dataclasses.replace(codes, recalled=found.codes))
