"""Images in conversations: their place in the prompt, and logits equal to ids with tiles."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camelid import LLM, SamplingParams
from camelid.images import tile
from camelid.request import GenerateRequest
from checkpoints import SPECIAL_IDS, write_checkpoint
from engines import assert_same_bits

SIDE = 56
PER_TILE = 4  # tokens: 4 x 4 patches, shuffled into 2 x 2
SETTINGS = {"size": {"height": SIDE, "width": SIDE}, "max_patches": 16}
Message = dict[str, Any]

BOS, START, END = (SPECIAL_IDS[f"<|{n}|>"] for n in ("begin_of_text", "image_start", "image_end"))
X, Y = SPECIAL_IDS["<|tile_x_separator|>"], SPECIAL_IDS["<|tile_y_separator|>"]
OVERVIEW, PATCH = SPECIAL_IDS["<|image|>"], SPECIAL_IDS["<|patch|>"]
HEADER, HEADER_END, EOT = (SPECIAL_IDS[f"<|{n}|>"] for n in ("header_start", "header_end", "eot"))
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("seeing")
    write_checkpoint(made, vision=True, seed=11, config_overrides={"vocab_size": 271})
    (made / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", threads=2, memory="256MiB") as loaded:
        yield loaded
        loaded.generate([[1]], SamplingParams(max_tokens=1))  # behind everything cancelled
        core = loaded._loop._core
        core.check_invariants()
        assert core.memory()["kv_used_bytes"] == 0


def picture(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """Return an image that becomes rows x columns tiles."""
    bits = np.random.PCG64(seed).random_raw(rows * SIDE * columns * SIDE * 3)
    pixels = (bits >> np.uint64(56)).astype(np.uint8)
    return Image.fromarray(pixels.reshape(rows * SIDE, columns * SIDE, 3))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def text(words: str) -> Message:
    return {"type": "text", "text": words}


def seen(image: Image.Image) -> Message:
    return {"type": "image_url", "image_url": {"url": data_url(image), "detail": "low"}}


def user(*parts: Message) -> Message:
    return {"role": "user", "content": list(parts)}


def laid_out(rows: int, columns: int) -> list[int]:
    """Return what Llama 4's processor puts in the place of an image."""
    patches = [PATCH] * PER_TILE
    row = [*patches, *[X, *patches] * (columns - 1), Y]
    tiles = row * rows if rows * columns > 1 else []
    return [START, *tiles, OVERVIEW, *patches, END]


def turn(role: str, *content: str | list[int]) -> list[int]:
    ids = [HEADER, *role.encode(), HEADER_END, *b"\n\n"]
    for piece in content:
        ids += piece.encode() if isinstance(piece, str) else piece
    return [*ids, EOT]


def chat_request(llm: LLM, messages: list[Message]) -> GenerateRequest:
    """Return the request that `llm.chat` would run."""
    return llm._chat_request(messages, GREEDY, None, lambda event: None)


ANSWER = [HEADER, *b"assistant", HEADER_END, *b"\n\n"]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (3, 1), (2, 3), (4, 4)])
def test_an_image_stands_in_the_prompt_as_the_processor_lays_it_out(
    llm: LLM, rows: int, columns: int
) -> None:
    image = picture(rows, columns)
    request = chat_request(llm, [user(text("Look: "), seen(image), text(" What is it?"))])
    expected = turn("user", "Look: ", laid_out(rows, columns), " What is it?")
    assert request.prompt.tolist() == [BOS, *expected, *ANSWER]
    assert request.images is not None
    assert len(request.images.tiles) == (rows * columns + 1 if rows * columns > 1 else 1)


def conversation() -> tuple[list[Message], list[int], list[Image.Image]]:
    """Return messages with images in two turns, their ids, and the images in order."""
    images = [picture(1, 2, 1), picture(1, 1, 2), picture(2, 2, 3)]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(seen(images[0]), seen(images[1]), text("two")),
        {"role": "assistant", "content": "I see <|image|><|patch|>."},
        user(text("and <|patch|>"), seen(images[2])),
    ]
    expected = [
        BOS,
        *turn("system", "Be brief."),
        *turn("user", laid_out(1, 2), laid_out(1, 1), "two"),
        *turn("assistant", "I see <|image|><|patch|>."),
        *turn("user", "and <|patch|>", laid_out(2, 2)),
        *ANSWER,
    ]
    return messages, expected, images


def test_images_keep_their_order_over_several_turns(llm: LLM) -> None:
    messages, expected, images = conversation()
    request = chat_request(llm, messages)
    assert request.prompt.tolist() == expected
    assert request.images is not None
    tiles = np.concatenate([tile(image, SETTINGS)[0] for image in images])
    assert_same_bits(np.stack(request.images.tiles), tiles)


def test_a_chat_answers_as_its_ids_and_images_do(llm: LLM) -> None:
    messages, ids, images = conversation()
    wanted = llm.logits(ids, images=images)
    assert np.abs(llm.logits(ids) - wanted).max() > 0.1 * wanted.std()  # the images matter
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
    answer = llm.chat(messages, params)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.token_ids[0] == wanted[-1].argmax()
    (same,) = llm.generate({"prompt_token_ids": ids, "images": images}, params)
    assert answer == same
    streamed = list(llm.stream_chat(messages, params))
    assert [token for delta in streamed for token in delta.token_ids] == answer.token_ids
    others = [user(seen(picture(1, 2, 9)), text("two"))]
    assert llm.chat(others, params).logprobs != llm.chat(messages[1:2], params).logprobs
