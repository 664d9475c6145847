"""The same networks and training steps in PyTorch, as it is usually written."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks.data import Examples


class Transformer(nn.Module):  # type: ignore[misc]  # untyped
    """The encoder of `models.Transformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        self.positions = nn.Parameter(0.02 * torch.randn(64, 256))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(6)
            )
        )
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits, of shape (n, 10), for token numbers of shape (n, 64)."""
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.positions)).mean(dim=1))


def convnet() -> nn.Module:
    """`models.ConvNet` without dropout, for images of shape (n, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    """`models.MLP`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


# Under the names that the classes have in `models`.
MODELS: dict[str, Callable[[], nn.Module]] = {"ConvNet": convnet, "MLP": mlp, "Transformer": Transformer}


def steps(
    name: str,
    batch: Examples,
    device: str,
    *,
    sigma: float,
    rho: float,
    learning_rate: float,
    momentum: float,
) -> tuple[int, dict[str, Callable[[], float]]]:
    """How many weights a network has, and whole training steps of it by three methods.

    Args:
        name: Of the network, in MODELS.
        batch: The examples of every step.
        device: Where to train.
        sigma: The noise of NSO.
        rho: The distance of SAM.
        learning_rate: Of SGD.
        momentum: Of SGD.

    Returns:
        The number, and the steps, each of which returns its loss.
    """
    model = MODELS[name]().to(device, memory_format=torch.channels_last)
    x, y = _to_torch(batch, device)
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=learning_rate, momentum=momentum, fused=True)

    def backward() -> torch.Tensor:
        """Adds the gradient at the present weights to what `grad` has."""
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    def take_gradients() -> list[torch.Tensor]:
        grads = [p.grad for p in params if p.grad is not None]
        optimizer.zero_grad()
        return grads

    def update(loss: torch.Tensor) -> float:
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    def plain() -> float:
        return update(backward())

    def nso() -> float:
        """As the authors' trainer: a pass at W, whose gradient is not used, then W + U and W - U."""
        loss = backward()
        optimizer.zero_grad()
        with torch.no_grad():
            noise = [torch.randn_like(p) for p in params]
            torch._foreach_add_(params, noise, alpha=sigma)
        backward()
        with torch.no_grad():
            torch._foreach_add_(params, noise, alpha=-2 * sigma)
        backward()
        with torch.no_grad():
            torch._foreach_add_(params, noise, alpha=sigma)
            torch._foreach_mul_([p.grad for p in params], 0.5)
        return update(loss)

    def sam() -> float:
        loss = backward()
        with torch.no_grad():
            ascent = take_gradients()
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ascent)))
            torch._foreach_mul_(ascent, rho / norm)
            torch._foreach_add_(params, ascent)
        backward()
        with torch.no_grad():
            torch._foreach_sub_(params, ascent)
        return update(loss)

    return sum(p.numel() for p in params), {"torch-plain": plain, "torch-sam": sam, "torch-nso": nso}


def _to_torch(batch: Examples, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.tensor(np.asarray(batch.inputs), device=device)
    if inputs.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2)  # channels first in shape, still last in memory, which is faster
    return inputs, torch.tensor(np.asarray(batch.labels, np.int64), device=device)
