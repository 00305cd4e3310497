"""The one way into a run: process group, redirection and groups, made in the right order and undone in reverse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# megatron-core compiles small functions while it is imported, which torch must do unredirected. The groups' import
# brings all of it but these, so what a run imports later finds nothing left to compile.
import megatron.core.models.backends  # noqa: F401

from megatron_flashi2v.config.train import ParallelArguments
from megatron_flashi2v.parallel.groups import Groups, destroy_groups, make_groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.distributed import DEFAULT_TIMEOUT_MINUTES, init_distributed, process_group
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.redirect import megatron_on


@contextlib.contextmanager
def world(
    device: Device,
    launch: LaunchEnvironment,
    parallel: ParallelArguments,
    *,
    timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
    watch: contextlib.AbstractContextManager[object] | None = None,
    start: Callable[[LaunchEnvironment, Device, float], None] = init_distributed,
) -> Iterator[Groups]:
    """Enter a run and leave it; models are built and called only inside.

    The order, which the way out reverses:

    1. Import megatron-core, which compiles functions of torch's; importing this module does. MindSpeed, if used, must
       be loaded before.
    2. Start torch.distributed, unredirected: doing so empties torch's tables of the functions that are redirected next.
    3. Enter the hang watch, whose ranks exchange their places. It watches over all that follows, but neither over the
       meeting nor over the parting, which end by the distributed timeout.
    4. Redirect megatron-core to the device: from here on its literal "cuda" means ``device``.
    5. Make megatron-core's groups, some of whose tensors lie on the device.

    On the way out all ranks leave together. A rank that failed leaves at once, so that the others fail too instead of
    waiting for it. Afterwards the same processes can enter again, at another layout, also after an exception (but not
    with HCCL, which cannot let go of its peers: then the process must end).

    Args:
        device: where models live.
        launch: this process's place.
        parallel: the layout of the groups.
        timeout_minutes: how long the ranks wait for one another, when meeting and in collectives over all of them;
            those within the groups have the layout's ``distributed_timeout_minutes``.
        watch: such as a :class:`~megatron_flashi2v.runtime.hang_watch.HangWatch`; by default nothing is watched.
        start: what starts torch.distributed; :func:`~megatron_flashi2v.runtime.distributed.init_without_peers` makes
            a rank of a run that is only planned.

    Yields:
        This rank's groups.

    Raises:
        ConfigError: the ranks did not meet.
        PeerError: a collective failed because another process has left.
    """
    with (
        process_group(launch, device, timeout_minutes, start=start),
        watch or contextlib.nullcontext(),
        megatron_on(device),
    ):
        try:
            yield make_groups(parallel)
        finally:
            destroy_groups()


def single_process(device: Device) -> contextlib.AbstractContextManager[Groups]:
    """The world of a model that is not divided. A launcher's variables are ignored: each process is on its own."""
    return world(device, LaunchEnvironment(), ParallelArguments())
