"""Strict numerics, and eight CPU devices for every test."""

from __future__ import annotations

import os

import jax
import pytest

# Tests of the core run with these: a broadcast over ranks or a promotion of dtypes that nobody wrote is an error.
CORE = {
  "test_codes",
  "test_mixup",
  "test_losses",
  "test_training",
  "test_fisher",
  "test_perturbation",
} | {
  "test_forgetting",
  "test_evaluation",
  "test_code_fishers",
  "test_explaining",
}

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
  # A warning that our own code causes is an error.
  config.addinivalue_line("filterwarnings", "error:::mnemonic_jax")
  config.addinivalue_line(
    "markers", "lenient_numerics: without the strict numerics of the core tests"
  )
  # Compiling is most of what the suite takes, and this spares a quarter of it, also in the commands that tests start. The
  # long tests compile as users do.
  quick = config.option.markexpr == "not long"
  jax.config.update("jax_disable_most_optimizations", quick)
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))


@pytest.fixture(autouse=True)
def strict_numerics(request: pytest.FixtureRequest):
  if request.module.__name__ not in CORE or request.node.get_closest_marker("lenient_numerics"):
    yield
    return
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    yield
