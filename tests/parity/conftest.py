"""The training command's fixtures."""

from helpers.train_command import run_command, synthetic_data, train

__all__ = ["run_command", "synthetic_data", "train"]
