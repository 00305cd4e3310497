"""``train --evaluation-interval``: the measures of a few validation videos that the model in training makes.

They are those of one video beside its reference: how the frames keep to the image, and how much they move. Distances
between distributions take more videos than training has time for. The references are the validation clips as the VAE
decodes them, so that its own loss is on both sides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.encoders.video_vae import VideoVAE
from megatron_flashi2v.evaluation.chunks import divide
from megatron_flashi2v.evaluation.curves import write_evaluation_curves
from megatron_flashi2v.evaluation.features.latents import LatentFeatures
from megatron_flashi2v.evaluation.fidelity import WINDOW
from megatron_flashi2v.evaluation.intervals import bootstrap_mean
from megatron_flashi2v.evaluation.measuring import VideoMeasures, compared_frames, measure_image
from megatron_flashi2v.evaluation.motion import flow_ratio
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.runtime.files import atomic_write_json, read_json_object
from megatron_flashi2v.runtime.random import keyed_seed
from megatron_flashi2v.sampling.pipeline import to_frames
from megatron_flashi2v.training.metrics import finite
from megatron_flashi2v.training.watching.observer import Observer, Run
from megatron_flashi2v.training.watching.schedule import Schedule
from megatron_flashi2v.training.watching.videos import MadeVideo
from megatron_flashi2v.training.watching.writers import EVALUATION

if TYPE_CHECKING:
    from megatron_flashi2v.training.state import TrainState

FOLDER, CURVES_FILE = "evaluation", "curves.png"
KIND = "flashi2v evaluation in training"
FROZEN_BELOW = 0.25
"""Share of the reference's flow under which a video counts as frozen, as in ``flashi2v evaluate``."""
RESAMPLES = 1000

logger = logging.getLogger(__name__)


class EvaluationInTraining(Observer):
    """Measures the videos where they are due, into ``evaluation/`` and rows of the kind ``evaluation``."""

    serves = "--evaluation-interval"

    def begin_run(self, run: Run) -> None:
        """See :class:`Observer`.

        Raises:
            ConfigError: the run has no ``evaluation_interval``.
            DataError: the validation clips are too small or too short to be measured.
        """
        watch, save = run.config.watch, run.config.checkpoint.save
        if watch.evaluation_interval is None or watch.sample_vae is None or save is None or run.videos is None:
            raise ConfigError(f"EvaluationInTraining needs {self.serves}; set evaluation_interval, or leave it out")
        _require_measurable(run)
        self._run, self._videos, self._vae, self._folder = run, run.videos, watch.sample_vae, save / FOLDER
        self._schedule: Schedule | None = None

    def between_iterations(self, state: TrainState) -> None:
        """Sample, measure and write where it is due; a run that leaves before the end writes nothing."""
        if not self._is_due(state.iteration):
            return
        start, what = time.perf_counter(), f"the evaluation of iteration {state.iteration}"
        made = self._videos.make(state)
        if made is None or not self._run.begin_part(what):
            return
        measured = gather_json(self._measured(made))
        errors = [part for part in measured if isinstance(part, str)]
        if errors:  # on all ranks alike
            logger.warning("%s is left out: %s; the run goes on", what, errors[0])
            return
        videos = sorted((video for part in measured for video in part), key=lambda video: video["place"])
        figures = figures_of(videos)
        row = {"iteration": state.iteration, "consumed_samples": state.consumed_samples,
               **{name: None if value is None else value["mean"] for name, value in figures.items()},
               "seconds": time.perf_counter() - start}  # fmt: skip
        if torch.distributed.get_rank() == 0:
            try:
                self._write(state, figures, videos)
            except Exception as error:  # a full disk; the other ranks do not wait for it
                logger.warning("%s is not written: %s; the run goes on", what, _told(error))
                return
        self._run.record(EVALUATION, row)

    def _is_due(self, iteration: int) -> bool:
        if self._schedule is None:
            interval, done_at = self._run.config.watch.evaluation_interval, self._run.last_recorded(EVALUATION)
            assert interval is not None
            self._schedule = Schedule(interval, self._run.config.batch.train_iters, done_at)
        return self._schedule.is_due(iteration)

    def _measured(self, made: Mapping[int, MadeVideo]) -> list[dict[str, Any]] | str:
        """Of this rank's videos; what failed, where something did, which the other ranks must be told."""
        try:
            return self._measure(made) if made else []
        except Exception as error:  # the device's memory, a damaged VAE
            return _told(error)

    @torch.no_grad()
    def _measure(self, made: Mapping[int, MadeVideo]) -> list[dict[str, Any]]:
        device = self._run.device.torch_device
        # Loaded each time, so that in between their memory is training's.
        vae = VideoVAE.load(self._vae, device)
        pairs = {
            place: [torch.from_numpy(to_frames(vae.decode(latents))[0])
                    for latents in (video.sample.latents_CTHW.unsqueeze(0), video.latents_BCTHW)]
            for place, video in made.items()
        }
        del vae
        features, rows = LatentFeatures(self._vae, device), []
        for place, (reference_THWC, video_THWC) in pairs.items():
            chunks = divide(len(reference_THWC), len(reference_THWC) - 1, include_first=False)
            image = measure_image(reference_THWC.to(device), [video_THWC.to(device)], features, chunks)
            rows.append({
                "place": place, "caption": made[place].sample.caption,
                "similarity_frames": compared_frames(len(reference_THWC), chunks),
                "flow_ratio": flow_ratio(image.videos[0].motion, image.reference.motion),
                "video": _series(image.videos[0]), "reference": _series(image.reference),
            })  # fmt: skip
        del features
        self._run.device.empty_cache()
        return rows

    def _write(self, state: TrainState, figures: Mapping[str, Any], videos: Sequence[Mapping[str, Any]]) -> None:
        watch = self._run.config.watch
        path = self._folder / f"iter_{state.iteration:07d}.json"
        atomic_write_json(path, finite({
            "kind": KIND, "iteration": state.iteration, "consumed_samples": state.consumed_samples,
            "settings": {
                "sample_num_steps": watch.sample_num_steps, "sample_guidance_scale": watch.sample_guidance_scale,
                "sample_vae": str(self._vae), "frozen_below": FROZEN_BELOW, "resamples": RESAMPLES,
            },
            "figures": figures, "videos": videos,
        }))  # fmt: skip
        try:
            write_evaluation_curves(_earlier(self._folder, state.iteration), self._folder / CURVES_FILE)
        except Exception as error:  # an earlier file was damaged; the figures are whole without their picture
            logger.warning("the curves of the evaluation are not drawn: %s", _told(error))
        logger.info("evaluation at iteration %d | %s | %s", state.iteration, ", ".join(
            f"{name} {figures[name]['mean']:.3g}" for name in ("psnr", "ssim", "flow_ratio") if figures[name]
        ), path)


def figures_of(videos: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Mean over the videos, and its 95% bootstrap interval, of each figure.

    A figure of one video is its mean over the frames after the first, which is the condition. ``flow_ratio`` and
    ``frozen`` leave out videos whose reference does not move; None where all are left out.

    Args:
        videos: at least one, as they stand in the file.
    """
    rows: dict[str, list[float]] = {}
    for name in ("psnr", "ssim", "similarity", "differences", "flow"):
        start = 0 if name in ("differences", "flow") else 1  # those begin with the step to frame 1
        for side, prefix in (("video", ""), ("reference", "reference_")):
            rows[prefix + name] = [float(np.mean(video[side][name][start:])) for video in videos]
    rows["flow_ratio"] = [video["flow_ratio"] for video in videos if video["flow_ratio"] is not None]
    rows["frozen"] = [float(ratio < FROZEN_BELOW) for ratio in rows["flow_ratio"]]
    return {name: _interval(name, values) if values else None for name, values in rows.items()}


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    generator = np.random.default_rng(keyed_seed(0, "evaluation in training", name))
    found = bootstrap_mean(np.array(values)[:, None], RESAMPLES, generator)
    return dict(zip(("mean", "low", "high"), (float(bound[0]) for bound in found), strict=True))


def _series(measures: VideoMeasures) -> dict[str, list[float]]:
    """Over the frames."""
    return {
        "psnr": measures.psnr.tolist(), "ssim": measures.ssim.tolist(), "similarity": measures.similarity.tolist(),
        "differences": measures.motion.differences.tolist(), "flow": measures.motion.flow.tolist(),
    }


def _earlier(folder: Path, iteration: int) -> dict[int, dict[str, Any]]:
    """Figures up to an iteration; a run that was taken back may have left later ones."""
    found = (read_json_object(path, error=DataError) for path in sorted(folder.glob("iter_*.json")))
    return {values["iteration"]: values["figures"] for values in found if values["iteration"] <= iteration}


def _require_measurable(run: Run) -> None:
    assert run.videos is not None
    data = run.videos.data
    stride = data.info.height // data.info.latent_shape[2]
    for _, frames, height, width in data.latent_shapes:
        if frames < 2 or stride * min(height, width) < WINDOW:
            raise DataError(
                f"--evaluation-interval: clips of {data.name} have {frames} latent frames of {stride * width} x "
                f"{stride * height} pixels; measures take at least two of {WINDOW} x {WINDOW} pixels"
            )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
