"""The command line: what each command prints and returns, and how it ends when told to."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import camelid
from camelid.bench import Case, cases, measure
from camelid.cli import main
from camelid.commands.chat import Conversation
from camelid.report import KvReport
from checkpoints import write_checkpoint
from fake_core import VOCAB, FakeCore

DEMO = str(camelid.demo_model_path())
CPU = ["--device", "cpu", "--threads", "1", "--memory", "256MiB"]
SHORT = ["--max-tokens", "12", "--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, seed=1, dtype="BF16", config_overrides={"vocab_size": 271})
    return str(made)


def test_run_prints_the_answer_and_its_speed(folder: str, capsys: Any) -> None:
    assert main(["run", folder, "hello", *SHORT, *CPU]) == 0
    out, err = capsys.readouterr()
    with camelid.LLM(folder, device="cpu", threads=1) as llm:
        params = camelid.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        wanted = llm.chat([{"role": "user", "content": "hello"}], params)
    assert out == wanted.text + ("" if wanted.text.endswith("\n") else "\n")
    assert "tokens/s" in err


def test_run_reads_stdin_and_continues_raw_text(
    folder: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert main(["run", folder, "-", "--raw", "--json", *SHORT, *CPU]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["usage"] == {
        "prompt_tokens": len("from a pipe") + 1, "completion_tokens": 12,
        "total_tokens": len("from a pipe") + 13,
    }  # fmt: skip
    assert record["finish_reason"] == "length"
    assert len(record["token_ids"]) == 12


def test_run_takes_a_system_message(folder: str, capsys: Any) -> None:
    assert main(["run", folder, "x", "--system", "Be brief.", "--json", *SHORT, *CPU]) == 0
    with_system = json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"]
    assert main(["run", folder, "x", "--json", *SHORT, *CPU]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"] < with_system
    assert main(["run", folder, "x", "--system", "y", "--raw", *CPU]) == 1


def chat(folder: str, lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", folder, *SHORT, *CPU, *flags])


def test_chat_answers_line_by_line(
    folder: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    answer = Conversation._answer

    def spy(self: Conversation, message: str) -> None:
        answer(self, message)
        seen.append((self._system, list(self._messages), self._params.temperature))

    monkeypatch.setattr(Conversation, "_answer", spy)
    lines = (
        'hello\n"""two\nlines"""\n/clear\n\n/system Be kind.\n/set temperature 0.5\nagain\n'
        "/set\n/set colour blue\n/set temperature hot\n/set temperature -1\n/nonsense\n/help\n"
        "/bye\nnever read\n"
    )
    assert chat(folder, lines, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert len(seen) == 3
    assert [m["content"] for m in seen[1][1] if m["role"] == "user"] == ["hello", "two\nlines"]
    assert seen[2][0] == "Be kind."
    assert len(seen[2][1]) == 2
    assert seen[2][2] == 0.5
    assert "temperature 0.5" in err
    for complaint in ("nothing is called colour", "is hot, expected a number", "temperature is -1"):
        assert complaint in err
    assert "no command /nonsense" in err
    assert out


def test_chat_ends_with_its_input(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(folder, "hello", monkeypatch) == 0
    assert chat(folder, "", monkeypatch) == 0


def test_chat_goes_on_after_an_error(
    folder: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(folder, "x" * 500 + "\nshort\n", monkeypatch, "--max-context", "200") == 0
    out, err = capsys.readouterr()
    assert "context of 200" in err
    assert out.strip()


def test_quantize_inspect_and_run_the_result(folder: str, tmp_path: Path, capsys: Any) -> None:
    small = str(tmp_path / "small")
    assert main(["quantize", folder, small, "--group-size", "32", "--threads", "1"]) == 0
    assert "are int4" in capsys.readouterr().out
    assert main(["inspect", small, "--memory", "1GiB"]) == 0
    assert "stored as" in capsys.readouterr().out
    assert main(["run", small, "hello", "--raw", *SHORT, *CPU]) == 0
    assert main(["quantize", folder, small]) == 1
    assert capsys.readouterr().err.count("\n") <= 2


def test_quantize_takes_a_tower_along_when_asked(tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path / "m", vision=True)
    sizes = []
    for flags in ([], ["--vision"]):
        target = str(tmp_path / "-".join(["small", *flags]))
        assert main(["quantize", str(tmp_path / "m"), target, "--group-size", "16", *flags]) == 0
        assert "are int4" in capsys.readouterr().out
        assert main(["inspect", target, "--json", "--memory", "1GiB"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["parts"]["vision"]["loaded_bytes"])
    assert sizes[1] < sizes[0] / 2


def test_inspect_counts_what_the_demo_model_weighs(capsys: Any) -> None:
    assert main(["inspect", DEMO, "--json", "--memory", "64MiB"]) == 0
    record = json.loads(capsys.readouterr().out)
    files = sum(path.stat().st_size for path in Path(DEMO).glob("*.safetensors"))
    assert 0 <= files - record["stored_bytes"] < 1 << 20  # headers
    assert record["n_parameters"] == sum(p["n_parameters"] for p in record["parts"].values())
    assert record["loaded_bytes"] == sum(p["loaded_bytes"] for p in record["parts"].values())
    config = json.loads((Path(DEMO) / "config.json").read_text())["text_config"]
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    n_growing = config["no_rope_layers"].count(0)
    assert record["kv_cache"]["bf16"]["bytes_per_token"] == per_layer * n_growing
    n_chunked = config["num_hidden_layers"] - n_growing
    chunk = config["attention_chunk_size"]
    assert record["kv_cache"]["bf16"]["chunk_bytes"] == per_layer * n_chunked * chunk
    assert record["kv_cache"]["f32"]["bytes_per_token"] == 2 * per_layer * n_growing
    routed = record["parts"]["routed experts"]["n_parameters"]
    idle = routed - routed * config["num_experts_per_tok"] // config["num_local_experts"]
    tower = record["parts"]["vision"]["n_parameters"]  # works on images alone
    assert record["active_parameters"] == record["n_parameters"] - idle - tower
    assert record["fits"]
    assert main(["inspect", DEMO, "--memory", "1KiB"]) == 0
    assert "do not fit" in capsys.readouterr().out


def test_the_kv_arithmetic_is_the_engines(folder: str) -> None:
    from camelid.checkpoint import Checkpoint
    from camelid.report import inspect

    with Checkpoint.open(folder) as checkpoint:
        report = inspect(checkpoint)
    for name in ("f32", "bf16", "int8"):
        with camelid.LLM(folder, device="cpu", threads=1, kv_cache=name) as llm:
            core = llm._loop._core
            for n_tokens in (1, 16, 64, 65, 1000):
                assert report.kv[name].bytes_for(n_tokens) == core.kv_bytes_for(n_tokens)
            for n_bytes in (0, 100_000, 1 << 24):
                assert report.kv[name].tokens_in(n_bytes) == core.kv_tokens_in(n_bytes)


def test_scouts_cache_is_what_the_design_says() -> None:
    # 12 of 48 layers grow: 48 KiB a token in bf16; the others hold 8192 tokens at most.
    scout = KvReport(12 * 2 * 8 * 128 * 2, 36 * 2 * 8 * 128 * 2 * 8192, 8192)
    assert scout.bytes_per_token == 48 << 10
    assert scout.bytes_for(10 << 20) == (10 << 20) * (48 << 10) + scout.chunk_bytes
    assert scout.tokens_in(scout.bytes_for(100_032)) == 100_032


def test_bench_names_rows_as_llama_bench_does(folder: str, capsys: Any) -> None:
    names = [case.name for case in cases([512, 0], [128], [0, 4096], [1, 8])]
    assert names == [
        "pp512", "pp512 @ d4096", "tg128", "tg128 @ b8", "tg128 @ d4096", "tg128 @ d4096 @ b8",
    ]  # fmt: skip
    assert Case(0, 128).n_context(6) == 129
    sizes = ["-p", "20", "-n", "3", "-d", "0,30", "-b", "1,2", "-r", "2"]
    assert main(["bench", folder, *sizes, "--json", *CPU]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in record["rows"]] == [
        "pp20", "pp20 @ d30", "tg3", "tg3 @ b2", "tg3 @ d30", "tg3 @ d30 @ b2",
    ]  # fmt: skip
    assert all(len(row["tokens_per_second"]) == 2 for row in record["rows"])
    assert all(min(row["tokens_per_second"]) > 0 for row in record["rows"])
    assert main(["bench", folder, "-p", "4", "-n", "2", "-r", "1", "-t", "1", *CPU[:2]]) == 0
    assert "tg2" in capsys.readouterr().out
    wrongs = (
        ["-r", "0"], ["-p", "x"], ["-p", "1.5"], ["-b", "0"], ["-b", "0", "-n", "0"],
        ["-p", "0", "-n", "0"], ["--max-context", "16"], ["-d", "99999999999"],
        ["-d", "99999999999999999999"],
    )  # fmt: skip
    for wrong in wrongs:
        assert main(["bench", folder, *wrong, *CPU]) == 1
        assert wrong[0] in capsys.readouterr().err
    twice = ["-p", "0", "-n", "2", "-d", "0,0", "-r", "1", "--json"]
    assert main(["bench", folder, *twice, *CPU]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1


def test_bench_reads_a_long_depth_once() -> None:
    case = Case(0, 4, depth=100, n_batch=2)
    assert case.runs_per_context(3) == 3
    assert case.n_context(3) == 112
    assert case.runs_per_context(4) == 1  # 16 tokens more would be over an eighth
    assert Case(8, 0, depth=100).runs_per_context(3) == 1

    core = FakeCore()
    (row,) = measure(core, VOCAB, [case], repeats=2)  # type: ignore[arg-type]
    assert len(row.tokens_per_second) == 2
    assert core.sequences == {}  # all closed
    read = [step for step in core.steps if step[0][1] > 1]
    assert [step[0][1:] for step in read] == [(100, 1), (100, 1)]
    written = core.steps[len(read) :]
    assert len(written) == 12
    assert all([entry[1:] for entry in step] == [(1, 1), (1, 1)] for step in written)


def test_bench_goes_on_with_what_was_sampled_if_asked_to() -> None:
    core = FakeCore()
    fed: list[list[int]] = []
    core.before_step = lambda pieces: fed.append(pieces[0])  # type: ignore[method-assign]
    list(measure(core, VOCAB, [Case(0, 3, depth=30)], repeats=0, feeds_back=True))  # type: ignore[arg-type]
    assert [len(piece) for piece in fed] == [30, 1, 1, 1]
    history = [*fed[0], *fed[1]]
    for piece in fed[2:]:
        assert piece == [core.says(history)]
        history += piece


def test_bench_reads_a_prompt_in_steps_of_the_size_it_was_told(folder: str, capsys: Any) -> None:
    core = FakeCore()
    list(measure(core, VOCAB, [Case(20, 0)], repeats=0, step_tokens=8))  # type: ignore[arg-type]
    assert [step[0][1:] for step in core.steps] == [(8, 0), (8, 0), (4, 1)]
    assert (
        main(["bench", folder, "-p", "20", "-n", "0", "-r", "1", "-ub", "8", "--json", *CPU]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["step_tokens"] == 8
    assert record["kv_limit_bytes"] > 0


def test_the_demo_answers_about_a_text_it_never_saw(capsys: Any) -> None:
    assert main(["demo", "--seed", "3", "--tokens", "200", *CPU[:4]]) == 0
    first = capsys.readouterr()
    assert "Question: " in first.out
    assert "Right." in first.out or "Wrong." in first.out
    assert "--seed 3" in first.err
    assert main(["demo", "--seed", "3", "--tokens", "200", *CPU[:4]]) == 0
    assert capsys.readouterr().out == first.out
    assert main(["demo", "--tokens", "5"]) == 1


def test_errors_are_one_line_and_exit_with_one(folder: str, tmp_path: Path, capsys: Any) -> None:
    for arguments in (
        ["run", str(tmp_path / "none"), "x"],
        ["run", folder, "x", "--temperature", "-1"],
        ["run", folder, "x", "--memory", "1KiB", "--device", "cpu"],
        ["run", folder, "x", "--kv-cache", "fp8"],
        ["run", folder, "", "--raw"],
        ["inspect", str(tmp_path)],
        ["inspect", folder, "--memory", "lots"],
    ):
        assert main(arguments) == 1, arguments
        out, err = capsys.readouterr()
        assert out.strip() == ""
        assert err.startswith("camelid: [")
        assert err.count("\n") == 1
    with pytest.raises(camelid.CheckpointError):
        main(["inspect", str(tmp_path), "--debug"])


def test_wrong_command_lines_exit_with_two(capsys: Any) -> None:
    for arguments in ([], ["frobnicate"], ["run"], ["run", "m", "p", "--top-k", "x"], ["--nope"]):
        try:
            code: Any = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2, arguments
        assert capsys.readouterr().err
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    assert f"camelid {camelid.__version__}" in capsys.readouterr().out


def test_flags_take_their_defaults_from_the_environment(
    folder: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMELID_MAX_CONTEXT", "20")
    assert main(["run", folder, "x" * 30, "--raw", *CPU]) == 1
    assert "context of 20" in capsys.readouterr().err
    assert main(["run", folder, "x" * 30, "--raw", "--max-context", "64", *SHORT, *CPU]) == 0
    monkeypatch.setenv("CAMELID_THREADS", "many")
    with pytest.raises(SystemExit) as stopped:
        main(["run", folder, "x"])
    assert stopped.value.code == 2


def start(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    # A shell's background jobs inherit an ignored SIGINT, and so would the child.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from camelid.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


LONG = ["--max-tokens", "3900", "--ignore-eos", "--temperature", "0", *CPU]


def test_ctrl_c_stops_run(folder: str) -> None:
    with start(["run", folder, "go on", *LONG]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_ctrl_c_stops_the_answer_first_and_chat_second(folder: str) -> None:
    with start(["chat", folder, *LONG], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"go on\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(b"/set max_tokens 3\nonce more\n/bye\n", timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.count(b"\n") >= 2
    with start(["chat", folder, *CPU], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"/set\n")
        process.stdin.flush()
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"max_tokens")
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_closed_pipe_ends_quietly(folder: str) -> None:
    with start(["run", folder, "go on", *LONG]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(60) == 1
    assert err == b""


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from camelid.commands.common import paint

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with contextlib.redirect_stdout(Terminal()):
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert paint("x", "1") == "\x1b[1mx\x1b[0m"
        monkeypatch.setenv("NO_COLOR", "1")
        assert paint("x", "1") == "x"
    assert paint("x", "1") == "x"
