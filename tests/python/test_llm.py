"""`camelid.LLM` on small real models: batches, streams, seeds, limits, cancellation, threads."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid
from camelid import LLM, Completion, SamplingParams
from camelid.errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    Error,
    InvalidRequest,
    TokenizerError,
    Unsupported,
)
from checkpoints import SPECIAL_IDS, Quantization, write_checkpoint

BOS = SPECIAL_IDS["<|begin_of_text|>"]
PROMPTS = ["The first", "a", "Something a little longer, over more than one chunk of tokens.", "é"]
VOCAB = {"vocab_size": 271}  # so that every id is a token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, seed=1, config_overrides=VOCAB)
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", threads=2, memory="256MiB") as loaded:
        yield loaded
        assert_nothing_left(loaded)


def assert_nothing_left(llm: LLM) -> None:
    """Every KV page is back. A cancelled request is gone when the next one ends."""
    llm.generate([[1]], SamplingParams(max_tokens=1))
    core = llm._loop._core
    core.check_invariants()
    assert core.memory()["kv_used_bytes"] == 0


def greedy(max_tokens: int = 24, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def seeded(seed: int, max_tokens: int = 24, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **more)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [greedy(n) for n in (30, 3, 17, 8)]
    completions = llm.generate(PROMPTS, params)
    assert [len(c.token_ids) for c in completions] == [30, 3, 17, 8]
    assert all(c.finish_reason == "length" for c in completions)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        n_prompt = len(prompt.encode()) + 1  # bytes and BOS
        assert completion.usage.prompt_tokens == n_prompt
        assert completion.usage.total_tokens == n_prompt + len(completion.token_ids)
        assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special=True)


def test_one_prompt_in_any_form(llm: LLM) -> None:
    ids = llm.tokenizer.encode("abc", add_bos=True)
    forms: list[Any] = [
        "abc", ["abc"], ids, [ids], tuple(ids), np.array(ids), np.array(ids, np.uint16)[None],
        {"prompt_token_ids": ids}, [{"prompt_token_ids": np.array(ids)}],
    ]  # fmt: skip
    answers = [llm.generate(form, greedy(6)) for form in forms]
    assert all(len(answer) == 1 for answer in answers)
    assert len({tuple(answer[0].token_ids) for answer in answers}) == 1
    assert answers[0][0].usage.prompt_tokens == 4
    assert llm.generate([], greedy()) == []


def test_bos_comes_once(llm: LLM) -> None:
    plain, named = llm.generate(["hello", "<|begin_of_text|>hello"], greedy(4))
    assert plain == named
    assert plain.usage.prompt_tokens == 6
    (ids,) = llm.generate([[BOS, *b"hello"]], greedy(4))
    assert ids == plain
    (without,) = llm.generate([list(b"hello")], greedy(4))
    assert without.usage.prompt_tokens == 5


def test_special_names_in_a_text_are_ordinary_text(llm: LLM) -> None:
    (answer,) = llm.generate("a<|eot|>", greedy(1))
    assert answer.usage.prompt_tokens == 1 + len("a<|eot|>")


def test_a_batch_gives_the_same_bits_as_each_alone(llm: LLM) -> None:
    params = [seeded(i, 20, logprobs=3) for i in range(len(PROMPTS))]
    together = llm.generate(PROMPTS, params)
    alone = [llm.generate(p, one)[0] for p, one in zip(PROMPTS, params, strict=True)]
    assert together == alone  # log probabilities included


def test_a_seed_gives_the_same_text_whatever_else_runs(llm: LLM) -> None:
    wanted = llm.generate("seed", seeded(7))[0]
    others = [seeded(i) for i in range(9)]
    got = llm.generate(["seed"] * 9, others)
    assert got[7] == wanted
    assert len({tuple(c.token_ids) for c in got}) > 5
    unseeded = llm.generate(["seed"] * 4, SamplingParams(max_tokens=16, ignore_eos=True))
    assert len({tuple(c.token_ids) for c in unseeded}) > 1


@pytest.mark.parametrize("step_tokens", [3, 7, 64, 512])
def test_how_a_prompt_is_cut_changes_nothing(
    folder: Path, llm: LLM, step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [BOS, *("many words " * 9).encode()]
    wanted = llm.generate([prompt, prompt[:20]], seeded(3, logprobs=2))
    wanted_logits = llm.logits(prompt)
    monkeypatch.setattr("camelid.plan.STEP_TOKENS", step_tokens)
    with LLM(folder, device="cpu", threads=1) as other:
        assert other.generate([prompt, prompt[:20]], seeded(3, logprobs=2)) == wanted
        got = other.logits(prompt)
        assert_nothing_left(other)
    assert got.tobytes() == wanted_logits.tobytes()


def test_a_stream_is_generate_in_pieces(llm: LLM) -> None:
    params = seeded(11, 40, logprobs=1)
    wanted = llm.generate(PROMPTS[2], params)[0]
    deltas = list(llm.stream(PROMPTS[2], params))
    assert "".join(d.text for d in deltas) == wanted.text
    assert [t for d in deltas for t in d.token_ids] == wanted.token_ids
    assert [e for d in deltas for e in d.logprobs or ()] == wanted.logprobs
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert (deltas[-1].finish_reason, deltas[-1].usage) == ("length", wanted.usage)


def test_stop_strings_and_stop_ids_end_answers(llm: LLM) -> None:
    # A seed whose answer has a readable stretch to stop at.
    full = next(
        c
        for c in llm.generate(["x"] * 40, [seeded(i, 60) for i in range(40)])
        if any(c.text[i : i + 2].isascii() and c.text[i : i + 2].strip() for i in range(10, 40))
    )
    seed = next(i for i in range(40) if llm.generate("x", seeded(i, 60))[0] == full)
    at = next(
        i for i in range(10, 40) if full.text[i : i + 2].isascii() and full.text[i : i + 2].strip()
    )
    stop = full.text[at : at + 2]
    (stopped,) = llm.generate("x", seeded(seed, 60, stop=["never this", stop]))
    assert stopped.text == full.text[: full.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]
    streamed = "".join(d.text for d in llm.stream("x", seeded(seed, 60, stop=[stop])))
    assert streamed == stopped.text
    (by_id,) = llm.generate("x", seeded(seed, 60, stop_token_ids=[full.token_ids[5]]))
    first = full.token_ids.index(full.token_ids[5])
    assert by_id.token_ids == full.token_ids[: first + 1]
    assert by_id.finish_reason == "stop"


def test_the_models_own_end_ends_unless_ignored(llm: LLM) -> None:
    bias = {SPECIAL_IDS["<|eot|>"]: 100.0}
    (ended,) = llm.generate("x", SamplingParams(max_tokens=9, temperature=0, logit_bias=bias))
    assert (ended.finish_reason, ended.text) == ("stop", "")
    assert ended.token_ids == [SPECIAL_IDS["<|eot|>"]]
    (on,) = llm.generate("x", greedy(9, logit_bias=bias))
    assert on.token_ids == [SPECIAL_IDS["<|eot|>"]] * 9
    assert (on.finish_reason, on.text) == ("length", "")


def test_logprobs_agree_with_the_logits(llm: LLM) -> None:
    prompt = [BOS, *b"log"]
    (answer,) = llm.generate([prompt], greedy(5, logprobs=4))
    rows = llm.logits(prompt + answer.token_ids)[len(prompt) - 1 : -1].astype(np.float64)
    assert answer.logprobs is not None
    for row, entry in zip(rows, answer.logprobs, strict=True):
        logprobs = row - np.log(np.sum(np.exp(row - row.max()))) - row.max()
        assert entry.token_id == int(row.argmax())
        assert entry.logprob == pytest.approx(logprobs[entry.token_id], abs=1e-5)
        assert [t.token_id for t in entry.top] == np.argsort(-row, kind="stable")[:4].tolist()
        assert entry.top[0].logprob == entry.logprob
    assert llm.generate([prompt], greedy(2))[0].logprobs is None
    (none,) = llm.generate([prompt], greedy(1, logprobs=0))
    assert none.logprobs is not None
    assert none.logprobs[0].top == ()


def test_logits_are_one_row_for_each_token(llm: LLM) -> None:
    ids = [BOS, *("x" * 300).encode()]
    logits = llm.logits(ids)
    assert (logits.shape, logits.dtype) == ((301, 271), np.float32)
    assert llm.logits(np.array(ids[:40])).tobytes() == logits[:40].tobytes()
    with pytest.raises(Unsupported, match="images"):
        llm.logits(ids, images=[object()])


def test_closing_a_stream_cancels_it(llm: LLM) -> None:
    stream = llm.stream("x", greedy(3000))
    assert [next(stream).token_ids for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert_nothing_left(llm)
    never_started = llm.stream("x", greedy(10))
    del never_started
    assert_nothing_left(llm)


def test_cancel_from_another_thread_keeps_what_there_is(llm: LLM) -> None:
    answers: list[Completion] = []
    errors: list[Error] = []

    def logits() -> None:
        try:
            llm.logits([1] * 4000)
        except Error as error:
            errors.append(error)

    threads = [
        threading.Thread(target=lambda: answers.extend(llm.generate("x", greedy(4000)))),
        threading.Thread(target=logits),
    ]
    stream = llm.stream("y", greedy(4000))
    next(stream)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        llm.cancel()
        for thread in threads:
            thread.join(0.05)
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled"
    assert rest[-1].usage is not None
    assert answers[0].finish_reason == "cancelled"
    assert len(answers[0].token_ids) == answers[0].usage.completion_tokens < 4000
    assert not errors or isinstance(errors[0], Cancelled)
    assert_nothing_left(llm)


def test_two_threads_may_share_a_model(llm: LLM) -> None:
    wanted = {i: llm.generate(f"thread {i}", seeded(i, 12))[0] for i in range(6)}
    wrong = []

    def work(offset: int) -> None:
        for turn in range(6):
            i = (turn + offset) % 6
            if llm.generate(f"thread {i}", seeded(i, 12))[0] != wanted[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stream_may_be_read_beside_other_work(llm: LLM) -> None:
    wanted = llm.generate("x", greedy(30))[0].text
    stream = llm.stream("x", greedy(30))
    text = next(stream).text
    for _ in range(3):
        llm.generate(PROMPTS, greedy(5))
    assert text + "".join(delta.text for delta in stream) == wanted


def test_chat_renders_the_template_and_follows_the_folder(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, seed=1, config_overrides=VOCAB)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False}))
    messages = [{"role": "user", "content": "Hello <|eot|>"}]
    with LLM(tmp_path, device="cpu", threads=1) as llm:
        first = llm.chat(messages, SamplingParams(max_tokens=12, ignore_eos=True))
        assert first == llm.chat(messages, SamplingParams(max_tokens=12, ignore_eos=True))
        assert first.text == "".join(
            d.text
            for d in llm.stream_chat(messages, SamplingParams(max_tokens=12, ignore_eos=True))
        )
        hot = [llm.chat(messages, SamplingParams(max_tokens=12, temperature=1.0)) for _ in range(3)]
        assert len({tuple(c.token_ids) for c in hot}) > 1
        with pytest.raises(InvalidRequest):
            llm.chat([])
        part = {"type": "image_url", "image_url": {"url": "data:,"}}
        with pytest.raises(Unsupported, match="image"):
            llm.chat([{"role": "user", "content": [part]}])


def test_limits_are_named_with_what_would_fit(folder: Path) -> None:
    with LLM(folder, device="cpu", threads=1, max_context=100, memory="256MiB") as llm:
        assert llm.max_context == 100
        (filled,) = llm.generate([[1] * 90], SamplingParams(temperature=0, ignore_eos=True))
        assert len(filled.token_ids) == 10
        with pytest.raises(InvalidRequest, match=r"90 \+ 11 tokens exceed the context of 100"):
            llm.generate([[1] * 90], greedy(11))
        with pytest.raises(InvalidRequest, match="context of 100"):
            llm.generate([[1] * 100])
        with pytest.raises(InvalidRequest, match="context of 100"):
            llm.logits([1] * 101)
        assert llm.logits([1] * 100).shape == (100, 271)


def test_a_small_memory_is_planned_for(folder: Path) -> None:
    with LLM(folder, device="cpu", threads=1, memory="256MiB") as llm:
        parts = llm._loop._core.memory()
        taken = parts["weight_bytes"] + parts["workspace_bytes"]
        memory = taken + llm._loop._core.kv_bytes_for(256) * 3 // 2
    with LLM(folder, device="cpu", threads=1, memory=memory) as llm:
        fits = llm._limits.kv_tokens
        assert 256 <= fits < 512
        with pytest.raises(CapacityError, match=f"hold {fits} tokens"):
            llm.generate("x", greedy(fits))
        answers = llm.generate([[1] * 100] * 5, greedy(60))  # more than fit at once
        assert [len(a.token_ids) for a in answers] == [60] * 5
        assert len({tuple(a.token_ids) for a in answers}) == 1
        assert_nothing_left(llm)
    with pytest.raises(CapacityError, match=r"memory= allows 10\.0 KiB"):
        LLM(folder, device="cpu", memory="10KiB")


@pytest.mark.parametrize("memory", [None, "1TiB"])
def test_weights_beyond_the_machine_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory: str | None
) -> None:
    monkeypatch.setattr(
        "camelid._core.Engine.available_bytes", lambda core: 520_000 + core.workspace_bytes()
    )
    with pytest.raises(CapacityError, match=r'still take.*weights="int8" takes .* would fit'):
        LLM(folder, device="cpu", memory=memory)


def test_the_plan_knows_every_byte_of_the_weights(tmp_path: Path) -> None:
    from camelid.checkpoint import Checkpoint
    from camelid.report import inspect

    write_checkpoint(tmp_path / "f32", config_overrides=VOCAB)
    write_checkpoint(tmp_path / "int4", quantization=Quantization(bits=4, group_size=32))
    for name in ("f32", "int4"):
        for weights, head in product(("auto", "bf16", "int8", "int4"), ("stored", "int8")):
            with Checkpoint.open(tmp_path / name) as checkpoint:
                planned = inspect(checkpoint, weights=weights, head=head).loaded_bytes
            with LLM(tmp_path / name, threads=1, weights=weights, head=head) as llm:
                assert llm._loop._core.memory()["weight_bytes"] == planned, (name, weights, head)


def test_weights_can_be_made_smaller_on_the_way_in(folder: Path) -> None:
    with LLM(folder, device="cpu", threads=1) as exact:
        wanted = exact.logits([BOS, *b"some text"])
    for weights, tolerance in (("bf16", 0.1), ("int8", 0.1), ("int4", 1.0)):
        with LLM(folder, device="cpu", threads=1, weights=weights) as llm:
            error = np.abs(llm.logits([BOS, *b"some text"]) - wanted).mean() / wanted.std()
        assert 0 < error < tolerance, weights


def test_closing_frees_and_refuses(folder: Path) -> None:
    llm = LLM(folder, device="cpu", threads=1)
    stream = llm.stream("x", greedy(3000))
    next(stream)
    loop = weakref.ref(llm._loop)
    llm.close()
    llm.close()
    with pytest.raises(Cancelled):
        list(stream)
    with pytest.raises(InvalidRequest, match="closed"):
        llm.generate("x")
    with pytest.raises(InvalidRequest, match="closed"):
        llm.logits([1])
    with pytest.raises(InvalidRequest, match="closed"):
        next(llm.stream("x"))
    del llm, stream
    gc.collect()
    assert loop() is None


def test_a_forgotten_model_frees_itself(folder: Path) -> None:
    llm = LLM(folder, device="cpu", threads=1)
    llm.generate("x", greedy(2))
    loop = weakref.ref(llm._loop)
    thread = llm._loop._thread
    assert thread is not None
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    gc.collect()
    assert loop() is None


def test_loading_refuses_before_reading_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        LLM(tmp_path / "nothing here")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(tmp_path)
    with pytest.raises(InvalidRequest, match="max_context"):
        LLM(folder, max_context=5000)
    with pytest.raises(InvalidRequest, match="model"):
        LLM(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="model"):
        LLM("")


def test_a_hub_id_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unsupported, match=r"camelid\[hub\]"):
        LLM("meta-llama/Llama-4-Scout-17B-16E-Instruct")


def test_a_model_larger_than_its_tokenizer_serves_every_id(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_overrides={"vocab_size": 320})
    with LLM(tmp_path, device="cpu", threads=1) as llm:
        (answer,) = llm.generate([[319]], greedy(50, logprobs=1))
        assert len(answer.token_ids) == 50  # ids beyond the tokenizer have no text, and do no harm


def test_a_tokenizer_larger_than_its_model_is_told_where_it_matters(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_overrides={"vocab_size": 258})
    with LLM(tmp_path, device="cpu", threads=1) as llm:
        assert len(llm.generate("bytes and BOS", greedy(3))[0].token_ids) == 3
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            llm.chat([{"role": "user", "content": "headers are beyond it"}])


def test_a_folder_without_a_tokenizer_serves_ids(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer=False, config_overrides=VOCAB)
    with LLM(tmp_path, device="cpu", threads=1) as llm:
        (answer,) = llm.generate([[1, 2]], greedy(5, logprobs=1))
        assert (answer.text, len(answer.token_ids)) == ("", 5)
        with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
            llm.generate("text")
        with pytest.raises(InvalidRequest, match="stop"):
            llm.generate([[1]], greedy(5, stop="x"))
        with pytest.raises(TokenizerError):
            llm.chat([{"role": "user", "content": "x"}])


def test_importing_camelid_is_cheap() -> None:
    code = (
        "import sys, camelid; camelid.__all__; dir(camelid)\n"
        "assert not {'numpy', 'tiktoken', 'jinja2', 'PIL', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in camelid.__all__:
        assert getattr(camelid, name) is not None


@pytest.mark.parametrize("how", ["generate", "stream", "logits"])
def test_ctrl_c_ends_cleanly(folder: Path, how: str) -> None:
    script = textwrap.dedent(f"""
        import signal, camelid
        # A shell's background jobs inherit an ignored SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        llm = camelid.LLM({str(folder)!r}, device="cpu", threads=1)
        params = camelid.SamplingParams(max_tokens=3900, ignore_eos=True)
        try:
            print("ready", flush=True)
            while True:
                if {how!r} == "generate":
                    llm.generate(["a", "b"], params)
                elif {how!r} == "logits":
                    llm.logits([1] * 4000)
                else:
                    list(llm.stream("a", params))
        except KeyboardInterrupt:
            llm.generate("a", camelid.SamplingParams(max_tokens=1))
            assert llm._loop._core.memory()["kv_used_bytes"] == 0
            print("interrupted", flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "interrupted\n", "")


def run_script(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    head = f"""
        import os, sys, camelid
        llm = camelid.LLM({str(folder)!r}, device="cpu", threads=2)
        params = camelid.SamplingParams(max_tokens=3900, ignore_eos=True)
        stream = llm.stream("a", params)
        next(stream)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "end", ["", "sys.exit(0)", "del llm", "llm.close()", "stream.close()", "del stream, llm"]
)
def test_the_interpreter_exits_in_the_middle_of_an_answer(folder: Path, end: str) -> None:
    done = run_script(folder, f"print('bye', flush=True)\n{end}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "bye\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused_and_exits(folder: Path) -> None:
    done = run_script(
        folder,
        """
        pid = os.fork()
        if pid == 0:
            try:
                next(stream)
            except camelid.Unsupported as error:
                assert "forked" in str(error)
            try:
                llm.generate("x")
            except camelid.Unsupported:
                llm.close()
                print("child", flush=True)
                sys.exit(0)  # runs destructors, which must not wait for threads that are not there
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print(len(list(stream)) > 0, flush=True)
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "child\nTrue\n", "")


def test_a_long_prefill_shows_a_bar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(folder, device="cpu", threads=1) as llm:
        looks: list[object] = []
        wait = llm._loop.wait

        def slow(events: Any, look: Any = None) -> Any:
            look()  # as after half a second without an event
            looks.append(look)
            return wait(events, look)

        llm._loop.wait = slow  # type: ignore[method-assign]
        with_bar = "".join(d.text for d in llm.stream([1] * 600, greedy(4), progress=True))
        assert looks
        assert "".join(d.text for d in llm.stream([1] * 600, greedy(4))) == with_bar
    assert capsys.readouterr().out == ""
