"""Make a trained classifier forget classes on request, without its training data, in JAX.

The public names stand in the order of the pipeline. They are imported on first use, so that
`mnemonic --help` does not wait for jax.
"""

# ruff: noqa: F401 (what type checkers see of the table below)

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from mnemonic_jax.auditing.door import audit
  from mnemonic_jax.auditing.report import AuditReport
  from mnemonic_jax.auditing.subjects import Subject
  from mnemonic_jax.codes import make_codes, mix
  from mnemonic_jax.evaluation import Scores, evaluate
  from mnemonic_jax.fisher.door import (
    Execution,
    FisherPlan,
    LeafPlan,
    diagonal_fisher,
    explain_fisher,
  )
  from mnemonic_jax.forgetting import ForgetInfo, ForgetResult, forget, forget_step
  from mnemonic_jax.learning.door import learn_codes
  from mnemonic_jax.learning.learned import LearnedCodes
  from mnemonic_jax.losses import softmax_cross_entropy
  from mnemonic_jax.methods.dampening import Dampening
  from mnemonic_jax.methods.drop_row import DropRow
  from mnemonic_jax.methods.perturbation import (
    Perturbation,
    amplitude,
    choose_sign,
    layer_scale,
    perturb,
  )
  from mnemonic_jax.methods.projection import Projection, ProjectionPlan, explain_projection
  from mnemonic_jax.methods.relearn import Relearn
  from mnemonic_jax.methods.search import CannotForget
  from mnemonic_jax.training import TrainState, init_train_state, make_train_step

__version__ = "0.1.0"

_MODULE_OF = {
  "softmax_cross_entropy": "losses",
  "make_codes": "codes",
  "mix": "codes",
  "TrainState": "training",
  "init_train_state": "training",
  "make_train_step": "training",
  "Execution": "fisher.door",
  "diagonal_fisher": "fisher.door",
  "FisherPlan": "fisher.door",
  "LeafPlan": "fisher.door",
  "explain_fisher": "fisher.door",
  "LearnedCodes": "learning.learned",
  "learn_codes": "learning.door",
  "Scores": "evaluation",
  "evaluate": "evaluation",
  "Projection": "methods.projection",
  "ProjectionPlan": "methods.projection",
  "explain_projection": "methods.projection",
  "DropRow": "methods.drop_row",
  "Relearn": "methods.relearn",
  "Dampening": "methods.dampening",
  "Perturbation": "methods.perturbation",
  "amplitude": "methods.perturbation",
  "layer_scale": "methods.perturbation",
  "perturb": "methods.perturbation",
  "choose_sign": "methods.perturbation",
  "CannotForget": "methods.search",
  "ForgetInfo": "forgetting",
  "ForgetResult": "forgetting",
  "forget": "forgetting",
  "forget_step": "forgetting",
  "Subject": "auditing.subjects",
  "audit": "auditing.door",
  "AuditReport": "auditing.report",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
  if name not in _MODULE_OF:
    raise AttributeError(
      f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )
  return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
