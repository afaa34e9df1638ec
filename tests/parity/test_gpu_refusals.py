"""What a GPU cannot do is said before anything is loaded, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import backends
import camelid
from camelid import _core
from checkpoints import Weights, write_checkpoint
from engines import open_engine

Checkpoint = Callable[[str], tuple[Path, Weights]]


@pytest.fixture(autouse=True)
def _only_where_a_gpu_can_be_made_up() -> None:
    if not backends.is_emulated():
        pytest.skip("of an emulated GPU: it can be told what it is")


def test_auto_leaves_a_gpu_that_is_too_old_alone(checkpoint: Checkpoint) -> None:
    folder = checkpoint("dense")[0]
    with backends.emulate(capability=75):
        assert not _core.cuda_available()
        with camelid.LLM(folder, device="auto", threads=1) as llm:
            assert "cpu" in llm._loop._core.describe()
        with pytest.raises(camelid.Unsupported, match=r"7\.5.*needs 8\.0.*device=\"cpu\""):
            camelid.LLM(folder, device="cuda")
    assert _core.cuda_available()


@pytest.mark.parametrize("option", [{"compute": "exact"}, {"kv_cache": "f32"}])
def test_auto_takes_the_cpu_for_what_only_that_does(
    checkpoint: Checkpoint, option: dict[str, str]
) -> None:
    folder = checkpoint("dense")[0]
    with camelid.LLM(folder, device="auto", threads=1, **option) as llm:
        assert "cpu" in llm._loop._core.describe()
    with pytest.raises(camelid.Unsupported, match=r"is for the CPU.*Use .*device=\"cpu\""):
        camelid.LLM(folder, device="cuda", **option)


def test_a_gpu_that_is_not_there(checkpoint: Checkpoint) -> None:
    with pytest.raises(camelid.Unsupported, match=r"no GPU number 3; 1 can be used here"):
        camelid.LLM(checkpoint("dense")[0], device="cuda:3")


def test_more_experts_than_a_gpu_takes(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 300, "hidden_size": 16, "intermediate_size": 8}
    write_checkpoint(tmp_path, config_overrides={**sizes, "num_hidden_layers": 1})
    with pytest.raises(camelid.Unsupported, match=r"300 experts.*a GPU takes up to 256"):
        open_engine(tmp_path)
