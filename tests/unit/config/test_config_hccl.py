from __future__ import annotations

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.hccl import parse_buffer_sizes


def test_sizes_by_megatrons_description() -> None:
    assert parse_buffer_sizes(None) == {} == parse_buffer_sizes("")
    assert parse_buffer_sizes("tp:200, dp_cp:400,default:50") == {
        "TENSOR_MODEL_PARALLEL_GROUP": 200, "DATA_PARALLEL_GROUP_WITH_CP": 400, "default": 50,
    }


def test_the_world_and_both_levels_of_usp() -> None:
    assert parse_buffer_sizes("world:10,cp:100") == {
        "default_pg": 10, "CONTEXT_PARALLEL_GROUP": 100,
        "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L0": 100, "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L1": 100,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [("tq:200", "no group 'tq'; choose from world, tp, pp"), ("tp:0", "tp is given '0'"),
     ("tp", "write MB, such as tp:200"), ("tp:1,tp:2", "tp is given twice"), ("tp:1.5", "'1.5'")],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--hccl-buffer-sizes {text}.*{message}"):
        parse_buffer_sizes(text)
