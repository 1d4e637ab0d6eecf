"""Strict numerics, eight CPU devices, and no program compiled twice, for every test."""

from __future__ import annotations

import gc
import os
import tempfile

import jax
import pytest

# Tests of the core run with these: a broadcast over ranks or a promotion of dtypes that nobody
# wrote is an error.
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

# Files of one test that takes a minute: at the end it would leave the other worker idle.
FIRST = {"test_imagenet_vit"}

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
  keep_what_is_compiled(config)
  # A warning that our own code causes is an error.
  config.addinivalue_line("filterwarnings", "error:::mnemonic_jax")
  config.addinivalue_line(
    "markers", "lenient_numerics: without the strict numerics of the core tests"
  )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items.sort(key=lambda item: item.path.stem not in FIRST)


def keep_what_is_compiled(config: pytest.Config) -> None:
  """Keep compiled programs for the rest of this run of tests, as commands keep them for users.

  Each worker has a folder of its own: JAX warns of a program that another process is writing.
  Workers inherit the name of the folder around them, in which commands share one (`running`).
  """
  if "COMPILED_BY_TESTS" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="compiled-by-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["COMPILED_BY_TESTS"] = folder.name
    config.add_cleanup(lambda: os.environ.pop("COMPILED_BY_TESTS"))
  worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
  jax.config.update(
    "jax_compilation_cache_dir", os.path.join(os.environ["COMPILED_BY_TESTS"], worker)
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
  """Forget the programs of a file at its end: those of all take 10 GB, and collecting them minutes.

  What another file compiles again comes from the disk.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(autouse=True)
def strict_numerics(request: pytest.FixtureRequest):
  if request.module.__name__ not in CORE or request.node.get_closest_marker("lenient_numerics"):
    yield
    return
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    yield
