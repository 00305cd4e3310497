"""Choose an operator's implementation for this machine, and say why the preferred ones cannot run here.

Every operator is a sub-package whose ``SPECS`` lists its implementations in order of preference, the plain
reference last. A spec is data: the implementation's requirements and the place of its function, whose module is
imported only when chosen. Resolve once, when a model is built.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

OPERATORS = (
    "attention", "fourier_highpass", "ada_layer_norm", "residual_norm", "gate_residual", "bias_gelu_tanh", "rms_norm",
    "qk_norm_rope",
)

ANY_DEVICE = ("cuda", "npu", "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
COMPILED_ON = ("cuda", "cpu")
"""Device types for which ``torch.compile`` writes code: in Triton, and in C++."""
ASCEND_A2_A3 = ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4", "Ascend910_93")
"""Names of the training NPUs whose fused operators are documented; "Ascend910B" alone is an older card."""


class KernelUnavailable(ValueError):
    """The named implementation is unknown or cannot run here; the message lists those that can."""


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One implementation of an operator, and its requirements.

    Attributes:
        operator: name of the operator, one of :data:`OPERATORS`.
        name: name of the implementation, as a user writes it.
        entry_point: ``module:function``, imported when chosen.
        backward_entry_point: the same for a backward of its own, beside autograd's; None where there is none.
        devices: device types it runs on.
        dtypes: dtypes of its tensors.
        min_compute_capability: lowest CUDA compute capability, e.g. (8, 0); None for any.
        max_compute_capability: highest one, for kernels that are written for one generation; None for any.
        socs: prefixes of the NPU names it runs on, e.g. ("Ascend910",); empty for any.
        package: distribution that must be installed, or None.
        min_version: lowest version of ``package``, e.g. "2.6", or "4.0.0b5" where betas will do.
        max_head_dim: largest size of an attention head; None for no limit.
        head_dim_multiple: the head size must be a multiple of this.
        features: optional abilities of the operator, with the device types that have them.
        differentiable: whether gradients flow through it.
        deterministic: whether its gradients have the same bits each time, or it obeys torch's switch for that.
        takes_compute_capability: whether the choice gives the function the device's ``compute_capability``, a keyword.
        timed: whether its speed on a card is known, measured or published; ``auto`` never takes what was not timed.
    """

    operator: str
    name: str
    entry_point: str
    backward_entry_point: str | None = None
    devices: tuple[str, ...] = ANY_DEVICE
    dtypes: tuple[torch.dtype, ...] = FLOATS
    min_compute_capability: tuple[int, int] | None = None
    max_compute_capability: tuple[int, int] | None = None
    socs: tuple[str, ...] = ()
    package: str | None = None
    min_version: str | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    differentiable: bool = True
    deterministic: bool = True
    takes_compute_capability: bool = False
    timed: bool = True


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A resolved implementation.

    Attributes:
        spec: of the chosen implementation.
        function: the implementation; its signature is that of the operator's reference.
        backward: the implementation's own backward, with the signature of the reference's; None where there is none.
        why_not: one line for each implementation that is preferred but cannot run here ("name: reason").
    """

    spec: KernelSpec
    function: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    why_not: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Need:
    """A caller's requirements, completed by the machine's properties."""

    device_type: str
    dtype: torch.dtype
    head_dim: int | None
    features: frozenset[str]
    gradient: bool
    compute_capability: tuple[int, int] | None
    soc: str | None


def specs_of(operator: str) -> tuple[KernelSpec, ...]:
    """The operator's implementations in order of preference.

    Raises:
        KernelUnavailable: there is no such operator.
    """
    if operator not in OPERATORS:
        raise KernelUnavailable(f"unknown operator {operator!r}; there are {', '.join(OPERATORS)}")
    return importlib.import_module(f"{__package__}.{operator}").SPECS


def resolve(
    operator: str,
    device_type: str,
    dtype: torch.dtype,
    choice: str = "auto",
    *,
    head_dim: int | None = None,
    features: Collection[str] = (),
    needs_gradient: bool = False,
    compute_capability: tuple[int, int] | None = None,
    soc: str | None = None,
) -> Kernel:
    """Choose an implementation.

    Args:
        operator: one of :data:`OPERATORS`.
        device_type: "cuda", "npu" or "cpu".
        dtype: dtype of the tensors.
        choice: an implementation's name, or "auto" for the first in order of preference that can run and was timed.
        head_dim: size of an attention head, where the operator has heads.
        features: optional abilities that the caller uses, e.g. ("log_sum_exp",).
        needs_gradient: whether gradients must flow through the operator.
        compute_capability: of the CUDA device; read from the device when None.
        soc: name of the NPU; read from the device when None.

    Returns:
        the chosen kernel, with the reasons why preferred ones were passed over ("auto" only).

    Raises:
        KernelUnavailable: the choice is unknown or cannot run here, or nothing can.
    """
    specs = specs_of(operator)
    need = _Need(
        device_type=device_type,
        dtype=dtype,
        head_dim=head_dim,
        features=frozenset(features),
        gradient=needs_gradient,
        compute_capability=compute_capability or compute_capability_of(device_type),
        soc=soc or _soc(device_type),
    )
    obstacles = {spec.name: _obstacle(spec, need) for spec in specs}
    able = [name for name, obstacle in obstacles.items() if obstacle is None]
    automatic = [spec.name for spec in specs if spec.timed and spec.name in able]
    can_run = f"available on {device_type} with {_short(dtype)}: {', '.join(able) or 'none'}"
    if choice == "auto":
        if not automatic:
            reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle)
            raise KernelUnavailable(f"no implementation of {operator} can run here ({reasons})")
        choice = automatic[0]
    elif choice not in obstacles:
        raise KernelUnavailable(f"{operator} has no implementation {choice!r}; {can_run}")
    elif obstacles[choice] is not None:
        raise KernelUnavailable(f"{operator} {choice!r} cannot run here: {obstacles[choice]}; {can_run}")
    position = [spec.name for spec in specs].index(choice)
    preferred = [spec.name for spec in specs[:position]]
    why_not = tuple(f"{name}: {obstacles[name]}" for name in preferred if obstacles[name])
    spec = specs[position]
    function = load_entry_point(spec)
    if spec.takes_compute_capability and need.compute_capability is not None:
        function = functools.partial(function, compute_capability=need.compute_capability)
    return Kernel(spec=spec, function=function, backward=load_backward(spec), why_not=why_not)


def load_entry_point(spec: KernelSpec) -> Callable[..., Any]:
    """Import a spec's function, whether or not it can run here."""
    return _load(spec.entry_point)


def load_backward(spec: KernelSpec) -> Callable[..., Any] | None:
    """Import a spec's own backward, whether or not it can run here; None where it has none."""
    return None if spec.backward_entry_point is None else _load(spec.backward_entry_point)


def _load(entry_point: str) -> Callable[..., Any]:
    module, _, function = entry_point.partition(":")
    return getattr(importlib.import_module(module), function)


def describe(kernels: Iterable[Kernel]) -> list[tuple[str, str, str]]:
    """Rows (operator, implementation, why not a preferred one) for the start-up table."""
    return [(kernel.spec.operator, kernel.spec.name, "; ".join(kernel.why_not)) for kernel in kernels]


def _obstacle(spec: KernelSpec, need: _Need) -> str | None:
    """Why ``spec`` cannot serve ``need``; None when it can."""
    if need.device_type not in spec.devices:
        return f"runs on {', '.join(spec.devices)}, not on {need.device_type}"
    if need.dtype not in spec.dtypes:
        return f"takes {', '.join(map(_short, spec.dtypes))}, not {_short(need.dtype)}"
    if need.gradient and not spec.differentiable:
        return "has no gradient"
    if not spec.deterministic and torch.are_deterministic_algorithms_enabled():
        return "its gradients differ from run to run, and only deterministic algorithms are allowed"
    for feature in sorted(need.features):
        if need.device_type not in spec.features.get(feature, ()):
            return f"has no {feature} on {need.device_type}"
    return _device_obstacle(spec, need) or _head_obstacle(spec, need) or _package_obstacle(spec)


def _device_obstacle(spec: KernelSpec, need: _Need) -> str | None:
    if need.device_type == "cuda":
        present = need.compute_capability
        found = "unknown" if present is None else f"{present[0]}.{present[1]}"
        lowest, highest = spec.min_compute_capability, spec.max_compute_capability
        if lowest is not None and (present is None or present < lowest):
            return f"needs compute capability {lowest[0]}.{lowest[1]}, this device's is {found}"
        if highest is not None and (present is None or present > highest):
            return f"takes compute capability {highest[0]}.{highest[1]} at most, this device's is {found}"
    if need.device_type == "npu" and spec.socs and not (need.soc or "").startswith(spec.socs):
        return f"runs on {', '.join(spec.socs)}, this device is {need.soc or 'unknown'}"
    return None


def _head_obstacle(spec: KernelSpec, need: _Need) -> str | None:
    if need.head_dim is None:
        return None
    if spec.max_head_dim is not None and need.head_dim > spec.max_head_dim:
        return f"head size {need.head_dim} is above its limit of {spec.max_head_dim}"
    if need.head_dim % spec.head_dim_multiple:
        return f"head size {need.head_dim} is not a multiple of {spec.head_dim_multiple}"
    return None


def _package_obstacle(spec: KernelSpec) -> str | None:
    if spec.package is None:
        return None
    wanted = spec.package + (f" >= {spec.min_version}" if spec.min_version else "")
    # The metadata, not the module: importing a broken accelerator package can take the process down. And the
    # distribution, not importlib.metadata.version: MindSpeed makes that answer for what is not installed.
    try:
        installed = importlib.metadata.distribution(spec.package).version
    except importlib.metadata.PackageNotFoundError:
        return f"needs {wanted}, which is not installed"
    if spec.min_version and not _is_at_least(installed, spec.min_version):
        return f"needs {wanted}, installed is {installed}"
    return None


def _is_at_least(installed: str, wanted: str) -> bool:
    """Compare as PEP 440 orders: a beta is older than its release, and younger than the betas before it."""
    try:
        return Version(installed) >= Version(wanted)
    except InvalidVersion:
        return False


def compute_capability_of(device_type: str) -> tuple[int, int] | None:
    """Of the CUDA device in use; None where there is none."""
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability()
    return None


def _soc(device_type: str) -> str | None:
    npu = getattr(torch, "npu", None)  # there once torch_npu was imported
    if device_type == "npu" and npu is not None and npu.is_available():
        return npu.get_device_name()
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
