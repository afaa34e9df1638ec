"""Tiles are encoded one by one, remembered, and may be interrupted between two."""

from __future__ import annotations

import json
import queue
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from camelid import LLM, SamplingParams
from camelid.errors import Cancelled, CapacityError, CheckpointError, Error, InvalidRequest
from camelid.image_cache import FeatureCache
from checkpoints import SPECIAL_IDS, write_checkpoint
from engines import assert_same_bits

PATCH = SPECIAL_IDS["<|patch|>"]
TILE_BYTES = 4 * 64 * 4  # 4 tokens of 64 floats
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
Tiles = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("seeing")
    write_checkpoint(made, vision=True, seed=11, config_overrides={"vocab_size": 271})
    settings = {"size": {"height": 56, "width": 56}}
    (made / "preprocessor_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", threads=1, memory="64MiB") as loaded:
        yield loaded


def tiles(n: int, seed: int = 0) -> Tiles:
    random = np.random.Generator(np.random.PCG64(seed))
    return random.uniform(-1, 1, (n, 3, 56, 56)).astype(np.float32)


def prompt(*images: Tiles) -> dict[str, Any]:
    ids = [1, *[PATCH] * (4 * sum(map(len, images))), 2]
    return {"prompt_token_ids": ids, "images": list(images)}


class Spy:
    """Counts the tiles that the vision tower sees; `before` is called with the number so far."""

    def __init__(self, llm: LLM, before: Any = None) -> None:
        self.n_seen = 0
        self._encode = llm._loop.encode_tile
        self._before = before
        llm._loop.encode_tile = self  # type: ignore[method-assign, assignment]

    def __call__(self, pixels: Tiles) -> Tiles:
        if self._before is not None:
            self._before(self.n_seen)
        self.n_seen += 1
        return self._encode(pixels)


def test_what_was_seen_before_is_not_encoded_again(llm: LLM) -> None:
    spy = Spy(llm)
    seen = tiles(3)
    whole = llm._loop._core.encode_image(seen)
    first = llm.encode_image(seen)
    assert_same_bits(first, whole)
    assert spy.n_seen == 3
    assert_same_bits(llm.encode_image(seen), whole)
    assert_same_bits(llm.encode_image(seen[::-1]), whole[::-1])
    wanted = llm.logits(**_as_logits(prompt(seen[1:])))
    assert_same_bits(llm.logits(**_as_logits(prompt(seen[1:]))), wanted)
    assert spy.n_seen == 3
    first[:] = 0  # the caller's own
    assert_same_bits(llm.encode_image(seen), whole)
    assert llm._image_encoder.cache.used_bytes == 3 * TILE_BYTES


def _as_logits(prompt: dict[str, Any]) -> dict[str, Any]:
    return {"token_ids": prompt["prompt_token_ids"], "images": prompt["images"]}


def test_a_small_memory_of_images_changes_no_bits(folder: Path) -> None:
    seen = tiles(5)
    with LLM(folder, device="cpu", threads=1, image_cache=0) as llm:
        spy = Spy(llm)
        wanted = llm.logits(**_as_logits(prompt(seen)))
        llm.logits(**_as_logits(prompt(seen)))
        assert spy.n_seen == 10
        assert len(llm._image_encoder.cache) == 0
    with LLM(folder, device="cpu", threads=1, image_cache=2 * TILE_BYTES + 10) as llm:
        spy = Spy(llm)
        for _ in range(2):
            assert_same_bits(llm.logits(**_as_logits(prompt(seen))), wanted)
            assert llm._image_encoder.cache.used_bytes == 2 * TILE_BYTES
        assert spy.n_seen == 10  # in this order each is dropped before it comes again
        llm.encode_image(seen[3:])
        assert spy.n_seen == 10


def test_remembered_images_are_part_of_the_memory(folder: Path, tmp_path: Path) -> None:
    def kv_bytes(llm: LLM) -> int:
        return llm._loop._core.memory()["kv_limit_bytes"]

    options: dict[str, Any] = {"device": "cpu", "threads": 1, "memory": "64MiB"}
    with LLM(folder, **options, image_cache=0) as llm:
        without = kv_bytes(llm)
    with LLM(folder, **options, image_cache="1MiB") as llm:
        assert llm._image_encoder.cache.limit_bytes == 1 << 20
        assert without - kv_bytes(llm) == 1 << 20
    with LLM(folder, **options) as llm:
        limit = llm._image_encoder.cache.limit_bytes
        assert 3 << 20 < limit <= 4 << 20  # a sixteenth of what is left
        assert without - kv_bytes(llm) == limit
    with pytest.raises(CapacityError, match=r"image_cache=67108864 takes .* Lower image_cache="):
        LLM(folder, **options, image_cache="64MiB")
    with pytest.raises(InvalidRequest, match="image_cache"):
        LLM(folder, **options, image_cache="much")
    write_checkpoint(tmp_path)
    with LLM(tmp_path, **options, image_cache="1MiB") as llm:  # it sees nothing to remember
        assert llm._image_encoder.cache.limit_bytes == 0


def test_requests_under_way_run_between_tiles(llm: LLM) -> None:
    """A stream gets tokens between any two of 17 tiles, and each its own bits."""
    seen = tiles(17)
    whole = llm._loop._core.encode_image(seen)
    tokens: queue.SimpleQueue[int] = queue.SimpleQueue()
    encoded = threading.Event()

    def read() -> None:
        endless = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
        for delta in llm.stream("x", endless):
            for token in delta.token_ids:
                tokens.put(token)
            if encoded.is_set():
                return

    reader = threading.Thread(target=read)
    reader.start()
    ids: list[int] = []

    def take_one(n_seen: int) -> None:
        while not tokens.empty():
            ids.append(tokens.get())
        ids.append(tokens.get(timeout=30))

    Spy(llm, take_one)
    got = llm.encode_image(seen)
    encoded.set()
    reader.join()
    assert_same_bits(got, whole)
    params = SamplingParams(max_tokens=len(ids), temperature=0, ignore_eos=True)
    assert llm.generate("x", params)[0].token_ids == ids


def test_cancelling_ends_requests_between_two_tiles(llm: LLM) -> None:
    seen = prompt(tiles(9))
    spy = Spy(llm, lambda n: llm.cancel() if n % 3 == 2 else None)
    answers = llm.generate([seen, "text", prompt(tiles(2, seed=9))], GREEDY)
    assert spy.n_seen == 3
    assert [a.finish_reason for a in answers] == ["cancelled"] * 3 or [
        a.finish_reason for a in answers
    ] == ["cancelled", "length", "cancelled"]  # the text may have been faster
    deltas = list(llm.stream(prompt(tiles(9, seed=1)), GREEDY))
    assert [delta.finish_reason for delta in deltas] == ["cancelled"]
    with pytest.raises(Cancelled):
        llm.logits(**_as_logits(prompt(tiles(9, seed=2))))
    with pytest.raises(Cancelled, match=r"\[vision\]"):
        llm.encode_image(tiles(9, seed=3))
    assert spy.n_seen == 12
    (answer,) = llm.generate(prompt(tiles(1, seed=4)), GREEDY)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("call", ["generate", "stream", "logits", "encode_image"])
def test_closing_ends_requests_between_two_tiles(folder: Path, call: str) -> None:
    llm = LLM(folder, device="cpu", threads=1, memory="64MiB")
    spy = Spy(llm, lambda n: llm.close() if n == 2 else None)
    seen = tiles(9)
    calls = {
        "generate": lambda: llm.generate(prompt(seen)),
        "stream": lambda: list(llm.stream(prompt(seen))),
        "logits": lambda: llm.logits(**_as_logits(prompt(seen))),
        "encode_image": lambda: llm.encode_image(seen),
    }
    with pytest.raises(Cancelled, match="closed while"):
        calls[call]()
    assert spy.n_seen == 3
    with pytest.raises(InvalidRequest, match="is closed"):
        calls[call]()


def _encode_until_closed(llm: LLM, errors: list[Error]) -> None:
    try:
        for seed in range(100_000):
            llm.encode_image(tiles(3, seed))
    except Error as error:
        errors.append(error)


def test_closing_in_the_middle_of_a_tile_is_safe(folder: Path) -> None:
    for n_before in range(5):
        llm = LLM(folder, device="cpu", threads=2, memory="64MiB")
        under_way = threading.Event()
        Spy(llm, lambda n, n_before=n_before, event=under_way: n == n_before and event.set())
        errors: list[Error] = []
        threads = [
            threading.Thread(target=_encode_until_closed, args=(llm, errors)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert under_way.wait(30)
        llm.close()
        for thread in threads:
            thread.join()
        assert len(errors) == 2
        assert all("closed" in str(error) for error in errors)


def test_ctrl_c_ends_a_request_between_two_tiles(llm: LLM) -> None:
    spy = Spy(llm, lambda n: signal.raise_signal(signal.SIGINT) if n == 2 else None)
    for start in (
        lambda: llm.generate([prompt(tiles(9)), "beside"], GREEDY),
        lambda: list(llm.stream(prompt(tiles(9, seed=1)), GREEDY)),
    ):
        spy.n_seen = 0
        with pytest.raises(KeyboardInterrupt):
            start()
        assert spy.n_seen == 2
    assert llm.generate("still here", GREEDY)[0].finish_reason == "length"
    llm._loop._core.check_invariants()


def test_a_stream_encodes_when_it_is_read_and_refuses_at_once(llm: LLM) -> None:
    spy = Spy(llm)
    stream = llm.stream(prompt(tiles(2)), GREEDY)
    assert spy.n_seen == 0
    with pytest.raises(InvalidRequest, match="image tokens"):
        llm.stream({**prompt(tiles(2)), "images": [tiles(3)]}, GREEDY)
    next(stream)
    assert spy.n_seen == 2
    stream.close()


def test_features_too_large_for_the_machine_are_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camelid._core.available_memory", lambda: 2 * TILE_BYTES)
    spy = Spy(llm)
    with pytest.raises(CapacityError, match=r"features of 3 tiles take 3\.0 KiB, 2\.0 KiB"):
        llm.encode_image(tiles(3))
    assert spy.n_seen == 0
    assert len(llm.encode_image(tiles(2))) == 2


def test_a_bar_shows_tiles_that_take_long(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(llm.stream(prompt(tiles(2)), GREEDY, progress=True))
    assert "images" not in capsys.readouterr().err  # it was quick
    monkeypatch.setattr("camelid.progress._DELAY", 0)
    list(llm.stream(prompt(tiles(4, seed=1)), GREEDY, progress=True))
    shown = capsys.readouterr().err
    assert "images" in shown
    assert "0/4" in shown
    llm.generate(prompt(tiles(3, seed=2)), GREEDY)
    llm.encode_image(tiles(3, seed=3))
    assert capsys.readouterr().err == ""
    llm.encode_image(tiles(3, seed=4), progress=True)
    assert "images" in capsys.readouterr().err


def test_features_are_let_go_once_they_have_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    submit = llm._loop.submit
    monkeypatch.setattr(llm._loop, "submit", lambda r: (requests.append(r), submit(r)))
    llm.generate(prompt(tiles(3)), GREEDY)
    (request,) = requests
    assert request.images is None
    assert request.features is None


TOO_LARGE = np.full((1, 3, 56, 56), 3e38, np.float32)


def test_pixels_that_overflow_the_tower_are_the_callers_fault_and_named(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"pixel_values: its features are not .* 3e\+38"):
        llm.encode_image(TOO_LARGE)
    assert len(llm._image_encoder.cache) == 0  # what is of no use is not remembered
    bad = prompt(tiles(1), TOO_LARGE)
    for call in (
        lambda: llm.logits(**_as_logits(bad)),
        lambda: llm.generate(["text", bad], GREEDY),
        lambda: list(llm.stream(bad, GREEDY)),
    ):
        with pytest.raises(InvalidRequest, match=r"images\[1\]: its features are not finite"):
            call()
    assert len(llm._image_encoder.cache) == 1
    assert llm._image_encoder.room.used_bytes == 0


def test_one_callers_pixels_do_not_end_another_callers_request(llm: LLM) -> None:
    params = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    (alone,) = llm.generate([[1, 2, 3]], params)
    stream = llm.stream([1, 2, 3], params)
    ids = list(next(stream).token_ids)
    with pytest.raises(InvalidRequest, match=r"images\[0\]"):
        llm.generate(prompt(TOO_LARGE), GREEDY)
    for delta in stream:
        ids += delta.token_ids
    assert ids == alone.token_ids


def test_features_of_small_pixels_that_are_not_finite_blame_the_checkpoint(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = np.full((4, 64), np.nan, np.float32)
    monkeypatch.setattr(llm._loop, "encode_tile", lambda pixels: broken)
    with pytest.raises(CheckpointError, match=r"images\[0\]: the vision tower makes"):
        llm.logits(**_as_logits(prompt(tiles(1))))


@pytest.mark.filterwarnings("error")
def test_pixels_are_checked_as_the_float32_they_become(llm: LLM) -> None:
    wide = tiles(1).astype(np.float64) * 1e300
    with pytest.raises(InvalidRequest, match="pixel_values holds values that are not finite"):
        llm.encode_image(wide)
    with pytest.raises(InvalidRequest, match=r"images\[1\] holds values that are not finite"):
        llm.logits(**_as_logits(prompt(tiles(1), wide)))


def test_a_stream_sees_the_pixels_it_was_given(llm: LLM) -> None:
    seen = tiles(2)
    wanted = [d.token_ids for d in llm.stream(prompt(seen.copy()), GREEDY)]
    stream = llm.stream(prompt(seen), GREEDY)
    seen[:] = 0
    llm._image_encoder.cache = FeatureCache(1 << 20)
    spy = Spy(llm)
    assert [d.token_ids for d in stream] == wanted
    assert spy.n_seen == 2


def test_pixels_written_while_they_are_encoded_do_not_reach_the_memory(llm: LLM) -> None:
    seen = tiles(2)
    wanted = llm._loop._core.encode_image(seen)

    def overwrite(n_seen: int) -> None:
        seen[:] = 0

    Spy(llm, overwrite)
    assert_same_bits(llm.encode_image(seen), wanted)
    assert_same_bits(llm.encode_image(tiles(2)), wanted)


class Stubborn:
    """Like a torch tensor that requires a gradient."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Stubborn(), "no array: RuntimeError: Can't call numpy"),
        (b"\x89PNG", "is bytes, expected float32 .* only; prompts of token ids also take Pillow"),
        ("photo.jpg", "is str, expected float32 .* PIL.Image.open"),
        (Path("photo.jpg"), "Path, expected float32 "),
        (None, "is NoneType, expected float32 "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_named_with_its_place(llm: LLM, image: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"\[vision\] pixel_values .*{says}"):
        llm.encode_image(image)
    with pytest.raises(InvalidRequest, match=rf"\[prompt\] images\[1\] .*{says}"):
        llm.logits([1, PATCH, 2], images=[tiles(1), image])


def test_generate_holds_the_images_of_few_prompts_at_once(folder: Path) -> None:
    prompts = [prompt(tiles(2, seed)) for seed in range(30)]
    of_prompt = 2 * TILE_BYTES
    with LLM(folder, device="cpu", threads=1, memory="64MiB", image_cache=3 * of_prompt) as llm:
        alone = [llm.generate(each, GREEDY)[0].token_ids for each in prompts]
        held: list[int] = []
        waiting: list[int] = []
        living: list[weakref.ref[Tiles]] = []
        read = llm._image_inputs.read

        def watched(images: Any) -> Any:
            got = read(images)
            living.extend(map(weakref.ref, got))
            return got

        def look(n_seen: int) -> None:
            waiting.append(llm._image_encoder.room.used_bytes)
            held.append(sum(each() is not None for each in living))

        llm._image_inputs.read = watched  # type: ignore[method-assign]
        llm._image_encoder.cache = FeatureCache(0)
        Spy(llm, look)
        answers = llm.generate(prompts, GREEDY)
        assert [answer.token_ids for answer in answers] == alone
        assert max(waiting) <= 3 * of_prompt
        assert max(held) <= 2  # its own, and the one before until it is replaced
        assert llm._image_encoder.room.used_bytes == 0


def test_images_that_cannot_be_served_are_refused_before_any_prompt_runs(llm: LLM) -> None:
    spy = Spy(llm)
    with pytest.raises(InvalidRequest, match="need 8 image tokens"):
        llm.generate([prompt(tiles(1)), {**prompt(tiles(1)), "images": [tiles(2)]}], GREEDY)
    assert spy.n_seen == 0


def test_images_replaced_while_others_run_are_refused(llm: LLM) -> None:
    second = prompt(tiles(1, seed=1))
    Spy(llm, lambda n: second["images"].append(tiles(1)) if n == 0 else None)
    with pytest.raises(InvalidRequest, match="changed while"):
        llm.generate([prompt(tiles(1)), second], GREEDY)
    assert llm._image_encoder.room.used_bytes == 0


def _change_config(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_contradicts_itself_about_images_is_refused_where_it_matters(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vision=True, config_overrides={"vocab_size": 271})
    for index, says in (
        (PATCH - 1, rf"{PATCH - 1} in config.json, the tok.* is {PATCH}"),
        (271, "image_token_index is 271"),
    ):
        _change_config(tmp_path, "config.json", image_token_index=index)
        with LLM(tmp_path, device="cpu", threads=1) as llm:
            assert len(llm.logits([1, 2, 3])) == 3  # text does not mind
            with pytest.raises(CheckpointError, match=says):
                llm.generate(prompt(tiles(1)), GREEDY)
