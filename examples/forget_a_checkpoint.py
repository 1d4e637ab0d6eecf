"""Forget a class with nothing but a checkpoint of a model of one's own: no picture is ever read.

Command:  python examples/forget_a_checkpoint.py

`logits_fn` is any function (params, inputs) -> logits. The checkpoint is Orbax's; how it was
trained does not matter. Here `somebody_trained` makes one, on the digits of scikit-learn.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import mnemonic_jax as mj


def logits_fn(params: dict, x: jax.Array) -> jax.Array:
  """Two convolutions and a head."""
  for layer in ("conv1", "conv2"):
    x = jax.lax.conv_general_dilated(
      x, params[layer], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + params[f"{layer}_bias"])
  return x.mean((1, 2)) @ params["head"] + params["bias"]


def initial(key: jax.Array) -> dict:
  """Params before training."""
  shapes = {"conv1": (3, 3, 1, 32), "conv2": (3, 3, 32, 64), "head": (64, 10)}
  keys = jax.random.split(key, len(shapes))
  kernel = jax.nn.initializers.he_normal()
  params = {name: kernel(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
  sizes = {"conv1_bias": 32, "conv2_bias": 64, "bias": 10}
  return params | {name: jnp.zeros(size) for name, size in sizes.items()}


def somebody_trained(folder: pathlib.Path, images: jax.Array, labels: jax.Array) -> None:
  """Train in a loop of one's own, and save the params."""
  params, optimizer = initial(jax.random.key(0)), optax.adam(3e-3)

  @jax.jit
  def step(params: dict, state: optax.OptState, rows: jax.Array) -> tuple[dict, optax.OptState]:
    loss = lambda p: mj.softmax_cross_entropy(logits_fn(p, images[rows]), labels[rows]).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for i in range(400):
    rows = jax.random.randint(jax.random.key(i), (128,), 0, len(images))
    params, state = step(params, state, rows)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, params)


def main() -> tuple[mj.Scores, mj.Scores]:
  """Forget class 3 in the checkpoint, and print what that did on test data."""
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
  train, test, of_train, of_test = train_test_split(images, labels, random_state=0)
  with tempfile.TemporaryDirectory() as folder:
    checkpoint, result_folder = (pathlib.Path(folder) / name for name in ("trained", "forgotten"))
    somebody_trained(checkpoint, jnp.asarray(train), jnp.asarray(of_train))

    # From here on: the checkpoint, the function, and the shape of an input.
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(checkpoint, initial(jax.random.key(0)))
      codes = mj.learn_codes(
        jax.random.key(1), logits_fn, params, None, num_classes=10, shape=(8, 8, 1)
      )
      result = mj.forget(logits_fn, params, codes, classes=[3])
      checkpointer.save(result_folder, result.params)

  batches = [(test, of_test)]
  before, after = (mj.evaluate(logits_fn, p, batches, [3]) for p in (params, result.params))
  print(f"method: {result.method}")
  print(f"kept classes, accuracy: {before.retain_accuracy:.1%} -> {after.retain_accuracy:.1%}")
  print(f"class 3, error:         {before.forget_error:.1%} -> {after.forget_error:.1%}")
  return before, after


if __name__ == "__main__":
  main()
