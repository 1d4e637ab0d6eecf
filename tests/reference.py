"""The whole method in NumPy and float64, one number at a time: slow and independent on purpose."""

from __future__ import annotations

import math

import numpy as np


def mix(images, labels, codes, replaced, choice):
  """Mix in codes, given which rows are replaced and which of the K codes each of them draws."""
  mixed = np.array(images)
  for n in range(len(images)):
    if replaced[n]:
      mixed[n] = codes[labels[n], choice[n]]
  return mixed


def cross_entropy(logits, label):
  """log(1 + sum_{j != y} exp(l_j - l_y)), which subtracts no large numbers."""
  return math.log1p(
    sum(math.exp(logits[j] - logits[label]) for j in range(len(logits)) if j != label)
  )


def residual(logits, label):
  """d cross_entropy / d logits: p_j for j != y and -sum_{j != y} p_j for y; nothing cancels."""
  total = sum(math.exp(logit - max(logits)) for logit in logits)
  result = np.array([math.exp(logit - max(logits)) / total for logit in logits])
  result[label] = -sum(result[j] for j in range(len(logits)) if j != label)
  return result


def regression_logits(params, x):
  kernel, bias = params["kernel"].astype(np.float64), params["bias"].astype(np.float64)
  return np.array(
    [sum(x[i] * kernel[i, j] for i in range(len(x))) + bias[j] for j in range(len(bias))]
  )


def regression_gradient(params, x, label):
  """Softmax regression: d loss / d kernel[i, j] = x_i r_j, d loss / d bias[j] = r_j."""
  r = residual(regression_logits(params, x), label)
  return {"kernel": np.array([[x_i * r_j for r_j in r] for x_i in x]), "bias": r}


def _hidden(params, x):
  kernel, bias = params["kernel1"].astype(np.float64), params["bias1"].astype(np.float64)
  return np.array([1 / (1 + math.exp(-(x @ kernel[:, h] + bias[h]))) for h in range(len(bias))])


def mlp_logits(params, x):
  return regression_logits(
    {"kernel": params["kernel2"], "bias": params["bias2"]}, _hidden(params, x)
  )


def mlp_gradient(params, x, label):
  """Backpropagate by hand through one hidden layer of sigmoids: kernel2, then h (1 - h)."""
  hidden = _hidden(params, x)
  r = residual(mlp_logits(params, x), label)
  kernel2 = params["kernel2"].astype(np.float64)
  back = np.array([hidden[h] * (1 - hidden[h]) * sum(kernel2[h, j] * r[j] for j in range(len(r)))
                   for h in range(len(hidden))])  # fmt: skip
  return {
    "kernel1": np.array([[x_i * b for b in back] for x_i in x]),
    "bias1": back,
    "kernel2": np.array([[h * r_j for r_j in r] for h in hidden]),
    "bias2": r,
  }


def fisher(gradient, params, inputs, labels, weights=None):
  """sum_n weights[n] * gradient_n ** 2, one example at a time; the mean without weights."""
  weights = [1 / len(inputs)] * len(inputs) if weights is None else weights
  total = {name: np.zeros(np.shape(leaf)) for name, leaf in params.items()}
  for x, label, weight in zip(np.asarray(inputs, np.float64), labels, weights, strict=True):
    for name, value in gradient(params, x, int(label)).items():
      total[name] = total[name] + weight * value**2
  return total


def _layers(array, layer_axis):
  """The indices of each layer of one leaf."""
  indices = list(np.ndindex(np.shape(array)))
  if layer_axis is None:
    return [indices]
  return [
    [i for i in indices if i[layer_axis] == layer] for layer in range(np.shape(array)[layer_axis])
  ]


def amplitude(fisher_forget, fisher_remain, layer_axis=None, overflow=math.inf):
  """f_F / f_R of one leaf. Ratios over 0, or above `overflow`, become the layer's largest other."""
  eta = np.zeros(np.shape(fisher_forget))
  for layer in _layers(eta, layer_axis):
    boundless = []
    for i in layer:
      forget, remain = float(fisher_forget[i]), float(fisher_remain[i])
      if forget == 0:
        eta[i] = 0
      elif remain == 0 or forget / remain > overflow:
        boundless.append(i)
      else:
        eta[i] = forget / remain
    largest = max([eta[i] for i in layer if i not in boundless], default=0.0)
    for i in boundless:
      eta[i] = largest
  return eta


def layer_scale(eta, lambda1, lambda2, layer_axis=None):
  """min(lambda1, lambda2 / max eta) of each layer of one leaf, in the leaf's shape."""
  scale = np.zeros(np.shape(eta))
  for layer in _layers(eta, layer_axis):
    largest = max((eta[i] for i in layer), default=0.0)
    for i in layer:
      scale[i] = lambda1 if largest == 0 else min(lambda1, lambda2 / largest)
  return scale


def perturb(leaf, eta, scale, sign):
  moved = np.array(leaf, np.float64)
  for i in np.ndindex(np.shape(leaf)):
    moved[i] += sign * scale[i] * eta[i]
  return moved


def code_scores(logits, params, codes, forget, remain):
  """A_R and E_F on the codes as (right, of) pairs, and the loss gap."""
  right, wrong, remain_losses, forget_losses = 0, 0, [], []
  for c in range(len(codes)):
    for code in np.asarray(codes[c], np.float64):
      output = logits(params, code)
      if c in remain:
        right += int(np.argmax(output)) == c
        remain_losses.append(cross_entropy(output, c))
      if c in forget:
        wrong += int(np.argmax(output)) != c
        forget_losses.append(cross_entropy(output, c))
  return (
    (right, len(remain_losses)),
    (wrong, len(forget_losses)),
    sum(forget_losses) / len(forget_losses) - sum(remain_losses) / len(remain_losses),
  )


def class_fishers(gradient, params, codes, forget, remain):
  """(f_F, f_R): means over all codes of the classes of each side."""
  side = []
  for classes in (forget, remain):
    inputs = [code for c in classes for code in codes[c]]
    labels = [c for c in classes for _ in codes[c]]
    side.append(fisher(gradient, params, inputs, labels))
  return side


def forget(
  logits,
  gradient,
  params,
  codes,
  forget,
  remain,
  lambda1,
  lambda2,
  layer_axis=None,
  overflow=math.inf,
):
  """The whole method. Returns (params, sign, eta); layer_axis: {leaf name: axis}."""
  axes = layer_axis or {}
  fisher_forget, fisher_remain = class_fishers(gradient, params, codes, forget, remain)
  eta = {k: amplitude(fisher_forget[k], fisher_remain[k], axes.get(k), overflow) for k in params}
  scale = {k: layer_scale(eta[k], lambda1, lambda2, axes.get(k)) for k in params}
  candidates = {s: {k: perturb(params[k], eta[k], scale[k], s) for k in params} for s in (1, -1)}
  scores = {s: code_scores(logits, candidates[s], codes, forget, remain) for s in (1, -1)}

  def total(sign):  # A_R + E_F times the common denominator: integers, so that ties are exact
    (right, of_remain), (wrong, of_forget), _ = scores[sign]
    return right * of_forget + wrong * of_remain

  minus_is_better = scores[-1][2] > scores[1][2] if total(1) == total(-1) else total(-1) > total(1)
  sign = -1 if minus_is_better else 1
  return candidates[sign], sign, eta


def evaluate(predictions, labels, num_classes, classes):
  """(A_R, E_F, per_class), counting one example at a time."""
  right, total = [0] * num_classes, [0] * num_classes
  for prediction, label in zip(predictions, labels, strict=True):
    total[label] += 1
    right[label] += prediction == label
  kept = [c for c in range(num_classes) if c not in classes]
  ratio = lambda part, whole: part / whole if whole else math.nan
  return (
    ratio(sum(right[c] for c in kept), sum(total[c] for c in kept)),
    ratio(sum(total[c] - right[c] for c in classes), sum(total[c] for c in classes)),
    [ratio(right[c], total[c]) for c in range(num_classes)],
  )


def cut(vectors, forget, remain, shown=None, shares=None):
  """D (F, C) and W (C, F) of the vectors (C, K, F) of codes, by the definition: W = pinv(R D) R.

  How classes spread is shown by the codes, or by judges' vectors `shown` (C, J, F) of weights
  `shares` (C, J), for a class that has some.
  """
  vectors = np.asarray(vectors, np.float64)
  num_classes, per_class, width = vectors.shape
  means = vectors.mean(1)
  mu = np.mean([means[c] for c in range(num_classes) if remain[c]], axis=0)
  gone, both = np.zeros((width, num_classes)), []
  for c in range(num_classes):
    if forget[c]:
      gone[:, c] = means[c] - mu
      both.append(gone[:, c])
    elif remain[c] and shown is not None and sum(shares[c]) > 0:
      both += [math.sqrt(w) * vector for w, vector in zip(shares[c], shown[c], strict=True)]
    elif remain[c]:
      both += [vector / math.sqrt(per_class) for vector in vectors[c]]
  both = np.array(both).T
  tie = 0.01 * np.linalg.norm(both, 2) ** 2
  ridge = gone.T @ np.linalg.inv(both @ both.T + tie * np.eye(width))
  return gone, np.linalg.pinv(ridge @ gone, rcond=1e-5, hermitian=True) @ ridge


def residual_net(params, x):
  """The arrays of a small residual network at inputs x (..., positions, F), and its logits.

  Three sites that nothing bypasses (z1, z2, z3) and two that are (u, v); BatchNorm's statistics m
  and scale s belong to z2.
  """
  p, arrays = params, {}
  arrays["z1"] = x @ p["k1"] + p["b1"]
  h1 = np.tanh(arrays["z1"])
  arrays["u"] = h1 @ p["k2"]
  arrays["z2"] = p["s"] * (np.tanh(arrays["u"]) @ p["k3"] - p["m"]) + p["beta"] + h1
  h2 = np.tanh(arrays["z2"])
  arrays["v"] = h2 @ p["k4"] + p["b4"]
  arrays["z3"] = np.tanh(arrays["v"]) @ p["k5"] + p["b5"] + h2 @ p["k6"]
  return arrays, np.tanh(arrays["z3"]).mean(-2) @ p["k7"] + p["b7"]


def projected_residual_net(params, codes, forget, remain, sites, judges=None, shares=None):
  """Cut the sites one after the other, each time with the arrays of the net as edited so far."""
  p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
  for site in ("z1", "u", "z2", "v", "z3"):
    if site not in sites:
      continue
    z = residual_net(p, codes)[0][site]  # (C, K, positions, F)
    shown = None if judges is None else residual_net(p, judges)[0][site].mean(2)
    directions, weights = cut(z.mean(2), forget, remain, shown, shares)
    keep = np.eye(z.shape[-1]) - directions @ weights  # P, on columns
    if site == "z1":
      p["k1"], p["b1"] = p["k1"] @ keep.T, keep @ p["b1"]
    elif site == "u":
      p["k2"] = p["k2"] @ keep.T
    elif site == "z2":
      shift = p["beta"] - p["s"] * p["m"]
      p["k3"] = (p["k3"] * p["s"]) @ keep.T / p["s"]
      p["beta"] = p["s"] * p["m"] + keep @ shift
    elif site == "v":
      p["k4"], p["b4"] = p["k4"] @ keep.T, keep @ p["b4"]
    else:
      p["k5"], p["b5"], p["k6"] = p["k5"] @ keep.T, keep @ p["b5"], p["k6"] @ keep.T
  return p


def row_dropped(kernel, bias, remain):
  """The head (F, C) and its bias with the rows of all classes that are not kept dropped."""
  kernel, bias = np.array(kernel, np.float64), np.array(bias, np.float64)
  kept = [c for c in range(len(bias)) if remain[c]]
  row, offset = np.mean([kernel[:, c] for c in kept], axis=0), np.mean([bias[c] for c in kept]) - 1
  for c in range(len(bias)):
    if not remain[c]:
      kernel[:, c], bias[c] = row, offset
  return kernel, bias


def class_means(vectors, labels, num_classes):
  """(N, F) -> (C, F), one example at a time."""
  total, count = np.zeros((num_classes, len(vectors[0]))), [0] * num_classes
  for vector, label in zip(np.asarray(vectors, np.float64), labels, strict=True):
    total[label] += vector
    count[label] += 1
  return np.array([total[c] / count[c] for c in range(num_classes)])


def deviations(vectors):
  """Each channel's standard deviation, and 0.05 of that of all values."""
  vectors = np.asarray(vectors, np.float64)
  spread = lambda values: math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values)
                                    / len(values))  # fmt: skip
  overall = spread(list(vectors.ravel()))
  return np.array([spread(list(channel)) + 0.05 * overall for channel in vectors.T])


def position_hash(seed, position):
  """Twice the finaliser of MurmurHash3, with a word of seed before each."""

  def finalise(word):
    word = ((word ^ word >> 16) * 0x85EBCA6B) % 2**32
    word = ((word ^ word >> 13) * 0xC2B2AE35) % 2**32
    return word ^ word >> 16

  return finalise(finalise((position + int(seed[0])) % 2**32) ^ int(seed[1]))


def reservoir(seed, labels, num_classes, size):
  """Which positions of the data each class keeps, those of the smallest hash first."""
  order = sorted(range(len(labels)), key=lambda position: position_hash(seed, position))
  return [[p for p in order if labels[p] == c][:size] for c in range(num_classes)]


def match_loss(read, wanted, deviation):
  """Of one input and one array: the mean of ((read - wanted) / deviation)^2."""
  terms = [((r - w) / d) ** 2 for r, w, d in zip(read, wanted, deviation, strict=True)]
  return sum(terms) / len(terms)


def smoothed_cross_entropy(logits, label, smoothing=0.1):
  """The cross-entropy to (1 - smoothing) of the label and smoothing / C of every class."""
  share = smoothing / len(logits)
  losses = [cross_entropy(logits, j) for j in range(len(logits))]
  return (1 - smoothing) * losses[label] + share * sum(losses)


def statistics_distance(layers):
  """The mean over layers (values (..., F), mean, variance) and channels of both distances."""
  found = []
  for values, mean, variance in layers:
    values = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
    channels = []
    for f in range(values.shape[1]):
      m = sum(values[:, f]) / len(values)
      v = sum((x - m) ** 2 for x in values[:, f]) / len(values)
      ratio = math.sqrt(v + 1e-6) / math.sqrt(variance[f] + 1e-6)
      channels.append((m - mean[f]) ** 2 / (variance[f] + 1e-4) + (ratio - 1) ** 2)
    found.append(sum(channels) / len(channels))
  return sum(found) / len(found)


def margin(logits, label):
  return logits[label] - max(logits[j] for j in range(len(logits)) if j != label)


def _normal(x):
  return (1 + math.erf(x / math.sqrt(2))) / 2


def _inverse_normal(p):
  low, high = -10.0, 10.0
  for _ in range(100):
    x = (low + high) / 2
    low, high = (x, high) if _normal(x) < p else (low, x)
  return x


def _clipped(accuracy):
  return min(max(accuracy, 0.005), 0.995)


def predict(before, after, weights, accuracy, spread, forget, kept):
  """(A_R, E_F) from the judges' margins; None without a judge."""
  mean = np.sum(weights * spread) / np.sum(weights)
  right = []
  for judges in zip(before, after, weights, accuracy, spread, strict=True):
    if not sum(judges[2]):
      right.append(None)
      continue
    total = 0
    for old, new, weight, share, s in zip(*judges, strict=True):
      s = max(s, 0.05 * mean)
      sure = _inverse_normal(_clipped(share))
      if share >= 0.995:
        sure = max(sure, old / s)
      if share <= 0.005:
        sure = min(sure, old / s)
      total += weight * _normal(sure + (new - old) / s)
    right.append(total)
  of_kept = [right[c] for c in kept if right[c] is not None]
  a_r = sum(of_kept) / len(of_kept) if of_kept else None
  if any(right[c] is None for c in forget):
    return a_r, None
  return a_r, sum(1 - right[c] for c in forget) / len(forget)


def dampened(params, codes, classes, quantile):
  """Dampening of the MLP: each weight by the smallest min(t_c / eta_c, 1)."""
  num_classes, per_class = codes.shape[:2]

  def fisher(chosen):
    total = {name: np.zeros(leaf.shape) for name, leaf in params.items()}
    for c in chosen:
      for k in range(per_class):
        gradient = mlp_gradient(params, np.asarray(codes[c, k], np.float64), c)
        for name in total:
          total[name] += gradient[name] ** 2 / (len(chosen) * per_class)
    return total

  kept = fisher([c for c in range(num_classes) if c not in classes])
  result = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
  factors = {name: np.ones(leaf.shape) for name, leaf in params.items()}
  for c in classes:
    one = fisher([c])
    eta = {name: one[name] / kept[name] for name in sorted(one)}
    limit = np.quantile(np.concatenate([x.ravel() for x in eta.values()]), quantile)
    for name in factors:
      factors[name] = np.minimum(factors[name], np.minimum(limit / eta[name], 1))
  return {name: result[name] * factors[name] for name in result}


def divergence(teacher, student, kept):
  """The mean over examples of KL(softmax of the teacher || of the student) over kept logits."""
  total = 0.0
  for wanted, found in zip(teacher, student, strict=True):
    p, q = (np.exp(row[kept] - row[kept].max()) for row in (wanted, found))
    p, q = p / p.sum(), q / q.sum()
    total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
  return total / len(teacher)


def divergence_residual(teacher, student, kept):
  """d KL / d the student's logits, one example: q - p over the kept classes, 0 elsewhere."""
  found = np.zeros(len(teacher))
  p, q = (np.exp(row[kept] - row[kept].max()) for row in (teacher, student))
  found[kept] = q / q.sum() - p / p.sum()
  return found


def healed(params, old, batches, kept, trained, rate, momentum, largest):
  """Distil the MLP `old` into `params` by SGD on given batches, one example at a time.

  `trained` names the leaves that move; their gradient's norm is at most `largest`.
  """
  params = {name: np.array(leaf, np.float64) for name, leaf in params.items()}
  speed = {name: np.zeros_like(params[name]) for name in trained}
  for inputs in batches:
    gradient = {name: np.zeros_like(params[name]) for name in trained}
    for x in inputs.astype(np.float64):
      r = divergence_residual(mlp_logits(old, x), mlp_logits(params, x), kept)
      hidden = _hidden(params, x)
      back = hidden * (1 - hidden) * (params["kernel2"] @ r)
      of_one = {"kernel1": np.outer(x, back), "bias1": back, "kernel2": np.outer(hidden, r),
                "bias2": r}  # fmt: skip
      for name in trained:
        gradient[name] += of_one[name] / len(inputs)
    norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    for name in trained:
      step = gradient[name] * min(1, largest / norm)
      speed[name] = momentum * speed[name] + step
      params[name] = params[name] - rate * speed[name]
  return params


def wilson(right, total, z):
  """The two shares p for which `right` of `total` is exactly z standard errors away, by bisection.

  (right / total - p)^2 = z^2 p (1 - p) / total
  """
  share, ends = right / total, []
  for outer in (0.0, 1.0):
    near, far = share, outer
    for _ in range(200):
      middle = (near + far) / 2
      if (share - middle) ** 2 <= z**2 * middle * (1 - middle) / total:
        near = middle
      else:
        far = middle
    ends.append((near + far) / 2)
  return tuple(ends)


def auc(positives, negatives):
  """The area under the ROC and DeLong's variance of it, pair by pair."""
  wins = [[(a > b) + 0.5 * (a == b) for b in negatives] for a in positives]
  of_positive = [sum(row) / len(negatives) for row in wins]
  of_negative = [sum(column) / len(positives) for column in zip(*wins, strict=True)]

  def variance_of_mean(values):
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)

  area = sum(of_positive) / len(of_positive)
  return area, variance_of_mean(of_positive) + variance_of_mean(of_negative)


def softmax_regression(features, labels, num_classes, ridge, steps=30):
  """Minimise sum of -log softmax(W z + b)_y + ridge / 2 |W|^2 by Newton's method.

  The intercepts have no penalty; adding a constant to all of them changes nothing, so the step is
  the shortest one.
  """
  count, width = features.shape
  z = np.column_stack([features, np.ones(count)])
  penalty = np.append(np.full(width, ridge), 0.0)
  weights = np.zeros((num_classes, width + 1))
  for _ in range(steps):
    logits = z @ weights.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = (p - np.eye(num_classes)[labels]).T @ z + penalty * weights
    size = num_classes * (width + 1)
    hessian = np.zeros((num_classes, width + 1, num_classes, width + 1))
    for a in range(num_classes):
      for b in range(num_classes):
        hessian[a, :, b, :] = (z * (p[:, a] * ((a == b) - p[:, b]))[:, None]).T @ z
      hessian[a, :, a, :] += np.diag(penalty)
    step = np.linalg.lstsq(hessian.reshape(size, size), gradient.reshape(-1), rcond=1e-12)[0]
    weights = weights - step.reshape(weights.shape)
  return weights


def nearest_mean(train, train_labels, test, num_classes):
  """The class of the nearest mean for each test example, one distance at a time."""
  deviations = [np.std(column) for column in np.asarray(train).T]
  means = [
    np.mean([x for x, y in zip(train, train_labels, strict=True) if y == c], axis=0)
    for c in range(num_classes)
  ]

  def distance(x, mean):
    return sum(((a - b) / sd) ** 2 for a, b, sd in zip(x, mean, deviations, strict=True) if sd > 0)

  return [min(range(num_classes), key=lambda c: distance(x, means[c])) for x in test]


def prototype_row(rows, label, shots):
  """The head's row of one class after the attack; all others are kept ones."""
  kept = [math.sqrt(sum(w**2 for w in row)) for c, row in enumerate(rows) if c != label]
  mean = [sum(column) / len(shots) for column in zip(*shots, strict=True)]
  length = math.sqrt(sum(m**2 for m in mean))
  scale = sum(kept) / len(kept) / length
  return [0.5 * w + 0.5 * scale * m for w, m in zip(rows[label], mean, strict=True)]


def likelihood_ratio(confidences, members, target, shared):
  """log N(phi; in) - log N(phi; out) for each example; `shared`: one deviation for all."""
  count = len(target)
  sides = [
    [
      [row[i] for row, own in zip(confidences, members, strict=True) if own[i] == side]
      for i in range(count)
    ]
    for side in (True, False)
  ]

  def log_normal(x, mean, variance):
    return -((x - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)

  def of_side(values):
    means = [sum(v) / len(v) for v in values]
    squares = [sum((x - m) ** 2 for x in v) for v, m in zip(values, means, strict=True)]
    freedom = [len(v) - 1 for v in values]
    together = sum(squares) / sum(freedom)
    variances = [together if shared else s / f for s, f in zip(squares, freedom, strict=True)]
    return [log_normal(*args) for args in zip(target, means, variances, strict=True)]

  return [a - b for a, b in zip(*map(of_side, sides), strict=True)]
