"""The rivals' formulas in NumPy and float64, for the MLP of `toys`: slow and independent."""

from __future__ import annotations

import math

import numpy as np
import reference


def wide(params):
  return {name: np.array(leaf, np.float64) for name, leaf in params.items()}


def backward(params, x, residual):
  """The gradient of a loss of the logits, `residual` its gradient there."""
  hidden = 1 / (1 + np.exp(-(x @ params["kernel1"] + params["bias1"])))
  back = hidden * (1 - hidden) * (params["kernel2"] @ residual)
  return {"kernel1": np.outer(x, back), "bias1": back, "kernel2": np.outer(hidden, residual),
          "bias2": residual}  # fmt: skip


def sgd(params, batches, rate, moves=None, penalty=None, relearn=False):
  """SGD with momentum 0.9. A batch is (inputs, residuals), one function of the logits an example.

  `rate` is a number, or one for each step. `moves` names which entries are trained; `penalty` is a
  function of params: more gradient. `relearn`: the gradient is clipped at 5, weights decay by 5e-4,
  and the momentum is Nesterov's.
  """
  params = wide(params)
  moves = dict.fromkeys(params, 1) if moves is None else moves
  speed = {name: np.zeros_like(leaf) for name, leaf in params.items()}
  rates = np.broadcast_to(rate, len(batches))
  for (inputs, residuals), now in zip(batches, rates, strict=True):
    gradient = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for x, residual in zip(np.asarray(inputs, np.float64), residuals, strict=True):
      one = backward(params, x, residual(reference.mlp_logits(params, x)))
      for name in gradient:
        gradient[name] += one[name] / len(inputs)
    for name, more in (penalty(params) if penalty else {}).items():
      gradient[name] += more
    norm = math.sqrt(sum(np.sum((moves[name] * g) ** 2) for name, g in gradient.items()))
    for name in params:
      g = moves[name] * gradient[name]
      if relearn:
        g = g * min(1, 5 / norm) + 5e-4 * params[name]
      speed[name] = 0.9 * speed[name] + g
      step = g + 0.9 * speed[name] if relearn else speed[name]
      params[name] = params[name] - now * moves[name] * step
  return params


def entropy(label, sign=1.0):
  """The gradient of the cross-entropy of a label."""
  return lambda logits: sign * reference.residual(logits, label)


def divergence(teacher, factor):
  """The gradient of factor KL(teacher || student)."""
  everything = np.ones(len(teacher), bool)
  return lambda logits: factor * reference.divergence_residual(teacher, logits, everything)


def softmax(logits):
  odds = np.exp(logits - np.max(logits))
  return odds / odds.sum()


def dampened(params, of_all, of_forgotten, alpha):
  """SSD with lambda 1, one weight at a time."""
  result = wide(params)
  for name, leaf in result.items():
    for at in np.ndindex(leaf.shape):
      if of_forgotten[name][at] > alpha * of_all[name][at]:
        leaf[at] *= min(of_all[name][at] / of_forgotten[name][at], 1)
  return result


def fisher_of_all_labels(params, inputs):
  """mean over x of sum_y p(y | x) (d log p(y | x))^2."""
  total = {name: np.zeros(np.shape(leaf)) for name, leaf in params.items()}
  for x in np.asarray(inputs, np.float64):
    odds = softmax(reference.mlp_logits(params, x))
    for y, p in enumerate(odds):
      for name, g in reference.mlp_gradient(params, x, y).items():
        total[name] += p * g**2 / len(inputs)
  return total


def importance(vectors, scale):
  """Kodge's P of vectors (n, F), by the SVD of the vectors themselves."""
  u, sigma, _ = np.linalg.svd(np.asarray(vectors, np.float64).T)
  share = np.zeros(len(u))
  share[: len(sigma)] = sigma**2 / np.sum(sigma**2)
  return u @ np.diag(scale * share / ((scale - 1) * share + 1)) @ u.T


def prototype_residual(prototype, kept):
  """What is left of a prototype (F,) beside the span of the kept ones (K, F), by Gram-Schmidt."""
  if len(kept) >= len(prototype):
    return prototype - np.mean(kept, axis=0)
  rest, basis = np.array(prototype, np.float64), []
  for row in np.asarray(kept, np.float64):
    for one in basis:
      row = row - (one @ row) * one
    basis.append(row / math.sqrt(row @ row))
  for one in basis:
    rest = rest - (one @ rest) * one
  return rest


def patches(pictures, size, stride, low, high):
  """All patches of pictures (N, H, W, C), each (C, size, size) flattened, by loops."""
  padded = np.pad(pictures, [(0, 0), (low, high), (low, high), (0, 0)])
  found = []
  for picture in padded:
    for i in range(0, padded.shape[1] - size + 1, stride):
      for j in range(0, padded.shape[2] - size + 1, stride):
        found.append(picture[i : i + size, j : j + size].transpose(2, 0, 1).ravel())
  return np.array(found)


def adam(x, gradient, steps, rate):
  """Adam as published, with its usual settings."""
  x, m, v = np.array(x, np.float64), 0.0, 0.0
  for t in range(1, steps + 1):
    g = gradient(x)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
  return x
