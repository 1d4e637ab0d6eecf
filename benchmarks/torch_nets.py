"""The CIFAR ResNet-18 of `nets.py` in PyTorch, to time a loop over single codes with."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut."""

  def __init__(self, inputs: int, outputs: int, stride: int) -> None:
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    self.norm1 = nn.BatchNorm2d(outputs)
    self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    self.norm2 = nn.BatchNorm2d(outputs)
    self.shortcut = nn.Sequential()
    if stride > 1 or inputs != outputs:
      self.shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
      )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
    return torch.relu(y + self.shortcut(x))


def cifar_resnet18(classes: int = 10) -> nn.Module:
  """ResNet-18 with a 3x3 stem and no pooling."""
  widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
  blocks = [
    Block(i, o, 2 if o > i and index else 1) for index, (i, o) in enumerate(pairwise(widths))
  ]
  stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
  return nn.Sequential(
    *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)
  )
