"""Images in conversations: their place in the prompt, and logits equal to ids with tiles."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camelid import LLM, SamplingParams
from camelid.config import load_config
from camelid.errors import Cancelled, Error, InvalidRequest, TemplateError, Unsupported
from camelid.image_inputs import ImageInputs
from camelid.images import tile
from camelid.request import GenerateRequest
from checkpoints import SPECIAL_IDS, write_checkpoint
from engines import assert_same_bits
from fake_web import FakeWeb, ok

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
    assert sum(request.images.n_tiles) == (rows * columns + 1 if rows * columns > 1 else 1)


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
    assert_same_bits(np.concatenate(request.images.take()), tiles)


def test_a_chat_answers_as_its_ids_and_images_do(llm: LLM) -> None:
    messages, ids, images = conversation()
    wanted = llm.logits(ids, images=images)
    black = [Image.new("RGB", image.size) for image in images]
    moved = llm.logits(ids, images=black) - wanted
    assert np.abs(moved).max() > 0.1 * wanted.std()  # the images matter
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


def test_a_picture_may_come_in_any_form(llm: LLM, tmp_path: Path) -> None:
    image = picture(1, 2)
    path = tmp_path / "päth with blanks.png"
    path.write_bytes(png(image))
    url = data_url(image)
    parts: list[Message] = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": str(path)}},
        {"type": "image_url", "image_url": {"url": path}},
        {"type": "image_url", "image_url": path.as_uri()},
        {"type": "image_url", "image_url": "FILE://localhost" + str(path)},
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "image", "image": image},
        {"type": "image", "image": png(image)},
        {"type": "image", "image": bytearray(png(image)), "url": None},
        {"type": "image", "image": memoryview(png(image))},
        {"type": "image", "image": url},
        {"type": "image", "url": url},
        {"type": "image", "url": str(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
    ]
    wanted = chat_request(llm, [user(parts[0])])
    assert wanted.images is not None
    for part in parts[1:]:
        got = chat_request(llm, [user(part)])
        assert got.prompt.tolist() == wanted.prompt.tolist()
        assert got.images is not None
        assert_same_bits(np.concatenate(got.images.take()), np.concatenate(wanted.images.take()))


BAD_PARTS: dict[str, tuple[Any, type[Error], str]] = {
    "nothing": ({"type": "image_url"}, InvalidRequest, "names no image"),
    "null": ({"type": "image_url", "image_url": None}, InvalidRequest, "names no image"),
    "no url": ({"type": "image_url", "image_url": {}}, InvalidRequest, "names no image"),
    "number": ({"type": "image_url", "image_url": {"url": 7}}, InvalidRequest, "names no image"),
    "empty": ({"type": "image_url", "image_url": ""}, InvalidRequest, "names no image"),
    "bytes as url": ({"type": "image_url", "image_url": b"x"}, InvalidRequest, '"image": ...}'),
    "open as url": (
        {"type": "input_image", "image_url": {"url": Image.new("L", (1, 1))}},
        InvalidRequest,
        'Send an open image or bytes as {"type": "image", "image": ...}',
    ),
    "input null": ({"type": "input_image"}, InvalidRequest, 'expected {"type": "input_image"'),
    "placeholder": ({"type": "image"}, InvalidRequest, 'one of "image", "url" or "path"'),
    "two": ({"type": "image", "url": "data:,", "path": "x"}, InvalidRequest, "names no image"),
    "array": ({"type": "image", "image": np.zeros((4, 4, 3))}, InvalidRequest, "names no image"),
    "no base64": ({"type": "image_url", "image_url": "data:,x"}, Unsupported, "only ;base64"),
    "no comma": ({"type": "image_url", "image_url": "data:image/png"}, InvalidRequest, "no comma"),
    "damaged": ({"type": "image", "image": b"\x89PNG"}, InvalidRequest, "in no format"),
    "no file": ({"type": "image", "path": "/no/such.png"}, InvalidRequest, "cannot read"),
    "path is a path": ({"type": "image", "path": "http://a/b"}, InvalidRequest, "cannot read"),
    "folder": ({"type": "image", "url": "file:///tmp"}, InvalidRequest, "not a regular file"),
    "device": ({"type": "image", "url": "/dev/zero"}, InvalidRequest, "not a regular file"),
    "nul": ({"type": "image", "url": "file:///a%00b"}, InvalidRequest, "cannot read"),
    "other host": ({"type": "image", "url": "file://h/p"}, InvalidRequest, "no file of this"),
    "relative": ({"type": "image", "url": "file://"}, InvalidRequest, "no file of this"),
    "http": ({"type": "image_url", "image_url": "http://a/b"}, Unsupported, "fetch_images=True"),
    "https": ({"type": "image", "url": "HTTPS://a/b"}, Unsupported, "fetch_images=True"),
    "ftp": ({"type": "image", "url": "ftp://a/b"}, Unsupported, "not fetched"),
}


@pytest.mark.parametrize(("part", "kind", "says"), BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_a_bad_image_is_named_by_its_place(
    llm: LLM, part: Message, kind: type[Error], says: str
) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        user(text("this"), part),
    ]
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(kind) as caught:
            call(messages)
        message = str(caught.value)
        assert message.startswith("[chat] messages[2].content[1]")
        assert says in message
        assert len(message) < 400


def test_a_server_keeps_its_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(png(picture(1, 1)))
    with LLM(folder, device="cpu", threads=1, memory="64MiB", image_files=False) as llm:
        for url in (str(path), path.as_uri(), path):
            for part in (
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "image", "path": str(path)},
            ):
                with pytest.raises(Unsupported, match="local paths are not allowed"):
                    llm.chat([user(part)])
        assert len(llm.chat([user(seen(picture(1, 1)))], GREEDY).token_ids) == 8


def test_urls_are_fetched_where_that_is_allowed(folder: Path) -> None:
    image = picture(1, 2)
    with FakeWeb({"/a.png": ok(png(image)), "/text": ok(b"hello")}) as web:
        inputs = ImageInputs(folder, load_config(folder).vision, fetcher=web.fetcher())
        assert_same_bits(
            tile(inputs.open("http://images.example/a.png"), SETTINGS)[0], tile(image, SETTINGS)[0]
        )
        with pytest.raises(InvalidRequest, match="in no format"):
            inputs.open("http://images.example/text")
    with LLM(folder, device="cpu", threads=1, memory="64MiB", fetch_images=True) as llm:
        part = {"type": "image_url", "image_url": "http://127.0.0.1/a.png"}
        with pytest.raises(InvalidRequest, match=r"^\[chat\] messages\[0\].content\[0\]: .*public"):
            llm.chat([user(part)])


def remote(path: str) -> Message:
    return {"type": "image_url", "image_url": {"url": f"http://images.example{path}"}}


def test_a_call_fetches_each_url_once_and_sixteen_at_most(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"/{n}.png" for n in range(17)]
    with FakeWeb({path: ok(png(picture(1, 1, n))) for n, path in enumerate(paths)}) as web:
        inputs = ImageInputs(folder, load_config(folder).vision, fetcher=web.fetcher())
        monkeypatch.setattr(llm, "_image_inputs", inputs)
        parts = [remote(path) for path in paths[:16]]
        for n_calls in (1, 2):  # the limits are each call's own
            request = chat_request(llm, [user(*parts, *parts[:8]), user(*parts)])
            assert len(web.requests) == 16 * n_calls
        assert request.images is not None
        seen_tiles = np.concatenate(request.images.take())
        assert len(seen_tiles) == 40
        wanted = tile(picture(1, 1, 3), SETTINGS)[0][0]
        for place in (3, 19, 27):
            assert_same_bits(seen_tiles[place], wanted)
        with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[16\]: .*the 16 fetched"):
            llm.chat([user(*map(remote, paths))], GREEDY)


class Opening:
    """Does something whenever the model opens an image."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, then: Any) -> None:
        self.n_opened = 0
        opening = llm._image_inputs.open

        def count(source: Any) -> Any:
            self.n_opened += 1
            if self.n_opened % 3 == 0:
                then()
            return opening(source)

        monkeypatch.setattr(llm._image_inputs, "open", count)


def test_cancelling_ends_a_chat_between_two_images(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Opening(llm, monkeypatch, llm.cancel)
    messages = [user(*[seen(picture(1, 1, n)) for n in range(9)])]
    answer = llm.chat(messages, GREEDY)
    assert (answer.finish_reason, answer.token_ids, answer.text) == ("cancelled", [], "")
    assert opening.n_opened == 3
    (delta,) = llm.stream_chat(messages, GREEDY, progress=True)
    assert (delta.finish_reason, delta.token_ids) == ("cancelled", [])
    assert opening.n_opened == 6
    assert llm.chat([user(*[seen(picture(1, 1, n)) for n in range(3)])], GREEDY).text == ""
    assert llm.chat([user(seen(picture(1, 1)))], GREEDY).finish_reason == "length"


def test_a_cancellation_while_the_last_image_is_read_counts(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = llm._image_inputs.read
    monkeypatch.setattr(llm._image_inputs, "read", lambda images: (llm.cancel(), read(images))[1])
    encoded = count_tiles(llm, monkeypatch)
    prompt = {"prompt_token_ids": [BOS, *laid_out(1, 1)], "images": [picture(1, 1, 77)]}
    (answer,) = llm.generate(prompt, GREEDY)
    assert answer.finish_reason == "cancelled"
    with pytest.raises(Cancelled):
        llm.logits(prompt["prompt_token_ids"], images=prompt["images"])
    assert encoded == []


def test_closing_ends_a_chat_between_two_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n_images in (9, 3):
        llm = LLM(folder, device="cpu", threads=1, memory="64MiB")
        opening = Opening(llm, monkeypatch, llm.close)
        messages = [user(*[seen(picture(1, 1, n)) for n in range(n_images)])]
        with pytest.raises(Cancelled, match="closed while"):
            llm.chat(messages)
        for call in (llm.chat, llm.stream_chat):
            with pytest.raises(InvalidRequest, match="is closed"):
                call(messages)
        assert opening.n_opened == 3


def test_text_that_looks_like_an_image_moves_nothing(llm: LLM) -> None:
    names = "".join(SPECIAL_IDS) + laid_out_text()
    messages = [user(text(names), seen(picture(1, 2)), text(names)), user(text(names))]
    request = chat_request(llm, messages)
    expected = [
        BOS,
        *turn("user", names, laid_out(1, 2), names),
        *turn("user", names),
        *ANSWER,
    ]
    assert request.prompt.tolist() == expected
    assert request.images is not None
    rows = request.images.rows
    assert (rows >= 0).sum() == 3 * PER_TILE == (request.prompt == PATCH).sum()
    assert (request.prompt[rows >= 0] == PATCH).all()
    assert rows[rows >= 0].tolist() == list(range(3 * PER_TILE))
    # A text alone holds no image, whatever it says.
    assert chat_request(llm, [{"role": "user", "content": names}]).images is None


def laid_out_text() -> str:
    return "<|image_start|><|image|>" + "<|patch|>" * PER_TILE + "<|image_end|>"


def test_a_template_cannot_add_patches(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    template = "{{ messages[0].content[0].text }}<|image|><|patch|>"
    (tmp_path / "chat_template.jinja").write_text(template)
    with LLM(tmp_path, device="cpu", threads=1, memory="64MiB") as llm:
        with pytest.raises(InvalidRequest, match="need 4 image tokens"):
            llm.chat([user(text("a"), seen(picture(1, 1)))])
        (tmp_path / "chat_template.jinja").write_text("<|image|>")
        llm._template = None
        with pytest.raises(TemplateError, match="placed 1 of 2 images"):
            llm.chat([user(seen(picture(1, 1)), seen(picture(1, 1)))])


def test_a_template_that_turns_messages_around_takes_their_images_along(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    template = (
        "{% for message in messages | reverse %}{% for part in message.content %}"
        "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    images = [picture(1, 1, 1), picture(1, 2, 2)]
    with LLM(tmp_path, device="cpu", threads=1, memory="64MiB") as llm:
        messages = [user(text("one"), seen(images[0])), user(text("two"), seen(images[1]))]
        request = chat_request(llm, messages)
        assert request.prompt.tolist() == [*b"two", *laid_out(1, 2), *b"one", *laid_out(1, 1)]
        assert request.images is not None
        wanted = [tile(image, SETTINGS)[0] for image in reversed(images)]
        assert_same_bits(np.concatenate(request.images.take()), np.concatenate(wanted))


def test_images_where_they_cannot_stand_are_refused(llm: LLM) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(Unsupported, match="together with tools"):
        llm.chat([user(seen(picture(1, 1)))], tools=tools)
    for role in ("system", "assistant", "tool"):
        with pytest.raises(Unsupported, match="user messages"):
            llm.chat([{"role": role, "content": [seen(picture(1, 1))]}])


def test_a_conversation_too_long_is_refused_before_a_tile_is_encoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(folder, device="cpu", threads=1, memory="64MiB", max_context=100) as llm:
        encoded = count_tiles(llm, monkeypatch)
        one = len(laid_out(2, 2))  # 26 tokens
        opened = []
        monkeypatch.setattr(
            llm._image_inputs, "open", lambda source: opened.append(1) or picture(2, 2)
        )
        messages = [user(*[seen(picture(1, 1))] * 50)]
        for call in (llm.chat, llm.stream_chat):
            with pytest.raises(InvalidRequest, match="exceed the context of 100"):
                call(messages)
        assert len(opened) == 2 * (100 // one + 1)  # of 50 images: no more than show it
        with pytest.raises(InvalidRequest, match="exceed the context of 100"):
            llm.chat([user(seen(picture(1, 1)), text("x" * 100))])
        ids = [BOS, *laid_out(1, 1)]
        prompt = {"prompt_token_ids": ids, "images": [picture(1, 1)]}
        long = SamplingParams(max_tokens=100)
        for refused in (
            lambda: llm.generate(prompt, long),
            lambda: llm.stream(prompt, long),
            lambda: llm.generate({**prompt, "images": [picture(1, 2)]}),
            lambda: llm.logits(ids * 20, images=[picture(1, 1)] * 20),
        ):
            with pytest.raises(InvalidRequest):
                refused()
        assert encoded == []
        llm.generate(prompt, GREEDY)
        assert len(encoded) == 1


def count_tiles(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every tile the vision tower sees."""
    encoded: list[int] = []
    encode = llm._loop.encode_tile

    def counting(pixels: Any) -> Any:
        encoded.append(1)
        return encode(pixels)

    monkeypatch.setattr(llm._loop, "encode_tile", counting)
    return encoded


def test_a_model_without_a_tower_opens_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with LLM(tmp_path, device="cpu", threads=1, memory="64MiB", fetch_images=True) as llm:
        for source in ("http://127.0.0.1/x.png", "/no/such/file", data_url(picture(1, 1))):
            with pytest.raises(Unsupported, match="no vision tower"):
                llm.chat([user({"type": "image_url", "image_url": source})])
