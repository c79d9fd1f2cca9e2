"""A small NFNet: trained to give drawings of one class similar features, then frozen."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.fast_binding.images import SIZE, jitter
from examples.fast_binding.progress import Progress
from flamingo_kernels.vision import NFNet, NFNetConfig

CONFIG = NFNetConfig(
    image_size=SIZE,
    widths=(64, 128),
    depths=(1, 2),
    stem_width=32,
    group_width=16,
    feature_multiplier=0.5,
)
_JOINT_DIM = 64
_CLASSES_PER_BATCH = 192
_LEARNING_RATE, _WARM_UP = 2e-3, 50
_LABEL_SMOOTHING = 0.1
_FIRST_LOG_TEMPERATURE = 2.3
_ROWS_AT_ONCE = 512


def pixel_values(pictures: Tensor) -> Tensor:
    """Normalise grey pictures [..., H, W] in 0..1 to [..., 3, H, W]."""
    mean, std = (pictures.new_tensor(c)[:, None, None] for c in (NFNet.image_mean, NFNet.image_std))
    return (pictures[..., None, :, :] - mean) / std


class _Contrastive(nn.Module):
    """Two-term loss over mean-pooled, projected, normalised features (Flamingo, B.1.3).

    Two drawings of one class take the place of an image and its text.
    """

    def __init__(self, encoder: NFNet) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(encoder.output_dim, _JOINT_DIM, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(_FIRST_LOG_TEMPERATURE))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the loss of pictures [2, N, H, W]; the two at one place are of one class."""
        features = self.encoder(pixel_values(pictures.flatten(0, 1))).mean(1)
        first, second = F.normalize(self.project(features), dim=-1).chunk(2)
        logits = first @ second.T * self.log_temperature.exp()
        same = torch.arange(len(logits), device=logits.device)
        return sum(
            F.cross_entropy(side, same, label_smoothing=_LABEL_SMOOTHING)
            for side in (logits, logits.T)
        )


def train_encoder(kinds: list[Tensor], updates: int, seed: int, device: str) -> NFNet:
    """Train an encoder on the classes of ``kinds``, each [classes, drawings, H, W]."""
    torch.manual_seed(seed)
    model = _Contrastive(NFNet(CONFIG)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    progress = Progress("vision encoder", updates)
    for step in progress:
        generator = np.random.default_rng([seed, step])
        views = torch.cat([_two_views(kind, generator) for kind in kinds], 1)
        jittered = jitter(views.flatten(0, 1), generator).unflatten(0, (2, -1))
        loss = model(jittered.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.encoder.parameters(), 1.0)
        rate = _LEARNING_RATE * min(1, step / _WARM_UP) * (1 - 0.95 * step / updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        progress.note = f"loss {loss.item():.3f}"
    return model.encoder.cpu().eval().requires_grad_(False)


def _two_views(kind: Tensor, generator: np.random.Generator) -> Tensor:
    """Draw two pictures [2, N, H, W] of each of at most ``_CLASSES_PER_BATCH`` classes."""
    classes, drawings = kind.shape[:2]
    chosen = generator.permutation(classes)[:_CLASSES_PER_BATCH]
    first = generator.integers(drawings, size=len(chosen))
    second = (first + generator.integers(1, drawings, len(chosen))) % drawings
    return torch.stack([kind[chosen, view] for view in (first, second)])


@torch.no_grad()
def features_of(encoder: NFNet, pictures: Tensor) -> Tensor:
    """Return features [classes, drawings, S, D] of pictures [classes, drawings, H, W]."""
    rows = pictures.flatten(0, 1).split(_ROWS_AT_ONCE)
    features = torch.cat([encoder(pixel_values(part)) for part in rows])
    return features.unflatten(0, pictures.shape[:2])
