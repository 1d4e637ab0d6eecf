"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mnemonic_jax as mj

PACKAGE = pathlib.Path(mj.__file__).parent
OPTIONAL = {
  "grain",
  "tensorflow_datasets",
  "array_record",
  "torch",
  "torchvision",
}  # extras that may be absent
PUBLIC = [
  ".".join(("mnemonic_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
    ".__init__"
  )
  for path in sorted(PACKAGE.rglob("*.py"))
  if not any(part.startswith("__main__") for part in path.parts)
]
# A function of the core that users call has an example; a class may show it in what makes it.
WITHOUT_EXAMPLE = {
  "AuditReport",
  "FisherPlan",
  "LeafPlan",
  "TrainState",
  "Execution",
  "ForgetInfo",
  "ForgetResult",
  "LearnedCodes",
  "Scores",
}


def load(name):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    if (error.name or "").split(".")[0] in OPTIONAL:
      pytest.skip(f"needs {error.name}")
    raise


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_a_module(name):
  namespace = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "mj": mj}
  results = doctest.testmod(
    load(name), extraglobs=namespace, optionflags=doctest.NORMALIZE_WHITESPACE
  )
  assert results.failed == 0


@pytest.mark.parametrize("name", sorted(set(mj.__all__) - WITHOUT_EXAMPLE))
def test_every_public_name_has_an_example(name):
  assert ">>> " in (getattr(mj, name).__doc__ or ""), f"{name} has no example in its docstring"
