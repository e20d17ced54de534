"""Train the demo's feature network: a small classifier of the digits.

    python demo/train_classifier.py

rewrites demo/classifier.safetensors, which ships trained, so you do not need to run this. It takes seconds
on one core. The same seed on the same type of machine gives the same weights. Training uses 80 % of the
digits, the report the other 20 %.

`classifier:demo/classifier.safetensors` names it for evaluations: the Frechet distance and its relatives on
64 features, and the Inception Score on ten classes.

Shapes: N images, S side in pixels; B batch.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from digits import crops, split
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from dit_scale.errors import DitScaleError
from dit_scale.evaluate.networks.classifier import Architecture, SmallClassifier, read, to_input, write

IMAGE_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
BATCH = 64
MAX_SHIFT = 1
"""Training images move by up to this many pixels of the network's input."""
MAX_BYTES = 200_000
"""Limit on the size of the file, which is part of the repository."""

console = Console(markup=False, emoji=False)


def shifted(x_B3SS: Tensor) -> Tensor:
    """Move each image by a random number of pixels, with its border repeated."""
    side = x_B3SS.shape[-1]
    padded = functional.pad(x_B3SS, (MAX_SHIFT,) * 4, mode="replicate")
    corners = torch.randint(2 * MAX_SHIFT + 1, (len(x_B3SS), 2)).tolist()
    moved = [
        x[:, top : top + side, left : left + side] for x, (top, left) in zip(padded, corners, strict=True)
    ]
    return torch.stack(moved)


def train(model: SmallClassifier, x_N3SS: Tensor, labels_N: Tensor, epochs: int) -> None:
    """Train in place; the learning rate falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for batch in torch.randperm(len(x_N3SS)).split(BATCH):
            _, logits_BC = model(shifted(x_N3SS[batch]))
            loss = functional.cross_entropy(logits_BC, labels_N[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def trained(x_N3SS: Tensor, labels_N: Tensor, *, seed: int, epochs: int) -> SmallClassifier:
    """Train a classifier from a seed."""
    torch.manual_seed(seed)
    model = SmallClassifier(Architecture(classes=tuple(str(label) for label in labels_N.unique().tolist())))
    train(model, x_N3SS, labels_N, epochs)
    return model.eval()


@torch.no_grad()
def accuracy(model: SmallClassifier, x_N3SS: Tensor, labels_N: Tensor) -> float:
    """Share of images that are classified as their label."""
    _, logits_NC = model(x_N3SS)
    return (logits_NC.argmax(1) == labels_N).float().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo's classifier of digits.")
    parser.add_argument(
        "--file",
        type=Path,
        default=Path(__file__).parent / "classifier.safetensors",
        help="output file (default demo/classifier.safetensors)",
    )
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training digits (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the weights depend on the number of threads
    pixels_NSS3, labels_N = crops(IMAGE_SIZE)
    fit, held_out = split(labels_N)
    x_N3SS = to_input(torch.from_numpy(pixels_NSS3), Architecture(classes=()).input_size)
    y_N = torch.from_numpy(labels_N)
    try:
        write(trained(x_N3SS[fit], y_N[fit], seed=arguments.seed, epochs=arguments.epochs), arguments.file)
        model = read(arguments.file)
    except DitScaleError as error:
        console.print(f"error: {error}", style="red")
        return 2
    num_bytes = arguments.file.stat().st_size
    console.print(
        f"{arguments.file}: {num_bytes:,} bytes, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    for name, part in (("training", fit), ("held-out", held_out)):
        console.print(
            f"{name} digits: {accuracy(model, x_N3SS[part], y_N[part]):.2%} of {len(part)} recognised"
        )
    assert num_bytes < MAX_BYTES, f"{num_bytes} bytes is more than {MAX_BYTES}; choose fewer channels"
    return 0


if __name__ == "__main__":
    sys.exit(main())
