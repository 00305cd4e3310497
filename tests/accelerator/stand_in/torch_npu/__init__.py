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
    """``ProcessGroupHCCL.Options``: refuses what HCCL does not know.

    torch_npu's class has these attributes alone, and reads these settings alone: it would overlook others.
    Source: torch_npu/csrc/distributed/Init.cpp and ProcessGroupHCCL.cpp of v2.7.1.
    """

    __slots__ = ("_config", "_timeout", "global_ranks_in_group", "group_id", "is_high_priority_stream", "op_timeout")
    _SETTINGS = {
        "group_name": str, "hccl_algo": str, "hccl_buffer_name": str, "hccl_buffer_size": int, "hccl_exec_timeout": int,
        "hccl_job_id": int, "hccl_op_expansion_mode": int, "hccl_retry_enable": str,
        "hccl_sdma_qos": int, "hccl_world_rank_id": int, "qos_service_level": int, "qos_traffic_class": int,
    }  # fmt: skip

    def __init__(self) -> None:
        self._config: dict[str, object] = {}

    @property
    def hccl_config(self) -> dict[str, object]:
        """A copy, as of C++'s map: what is put into it has no effect."""
        return dict(self._config)

    @hccl_config.setter
    def hccl_config(self, config: dict[str, object]) -> None:
        for name, value in config.items():
            if name not in self._SETTINGS:
                raise ValueError(f"HCCL knows no setting {name!r}")
            if type(value) is not self._SETTINGS[name]:
                raise TypeError(f"HCCL's setting {name} cannot be {value!r}")
        self._config = dict(config)


_C = SimpleNamespace(_distributed_c10d=SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=_HcclOptions)))

if int(os.environ.get("EMULATED_NPUS", "0")):
    from torch_npu import device

    device.install(int(os.environ["EMULATED_NPUS"]))
