"""versus_llama_cpp.py on canned output: what is asked of each side, what is made of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

import versus_llama_cpp
from versus import machine, report
from versus.rows import INT4_BYTES, INT8_BYTES, Row, all_rows, work_per_token
from versus.sides import Camelid, NoAnswer, Peer

ROWS = all_rows(5)
OURS = Camelid("camelid", Path("m"), 2, "bf16", flags="--compute fast")
INT8 = Camelid("camelid, int8 KV", Path("m"), 2, "int8", only_deep=True, kv_bytes=1)
PEER = Peer("lc", Path("/x/llama-bench"), Path("m.gguf"), 2)
IK = Peer(
    "ik", Path("/y/llama-bench"), Path("m.gguf"), 2, has_depth=False, flags="-rtr 1",
    batched_flags="-rtr",
)  # fmt: skip
CONFIG = {
    "hidden_size": 5120, "head_dim": 128, "num_attention_heads": 40, "num_key_value_heads": 8,
    "num_local_experts": 16, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 4,
    "vocab_size": 32768,
}  # fmt: skip
TABLE = """
main: n_kv_max = 512, n_batch = 2048

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    16 |     32 |    8 |    384 |    0.412 |   310.72 |    0.823 |    77.80 |    1.235 |   155.52 |
"""


def options(command: list[str]) -> dict[str, str]:
    """Return flag -> value of a command of pairs."""
    return {flag: value for flag, value in pairwise(command) if flag[0] == "-"}


def test_each_side_is_asked_for_the_same() -> None:
    deep = ROWS["d4096"]
    (ours,) = OURS.commands(deep)
    (theirs,) = PEER.commands(deep)
    for flag, value in {"-p": "0", "-n": "64", "-d": "4096", "-r": "1", "-t": "2"}.items():
        assert options(ours)[flag] == options(theirs)[flag] == value
    assert options(ours)["--kv-cache"] == "bf16"
    assert options(ours)["--compute"] == "fast"
    (prompt,) = PEER.commands(ROWS["pp512"])
    assert (options(prompt)["-p"], options(prompt)["-n"]) == ("512", "0")
    assert "-d" not in prompt


def test_a_peer_without_depth_is_asked_another_way() -> None:
    (deep,) = IK.commands(ROWS["d4096"])
    assert options(deep)["-gp"] == "4096,64"
    assert (options(deep)["-p"], options(deep)["-n"], options(deep)["-rtr"]) == ("0", "0", "1")
    whole, first = IK.commands(ROWS["pp8192-second"])
    assert (options(whole)["-p"], options(first)["-p"]) == ("16384", "8192")
    outputs = [json.dumps([{"samples_ns": [ns]}]) for ns in (5_000_000_000, 1_000_000_000)]
    assert IK.speeds(ROWS["pp8192-second"], outputs) == [8192 / 4]


def test_a_batch_goes_to_the_program_beside() -> None:
    (command,) = IK.commands(ROWS["b8"])
    assert command[0] == "/y/llama-batched-bench"
    assert options(command)["-npl"] == "8"
    assert int(options(command)["-c"]) >= 8 * (16 + 32)
    assert command[-1] == "-rtr"
    assert IK.speeds(ROWS["b8"], [TABLE]) == [77.8]
    with pytest.raises(NoAnswer, match="one expert"):
        replace(IK, batches_one_token=True).commands(ROWS["b8"])
    with pytest.raises(NoAnswer, match="no row"):
        IK.speeds(ROWS["b32"], [TABLE])
    with pytest.raises(NoAnswer, match="no table"):
        IK.speeds(ROWS["b8"], [""])


def test_answers_are_read() -> None:
    row = ROWS["tg64"]
    ours = json.dumps({"rows": [{"test": "tg64", "tokens_per_second": [51.0, 49.5]}]})
    assert OURS.speeds(row, [ours]) == [51.0, 49.5]
    assert PEER.speeds(row, [json.dumps([{"samples_ts": [48.25]}])]) == [48.25]
    with pytest.raises(NoAnswer, match="instead of pp512"):
        OURS.speeds(ROWS["pp512"], [ours])
    with pytest.raises(NoAnswer, match="not JSON"):
        PEER.speeds(row, ["error: no such file"])


def test_the_second_cache_type_is_measured_at_depths_only() -> None:
    assert [key for key, row in ROWS.items() if INT8.runs(row)] == ["d4096", "d32768", "d36000"]
    assert all(OURS.runs(row) for row in ROWS.values())


def test_a_side_that_reads_a_depth_for_each_run_measures_fewer() -> None:
    n_runs_of = {"tg64": 1, "pp8192-second": 1, "d4096": 1, "d32768": 2, "d36000": 2}
    for key, n_runs in n_runs_of.items():
        row = ROWS[key]
        assert IK.repeats(row) == n_runs
        assert {options(command)["-r"] for command in IK.commands(row)} == {str(n_runs)}
        assert PEER.repeats(row) == OURS.repeats(row) == row.n_repeats
        assert options(PEER.commands(row)[0])["-r"] == str(row.n_repeats)
    deep = ROWS["d36000"]
    assert (OURS.readings(deep), PEER.readings(deep), IK.readings(deep)) == (1, 1, 2)
    assert OURS.readings(ROWS["pp8192-second"]) == 2
    expected = versus_llama_cpp.expected_seconds
    assert expected(IK, deep) - expected(replace(IK, has_depth=True), deep) > 100


def test_least_work_of_scout() -> None:
    attention, expert = 5120 * 128 * 96, 3 * 5120 * 8192
    head = 5120 * 32768
    work = work_per_token(CONFIG, Row("one", 0, 2))  # sees one token on average
    weights = 4 * (attention + 2 * expert)
    kv = 4 * 2 * 8 * 128 * 2
    assert work.bytes_read == pytest.approx(weights * INT4_BYTES + head * INT8_BYTES + kv)
    assert work.operations == pytest.approx(2 * (weights + head) + 4 * 4 * 40 * 128)
    # At 32768 local layers begin a chunk; the global one sees everything.
    deep = work_per_token(CONFIG, Row("deep", 0, 2, depth=32768), kv_bytes=1)
    assert deep.bytes_read - work.bytes_read == pytest.approx(2 * 8 * 128 * 32769 - kv + 3 * kv / 8)
    # In the middle of a chunk local layers see its first part again.
    middle = work_per_token(CONFIG, Row("middle", 0, 2, depth=36000), kv_bytes=1)
    assert middle.bytes_read - deep.bytes_read == pytest.approx(2 * 8 * 128 * 3232 * 4)
    # Eight tokens read the attention once and 6.45 experts of 16 instead of 8.
    batch = work_per_token(CONFIG, Row("batch", 0, 2, n_batch=8))
    assert (batch.bytes_read - kv) * 8 == pytest.approx(
        4 * (attention + expert * (1 + 16 * (1 - (15 / 16) ** 8))) * INT4_BYTES + head * INT8_BYTES
    )


def canned_record() -> dict[str, Any]:
    rows = [ROWS["pp512"], ROWS["tg64"]]
    sides = (("camelid", True), ("lc", False), ("ik", False))
    runs = {
        ("pp512", "camelid"): [300.0, 200.0, 330.0],
        ("pp512", "lc"): [150.0, 50.0, 160.0],
        ("tg64", "camelid"): [50.0, 52.0],
        ("tg64", "lc"): [40.0],
        ("tg64", "ik"): [],
    }
    return {
        "date": "2026-01-01",
        "version": "0",
        "model": "4 layers",
        "config": CONFIG,
        "machine": {
            "cpu": "x", "threads": 2,
            "peaks": {"measured_by": "y", "read_gb_s": 40.0, "int8_gop_s": 1000.0},
        },
        "sides": [
            {"name": name, "is_camelid": ours, "program": name, "kv_bytes": 2.0}
            for name, ours in sides
        ],
        "row_sizes": {row.name: asdict(row) for row in rows},
        "rows": [
            {"row": row, "side": side, "runs": found, "failed": None if found else "it broke"}
            for (row, side), found in runs.items()
        ],
    }  # fmt: skip


def test_ratio_table() -> None:
    record = canned_record()
    for found in record["rows"]:  # each run a turn
        around = {"read_gb_s": [40.0, 40.0], "int8_gop_s": [1000.0, 1000.0]}
        found["peaks"] = [around for _ in found["runs"]]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.ratio_table(record).splitlines()
    ]
    assert lines[0] == ["row", "side", "tokens/s", "x lc", "x ik", "of the limit", "bound by"]
    cells = {(line[0], line[1]): line[2:] for line in lines[2:]}
    # Of turns (2, 4, 2.06), not of medians; where the numbers of turns differ, of medians.
    assert cells["pp512", "camelid"][:3] == ["300.00", "2.06", ""]
    assert cells["pp512", "camelid"][4] == "int8 arithmetic"
    assert cells["tg64", "camelid"][:3] == ["51.00", f"{51 / 40:.2f}", ""]
    assert cells["tg64", "lc"][1:3] == ["", ""]
    assert ("tg64", "ik") not in cells
    work = work_per_token(CONFIG, ROWS["tg64"])
    assert cells["tg64", "camelid"][3:] == [f"{51 * work.bytes_read / 40e9:.0%}", "reading"]
    assert "tg64, ik: it broke" in report.markdown(record)


def test_without_an_arithmetic_peak_prompts_have_no_limit() -> None:
    record = canned_record()
    peaks = record["machine"]["peaks"]
    del peaks["int8_gop_s"]
    assert report.limit_speed(record, "pp512", 2, peaks) is None
    assert report.limit_speed(record, "tg64", 2, peaks) is not None
    assert report.of_limit(record, "pp512", "camelid") is None


def test_a_turn_is_held_against_the_peaks_around_it() -> None:
    record = canned_record()
    bytes_read = work_per_token(CONFIG, ROWS["tg64"]).bytes_read
    (tg64,) = (one for one in record["rows"] if (one["row"], one["side"]) == ("tg64", "camelid"))

    def of_limit() -> tuple[float, str]:
        found = report.of_limit(record, "tg64", "camelid")
        assert found is not None
        return found

    # A record from before there were peaks of turns.
    assert of_limit()[0] == pytest.approx(51 * bytes_read / 40e9)
    assert "of one moment" in report.markdown(record)
    # Three turns of two runs, at means of 40, 80 and 50 GB/s.
    tg64["runs"] = [50.0, 52.0, 80.0, 88.0, 40.0, 44.0]
    tg64["peaks"] = [
        {"read_gb_s": pair, "int8_gop_s": [9000.0, 9000.0]}
        for pair in ([30.0, 50.0], [50.0, 110.0], [60.0, 40.0])
    ]
    parts = [51 / 40, 84 / 80, 42 / 50]
    assert of_limit()[0] == pytest.approx(sorted(parts)[1] * bytes_read / 1e9)
    assert of_limit()[1] == "reading"
    text = report.markdown(record)
    assert "read_gb_s 30.0 to 110.0, int8_gop_s 9000.0 to 9000.0" in text
    assert "of one moment" not in text
    # The turns' peaks bound it by arithmetic, whatever those of the start say.
    for peaks in tg64["peaks"]:
        peaks["int8_gop_s"] = [1.0, 3.0]
    work = work_per_token(CONFIG, ROWS["tg64"])
    assert of_limit()[0] == pytest.approx(51 * work.operations / 2e9)
    assert of_limit()[1] == "int8 arithmetic"


def test_peaks_after_a_turn_are_those_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_turn(side: Camelid | Peer, row: Row) -> list[float]:
        if side is IK and row.key == "pp512":
            raise NoAnswer("it broke")
        return [100.0] * side.repeats(row)

    readings = count()
    monkeypatch.setattr(versus_llama_cpp, "run_turn", run_turn)
    rows = [replace(ROWS["pp512"], n_turns=2), replace(ROWS["tg64"], n_turns=1)]
    found = list(
        versus_llama_cpp.measure([OURS, IK], rows, lambda: {"read_gb_s": float(next(readings))})
    )
    pairs = {
        (one["row"], one["side"]): [peaks["read_gb_s"] for peaks in one["peaks"]]
        for row in found
        for one in row
    }
    assert pairs == {
        ("pp512", "camelid"): [[0, 1], [2, 3]],
        ("pp512", "ik"): [[1, 2]],  # failed, and was not asked again
        ("tg64", "camelid"): [[3, 4]],
        ("tg64", "ik"): [[4, 5]],
    }
    assert next(readings) == 6


def test_between_turns_only_the_peaks_of_limits_are_measured(tmp_path: Path) -> None:
    entries = [
        {"name": "peak_read/2/real_time", "GB/s": 41.0},
        {"name": "peak_vnni512/2/real_time", "GOP/s": 900.0},
    ]
    program = tmp_path / "camelid_benchmarks"
    said = tmp_path / "said"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(said)!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        f"print({json.dumps({'benchmarks': entries})!r})\n"
    )
    program.chmod(0o755)
    start = {
        "measured_by": "x", "read_gb_s": 40.0, "fma512_gop_s": 2000.0, "int8_gop_s": 900.0,
        "maddubs256_gop_s": 500.0, "vnni256_gop_s": 600.0, "vnni512_gop_s": 900.0,
    }  # fmt: skip
    assert machine.gauge(2, program, start) == {"read_gb_s": 41.0, "int8_gop_s": 900.0}
    assert "--benchmark_filter=^peak_(read|vnni512)/2/ " in said.read_text()
    assert "--threads=2" in said.read_text()
    machine.gauge(2, program, {"read_gb_s": 40.0})  # a machine without integer loops
    assert "--benchmark_filter=^peak_(read)/2/ " in said.read_text()


def test_peaks_are_the_best_of_all_thread_counts() -> None:
    names = {"peak_read/1": 30.0, "peak_read/2": 41.0}
    entries = [{"name": f"{name}/real_time", "GB/s": value} for name, value in names.items()]
    entries += [{"name": "peak_vnni512/2/real_time", "GOP/s": 900.0}]
    entries += [{"name": "peak_maddubs256/2/real_time", "GOP/s": 500.0}]
    entries += [{"name": "peak_fma512/2/real_time", "GOP/s": 2000.0}]
    peaks = machine.parse_peaks({"benchmarks": entries})
    assert peaks["read_gb_s"] == 41.0
    assert peaks["int8_gop_s"] == 900.0
    assert peaks["fma512_gop_s"] == 2000.0
