"""Large-scale training of FlashI2V image-to-video diffusion transformers on megatron-core.

    from megatron_flashi2v import TrainConfig, train

    train(TrainConfig.from_recipe("examples/recipes/tiny.yaml", save="runs/mine"))

Every name below is imported when it is first asked for, so that this module itself needs neither torch nor
megatron-core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_flashi2v.version import __version__

if TYPE_CHECKING:
    from megatron_flashi2v.config.convert import ConvertConfig
    from megatron_flashi2v.config.errors import UserError
    from megatron_flashi2v.config.prepare import PrepareConfig
    from megatron_flashi2v.config.sample import SampleConfig
    from megatron_flashi2v.config.train import TrainConfig
    from megatron_flashi2v.data.run import prepare
    from megatron_flashi2v.evaluation.in_training import EvaluationInTraining
    from megatron_flashi2v.release.convert import convert
    from megatron_flashi2v.release.pipeline import FlashI2VImageConditioning, FlashI2VPipeline
    from megatron_flashi2v.sampling.many import sample_requests
    from megatron_flashi2v.sampling.pipeline import ImageToVideoPipeline
    from megatron_flashi2v.sampling.run import sample
    from megatron_flashi2v.training.run import TrainResult, train
    from megatron_flashi2v.training.watching.observer import Observer

__all__ = [
    "ConvertConfig",
    "EvaluationInTraining",
    "FlashI2VImageConditioning",
    "FlashI2VPipeline",
    "ImageToVideoPipeline",
    "Observer",
    "PrepareConfig",
    "SampleConfig",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "__version__",
    "convert",
    "prepare",
    "sample",
    "sample_requests",
    "train",
]

_MODULES = {
    "ConvertConfig": "config.convert",
    "EvaluationInTraining": "evaluation.in_training",
    "FlashI2VImageConditioning": "release.pipeline",
    "FlashI2VPipeline": "release.pipeline",
    "ImageToVideoPipeline": "sampling.pipeline",
    "Observer": "training.watching.observer",
    "PrepareConfig": "config.prepare",
    "SampleConfig": "config.sample",
    "TrainConfig": "config.train",
    "TrainResult": "training.run",
    "UserError": "config.errors",
    "convert": "release.convert",
    "prepare": "data.run",
    "sample": "sampling.run",
    "sample_requests": "sampling.many",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """A public name, imported from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
