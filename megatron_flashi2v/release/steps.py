"""The steps of ``FlashI2VPipeline``: both guidance passes of each, and what diffusers' callbacks change between them.

Shape suffixes: B samples, C latent channels, T latent frames, H and W rows and columns, L text rows, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_flashi2v.conditioning.interface import Extras
from megatron_flashi2v.sampling.guidance import combine_guided, is_guided
from megatron_flashi2v.sampling.solvers import SchedulerSolver

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""``(pipeline, step, timestep, tensors) -> tensors to replace``, diffusers' ``callback_on_step_end``."""
ROWS, NEGATIVE_ROWS = "prompt_embeds", "negative_prompt_embeds"


class CallState:
    """What callbacks and caches ask of diffusers' pipelines while they sample."""

    _interrupt = False
    _guidance_scale = 1.0
    _guidance_scale_2 = 1.0
    _num_timesteps = 0
    _current_timestep: Tensor | None = None
    _attention_kwargs: dict[str, Any] | None = None

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``pipeline._interrupt`` to leave the loop."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """The scale of the last call; a callback may set ``pipeline._guidance_scale`` for the steps that follow."""
        return self._guidance_scale

    @property
    def guidance_scale_2(self) -> float:
        """That of a pair's second expert, likewise."""
        return self._guidance_scale_2

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any step has a second pass."""
        return is_guided(self._guidance_scale) or is_guided(self._guidance_scale_2)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The scheduler's timestep of the step under way; None outside of calls."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the last call passed to the transformer."""
        return self._attention_kwargs


class Steps:
    """Serves one denoising loop.

    Guidance's scale and the text rows are read anew at every step, since diffusers' callbacks change them.

    Args:
        pipeline: a FlashI2VPipeline.
        solver: of the loop.
        text: rows by :data:`ROWS` and, for guidance, :data:`NEGATIVE_ROWS`.
        callback: the user's, or None.
        tensor_inputs: names of the tensors that it gets.
        advance: called after every step.
    """

    def __init__(
        self,
        pipeline: Any,
        solver: SchedulerSolver,
        text: Mapping[str, Tensor],
        callback: StepEnd | None,
        tensor_inputs: Sequence[str],
        advance: Callable[[], object],
    ) -> None:
        self._pipeline, self._solver, self._text = pipeline, solver, dict(text)
        self._callback, self._tensor_inputs, self._advance = callback, tensor_inputs, advance
        self._enter(0)

    def velocity(
        self,
        latents_BCTHW: Tensor,
        timestep_B: Tensor,
        text_BLD: Tensor,
        image_latents_BC1HW: Tensor,
        extras: Extras,
    ) -> Tensor:
        """The guided velocity, as the loop calls it; the rows are this object's own."""
        transformer, _, guidance_scale = self._pipeline.expert(timestep_B[0])

        def one_pass(name: str, rows: str) -> Tensor:
            with self._cache_context(transformer, name, float(timestep_B[0]) / 1000):
                velocity_BCTHW: Tensor = self._pipeline.velocity(
                    latents_BCTHW, timestep_B, self._text[rows], image_latents_BC1HW, extras
                )
            return velocity_BCTHW

        conditional = one_pass("cond", ROWS)
        if NEGATIVE_ROWS not in self._text or not is_guided(guidance_scale):
            return conditional
        unconditional = one_pass("uncond", NEGATIVE_ROWS)
        return combine_guided(conditional, unconditional, guidance_scale)

    def after(self, done: int, steps: int, state_BCTHW: Tensor) -> Tensor | None:
        """The loop's own callback."""
        self._advance()
        replaced_BCTHW: Tensor | None = None
        if self._callback is not None:
            tensors = {"latents": state_BCTHW, NEGATIVE_ROWS: None, **self._text}
            inputs = {name: tensors[name] for name in self._tensor_inputs}
            returned = self._callback(self._pipeline, done - 1, self._solver.timesteps[done - 1], inputs) or {}
            replaced_BCTHW = returned.get("latents")
            self._text.update({name: returned[name] for name in self._text if name in returned})
        if done < steps:
            self._enter(done)
        return replaced_BCTHW

    def _enter(self, step: int) -> None:
        self._step = step
        self._pipeline._current_timestep = self._solver.timesteps[step]

    def _cache_context(self, transformer: Any, name: str, sigma: float) -> Any:
        """Tell diffusers' caches of blocks which pass runs, and where in the loop; early versions know passes alone."""
        enter = transformer.cache_context
        kinds = {parameter.kind for parameter in inspect.signature(enter).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return enter(name)
        return enter(name, step_index=self._step, sigma=sigma, num_inference_steps=len(self._solver.timesteps))
