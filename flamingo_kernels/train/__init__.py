"""Training: configuration, datasets, optimiser, strategies, checkpoints, the loop."""

from flamingo_kernels.train.config import TrainConfig
from flamingo_kernels.train.loop import Trainer, TrainingError

__all__ = ["TrainConfig", "Trainer", "TrainingError"]
