"""Image parts nobody should send: each gives one Error that names its place, or an answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from camelid import LLM, SamplingParams
from camelid.errors import Error, InvalidRequest
from camelid.image_files import MAX_BYTES
from checkpoints import write_checkpoint

ONE = SamplingParams(max_tokens=1, temperature=0)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("seeing")
    write_checkpoint(folder, vision=True, config_overrides={"vocab_size": 271})
    settings = {"size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "memory": "64MiB"}
    with LLM(folder, **options, image_files=False) as loaded:
        wanted = loaded.chat([user(url_part(png(20, 20)))], ONE)
        yield loaded
        assert loaded.chat([user(url_part(png(20, 20)))], ONE) == wanted
        loaded._loop._core.check_invariants()
        assert loaded._loop._core.memory()["kv_used_bytes"] == 0


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def url_part(data: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["url", "detail", "path", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["image_url", "input_image", "image"])},
    optional={
        "image_url": json_values,
        "image": json_values,
        "url": json_values,
        "path": json_values,
        "detail": json_values,
    },
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(parts)
def test_no_part_gives_anything_but_an_error(llm: LLM, part: dict[str, Any]) -> None:
    with pytest.raises(Error) as caught:
        llm.chat([user({"type": "text", "text": "a"}, part)], ONE)
    assert str(caught.value).startswith("[chat] messages[0].content[1]")
    assert len(str(caught.value)) < 400


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_pictures_give_an_answer_or_an_error(llm: LLM, data: st.DataObject) -> None:
    damaged = bytearray(png(60, 30))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))]
    said = "[chat] messages[0].content[0]"
    try:
        assert len(llm.chat([user(url_part(bytes(damaged)))], ONE).token_ids) == 1
    except Error as error:
        said = str(error)
    assert said.startswith("[chat] messages[0].content[0]")


def test_a_large_data_url_is_refused_before_it_is_decoded(llm: LLM) -> None:
    url = "data:image/png;base64," + "A" * (MAX_BYTES // 3 * 4 + 100)
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[0\]: .*bytes, expected"):
        llm.chat([user(part)], ONE)


def test_many_images_are_refused_by_length_and_soon(llm: LLM) -> None:
    part = url_part(png(2, 500))  # 1 x 16 tiles and an overview: 87 tokens
    with pytest.raises(Error, match=r"exceed the (context|KV cache)"):
        llm.chat([user(*[part] * 5000)], ONE)
