"""The training command's fixtures, for its dry run."""

from helpers.train_command import run_command, synthetic_data, train

__all__ = ["run_command", "synthetic_data", "train"]
