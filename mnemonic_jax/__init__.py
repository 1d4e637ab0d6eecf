"""One-shot machine unlearning with mnemonic codes, in JAX.

The names below stand in the order of the pipeline. They are imported on first use, so `mnemonic --help` does not wait for
jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from mnemonic_jax.choosing import ForgetInfo, choose_sign
  from mnemonic_jax.codes import make_codes
  from mnemonic_jax.evaluation import Scores, evaluate
  from mnemonic_jax.explaining import FisherPlan, LeafPlan, explain_fisher
  from mnemonic_jax.fisher import Execution, diagonal_fisher
  from mnemonic_jax.forgetting import ForgetResult, forget, forget_step
  from mnemonic_jax.losses import softmax_cross_entropy
  from mnemonic_jax.mixing import mix
  from mnemonic_jax.perturbation import Strength, amplitude, layer_scale, perturb
  from mnemonic_jax.training import TrainState, init_train_state, make_train_step

__version__ = "0.1.0"

_MODULE_OF = {
  "softmax_cross_entropy": "losses",
  "make_codes": "codes",
  "mix": "mixing",
  "TrainState": "training",
  "init_train_state": "training",
  "make_train_step": "training",
  "Execution": "fisher",
  "diagonal_fisher": "fisher",
  "FisherPlan": "explaining",
  "LeafPlan": "explaining",
  "explain_fisher": "explaining",
  "Strength": "perturbation",
  "amplitude": "perturbation",
  "layer_scale": "perturbation",
  "perturb": "perturbation",
  "ForgetInfo": "choosing",
  "choose_sign": "choosing",
  "ForgetResult": "forgetting",
  "forget": "forgetting",
  "forget_step": "forgetting",
  "Scores": "evaluation",
  "evaluate": "evaluation",
}

__all__ = [
  "softmax_cross_entropy",
  "make_codes",
  "mix",
  "TrainState",
  "init_train_state",
  "make_train_step",
  "Execution",
  "diagonal_fisher",
  "FisherPlan",
  "LeafPlan",
  "explain_fisher",
  "Strength",
  "amplitude",
  "layer_scale",
  "perturb",
  "ForgetInfo",
  "choose_sign",
  "ForgetResult",
  "forget",
  "forget_step",
  "Scores",
  "evaluate",
]


def __getattr__(name: str) -> Any:
  if name not in _MODULE_OF:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
