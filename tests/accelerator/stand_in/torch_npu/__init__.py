"""A stand-in for Ascend's torch_npu: its operators with their true schemas, computed on the CPU. For tests only.

With ``EMULATED_NPUS=n`` in the environment, importing it also makes n devices ``npu:0`` ... whose memory is the host's
(:mod:`.device`). Nothing here shows what a real NPU computes, or how fast: it shows that our code passes the arguments
that the operators take, and reads the results that they return.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from torch_npu import operators

__version__ = "2.13.0"

for _name in operators.SCHEMAS:
    globals()[_name] = operators.call(_name)


class _HcclOptions:
    """``ProcessGroupHCCL.Options``: refuses settings that HCCL does not know."""

    def __init__(self) -> None:
        self.hccl_config: dict[str, object] = {}


_C = SimpleNamespace(_distributed_c10d=SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=_HcclOptions)))

if int(os.environ.get("EMULATED_NPUS", "0")):
    from torch_npu import device

    device.install(int(os.environ["EMULATED_NPUS"]))
