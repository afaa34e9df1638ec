"""Measure whole steps of a Scout-shaped model on a GPU, without the real file, beside their limits.

    python benchmarks/gpu_step.py --library build/gpu/libcamelid_gpu_check.so        # an H200
    python benchmarks/gpu_step.py --library ... --layers 40 --kv fp8                 # 80 GB
    python benchmarks/gpu_step.py --device cpu --shape tiny --context 48             # to try it

Weights are random (random_model.py), all else is the engine as it serves: pages, plans, sampling.
Decoding runs behind a context that was really read, and ends before the chunk does, where local
layers see most. What is sampled is fed back, since the engine starts a step before it is asked to;
it is sampled from 100 tokens, so that sequences differ, and choose different experts. Limits are of
limits.py, with the peaks that were measured on the same GPU just before.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import limits  # noqa: E402
import records  # noqa: E402
from limits import Work  # noqa: E402
from random_model import ALL_SHAPES, RandomModel, config_of, open_engine  # noqa: E402

if TYPE_CHECKING:
    from camelid import _core
    from camelid.config import ModelConfig

NOTHING, SAMPLE = 0, 1
N_WARM = 4  # steps, in which memory is taken and launches are recorded


@dataclass
class Row:
    """A kind of step, its work, and how long it took."""

    name: str
    kv: str
    n_tokens: int  # of a step, or of a prompt
    work: Work
    ms: list[float]  # of each, on the host's clock
    device_ms: list[float]  # the device's part of others just like them
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def waited_us(self) -> float:
        """How long the device waited for the host: before, between or behind its own work."""
        return 1000 * (median(self.ms) - median(self.device_ms))


# ---- steps ----
class Sequences:
    """Open sequences of one engine: prompts are random, answers go on with what was sampled."""

    def __init__(self, engine: _core.Engine, config: ModelConfig, n: int) -> None:
        from camelid import _core

        self._engine, self._config = engine, config
        self._rng = np.random.default_rng(0)
        self.ids = [
            engine.open_sequence(_core.SamplerParams(temperature=1.0, top_k=100, seed=i))
            for i in range(n)
        ]
        self._next = self._random(n)

    def close(self) -> None:
        for sequence in self.ids:
            self._engine.close_sequence(sequence)

    def read(self, sequence: int, n_tokens: int, piece: int, *, sample: bool = False) -> None:
        """Read a prompt in pieces; sample behind its last token, or nothing."""
        for first in range(0, n_tokens, piece):
            n = min(piece, n_tokens - first)
            last = sample and first + n == n_tokens
            self._step([sequence], self._random(n), SAMPLE if last else NOTHING)

    def write(self) -> None:
        """Run one token of every sequence, and sample behind each."""
        result = self._step(self.ids, self._next, SAMPLE)
        self._next = np.array([sampled.token for sampled in result.sampled], np.int32)

    def _random(self, n: int) -> NDArray[np.int32]:
        return self._rng.integers(0, self._config.vocab_size, n, np.int32)

    def _step(
        self, sequences: list[int], tokens: NDArray[np.int32], output: int
    ) -> _core.StepResult:
        n = len(sequences)
        return self._engine.step(
            np.array(sequences, np.int64),
            np.full(n, len(tokens) // n, np.int32),
            tokens,
            np.full(n, output, np.uint8),
        )


@contextmanager
def sequences(engine: _core.Engine, config: ModelConfig, n: int) -> Iterator[Sequences]:
    opened = Sequences(engine, config, n)
    try:
        yield opened
    finally:
        opened.close()


def wall_ms(run: Callable[[], None], n_runs: int) -> list[float]:
    times = []
    for _ in range(n_runs):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return times


def device_ms(engine: _core.Engine, run: Callable[[], None], n_runs: int) -> list[float]:
    """Return the device's part of each run, which may be several steps."""
    times = []
    for _ in range(n_runs):
        engine.start_timeline("steps")
        run()
        times.append(sum(us for _, us in engine.stop_timeline()) / 1000)
    return times


def timeline(engine: _core.Engine, run: Callable[[], None], n_runs: int) -> list[dict[str, Any]]:
    """Return what the device did in one run: names of calls, how many, and microseconds of all."""
    engine.start_timeline("calls")
    for _ in range(n_runs):
        run()
    found: dict[str, list[float]] = {}
    for name, us in engine.stop_timeline():
        found.setdefault(name, []).append(us)
    calls = [
        {"name": name, "calls": len(us) / n_runs, "us": median(us) * len(us) / n_runs}
        for name, us in found.items()
    ]
    return sorted(calls, key=lambda call: -call["us"])


# ---- what is measured ----
def measure_decode(
    engine: _core.Engine, config: ModelConfig, kv: str, wanted: int, args: argparse.Namespace
) -> Row | None:
    """Measure steps of `wanted` sequences, or of as many as there is memory for."""
    n_steps = N_WARM + 3 * args.runs + 2  # one that is started ahead, none in the next chunk
    before = max(1, args.context - n_steps)
    room = engine.memory()["kv_limit_bytes"] // engine.kv_bytes_for(before + n_steps)
    n = min(wanted, room)
    if n == 0:
        print(f"[gpu_step] no room for {args.context} tokens of {kv} KV: decoding is left out")
        return None
    name = f"decode, batch {n}, {args.context} tokens each"
    if n < wanted:
        name += f" ({wanted} wanted, no KV memory for more)"
    with sequences(engine, config, n) as running:
        for sequence in running.ids:
            running.read(sequence, before, args.piece)
        wall_ms(running.write, N_WARM)
        ms = wall_ms(running.write, args.runs)
        on_device = device_ms(engine, running.write, args.runs)
        calls = timeline(engine, running.write, args.runs) if args.timeline else []
    position = before + N_WARM + args.runs // 2
    work = limits.decode(config, n, position, kv)
    for call in calls:
        call["work"] = asdict(work_of_call(config, call, n, position, kv))
    return Row(name, kv, n, work, ms, on_device, calls)


def measure_prefill(
    engine: _core.Engine, config: ModelConfig, kv: str, piece: int, args: argparse.Namespace
) -> Row | None:
    """Measure the reading of a prompt by one sequence."""
    if engine.kv_bytes_for(args.context) > engine.memory()["kv_limit_bytes"]:
        return None

    def run() -> None:
        with sequences(engine, config, 1) as running:
            running.read(running.ids[0], args.context, piece, sample=True)

    n_runs = max(2, args.runs // 4)
    wall_ms(run, 2)
    ms, on_device = wall_ms(run, n_runs), device_ms(engine, run, n_runs)
    calls = timeline(engine, run, 1) if args.timeline else []
    for call in calls:
        call["work"] = asdict(Work())
    name = f"prefill, {args.context} tokens, {min(piece, args.context)} a step"
    work = limits.prefill(config, args.context, piece)
    return Row(name, kv, args.context, work, ms, on_device, calls)


def work_of_call(config: ModelConfig, call: dict[str, Any], n: int, position: int, kv: str) -> Work:
    """Return the work of all calls of a name in a step of decoding; none where it is too small."""
    name, n_calls = call["name"], call["calls"]
    if name == "experts":
        return limits.experts(config, n) * n_calls
    if name == "mlp":
        return limits.mlp(config, config.dense_dim, n) * n_calls
    if name.startswith("attend"):
        local = config.is_chunked_layer.index(True) if name.endswith("local") else None
        layer = config.is_chunked_layer.index(False) if local is None else local
        return limits.attention(config, layer, position, kv) * (n * n_calls)
    if name.startswith("project_kv"):
        return limits.qkv(config, n) * n_calls
    if name.startswith("matmul"):
        rows, inputs = (int(word) for word in name.split()[1::2])
        is_head = rows == config.vocab_size
        one = limits.head(config, n) if is_head else limits.matrix(rows, inputs, n)
        return one * n_calls
    return Work()


def fitting_layers(config: ModelConfig, memory_bytes: float) -> int:
    """Return how many layers, whole groups of local ones and a global one, leave a quarter free.

    All of them where nobody knows the memory; at least one group.
    """
    every = limits.experts(config, 1 << 20).n_bytes  # of all experts
    layer = every + limits.qkv(config, 1).n_bytes + limits.output(config, 1).n_bytes
    ends = limits.head(config, 1).n_bytes + 2 * config.vocab_size * config.dim
    fitting = int((0.75 * memory_bytes - ends) / layer) // 4 * 4
    return config.n_layers if not memory_bytes else min(config.n_layers, max(4, fitting))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, write it down row by row, and return the record."""
    record = records.gpu_head("gpu_step", {"gpu": args.device}) | {"peaks": dict(limits.NO_PEAKS)}
    if args.library:
        with records.kept_error(record, "peaks"):
            measure_peaks(record, args.library)
    machine = record["machine"]
    config = config_of(args.shape, args.layers)
    if args.layers is None:
        config = config_of(args.shape, fitting_layers(config, machine.get("memory_bytes", 0)))
    record["model"] = {"shape": args.shape, "n_layers": config.n_layers, "context": args.context}
    record |= {"memory": {"weight_bytes": 0}, "rows": []}
    note = "-".join(filter(None, (records.slug(machine["gpu"]), args.note)))
    path = records.new_path(record, args.out, note)
    for kv in args.kv:
        with records.kept_error(record, f"{kv} KV"):
            for row in measure_kv(record, config, kv, args):
                print(f"[gpu_step] {row.name}, {row.kv}: {median(row.ms):.3f} ms, "
                      f"{median(row.device_ms):.3f} of them the device's", flush=True)  # fmt: skip
                record["rows"].append(asdict(row))
                records.rewrite(record, markdown(record), path)
        gc.collect()  # the engine's memory
    records.rewrite(record, markdown(record), path)
    print(f"[gpu_step] wrote {path}.json and .md")
    return record


def measure_kv(
    record: dict[str, Any], config: ModelConfig, kv: str, args: argparse.Namespace
) -> Iterator[Row]:
    """Measure all kinds of steps with one format of keys and values."""
    started = time.perf_counter()
    engine = open_engine(RandomModel(config), device=args.device, kv_cache=kv,
                         max_step_tokens=max(args.piece, *args.pieces),
                         memory_bytes=args.memory, threads=args.threads)  # fmt: skip
    memory = record["memory"] = engine.memory()
    print(f"[gpu_step] {engine.describe()}: {config.n_layers} layers, "
          f"{memory['weight_bytes'] / 1e9:.2f} GB of weights packed in "
          f"{time.perf_counter() - started:.1f} s, {memory['kv_limit_bytes'] / 1e9:.2f} GB "
          f"for {kv} keys and values", flush=True)  # fmt: skip
    kinds = [(measure_decode, "decode", n) for n in args.batches]
    kinds += [(measure_prefill, "prefill", n) for n in args.pieces]
    for measure_one, name, n in kinds:
        row = None
        with records.kept_error(record, f"{name} {n}, {kv} KV"):
            row = measure_one(engine, config, kv, n, args)
        if row is not None:
            yield row


# ---- what is made of it ----
def limit_ms(work: dict[str, float], peaks: dict[str, Any]) -> float:
    return 1000 * Work(**work).seconds(peaks["read_gb_s"], peaks["bf16_tflop_s"])


def of(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if part and whole else ""


def step_table(record: dict[str, Any]) -> str:
    """Return a Markdown table of medians beside their limits."""
    lines = [["step", "KV", "GB", "TFLOP", "ms", "10 % to 90 %", "tokens/s", "limit, ms",
              "of limit", "device, ms", "device waits, us"]]  # fmt: skip
    for row in record["rows"]:
        ms, on_device = median(row["ms"]), median(row["device_ms"])
        low, high = np.quantile(row["ms"], (0.1, 0.9))
        work, limit = row["work"], limit_ms(row["work"], record["peaks"])
        lines.append(
            [row["name"], row["kv"], f"{work['n_bytes'] / 1e9:.2f}",
             f"{work['n_flops'] / 1e12:.2f}", f"{ms:.3f}", f"{low:.3f} to {high:.3f}",
             f"{1000 * row['n_tokens'] / ms:.1f}",
             f"{limit:.3f}", of(limit, ms), f"{on_device:.3f}", f"{1000 * (ms - on_device):.0f}"]
        )  # fmt: skip
    return records.table(lines)


def timeline_table(row: dict[str, Any], peaks: dict[str, Any]) -> str:
    """Return a Markdown table of one step's calls."""
    lines = [["call", "calls", "us of all", "of the step", "us of one", "limit, us", "of limit"]]
    total = sum(call["us"] for call in row["timeline"])
    for call in row["timeline"]:
        limit = 1000 * limit_ms(call["work"], peaks)
        lines.append(
            [call["name"], f"{call['calls']:g}", f"{call['us']:.1f}", f"{call['us'] / total:.1%}",
             f"{call['us'] / call['calls']:.2f}", f"{limit:.1f}" if limit else "",
             of(limit, call["us"])]
        )  # fmt: skip
    return records.table(lines)


def markdown(record: dict[str, Any]) -> str:
    """Return the report."""
    model, peaks = record["model"], record["peaks"]
    measured = (
        f"Measured in the same run: reading {peaks['read_gb_s']:.0f} GB/s, copying "
        f"{peaks['copy_gb_s']:.0f} GB/s (read plus written), a bf16 product of large matrices "
        f"{peaks['bf16_tflop_s']:.0f} TFLOP/s (by {peaks['bf16_measured_by']})."
    )
    parts = [
        f"# {record['date']}: steps on {record['machine']['gpu']}, camelid {record['version']}",
        f"{model['n_layers']} layers of {model['shape']}'s shape, random INT4 weights, INT8 head, "
        f"{record['memory']['weight_bytes'] / 1e9:.2f} GB. {measured}",
        step_table(record),
        "Medians. The limit is the larger of bytes over the read bandwidth and products over the "
        "bf16 peak (benchmarks/limits.py); experts as uniform routing hits them. The device's part "
        "runs from a step's first launch to its last, with the host far ahead; it waits for the "
        "rest, in which the host learns of logits, samples, and plans the next step.",
    ]
    for row in record["rows"]:
        if row["timeline"]:
            parts += [f"## {row['name']}, {row['kv']} KV", timeline_table(row, peaks)]
    if any(row["timeline"] for row in record["rows"]):
        parts.append("With an event between calls, so that no kernel begins before the one before "
                     "it ended: together they take longer than the step.")  # fmt: skip
    return "\n\n".join(filter(None, [*parts, records.failures(record)]))


def measure_peaks(record: dict[str, Any], library: Path) -> None:
    """Write down what the GPU is, and what it reads, copies and multiplies at most."""
    from gpu_dense import bf16_peak
    from gpu_kernels import memory_peaks
    from gpu_parts import Gpu, Model

    gpu, model = Gpu(library), Model()
    record["machine"] = gpu.info()
    record["peaks"] |= memory_peaks(gpu, model)
    record["peaks"] |= bf16_peak(gpu, model, record["machine"]["capability"])


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, help="what tools/gpu_check built, for the peaks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=ALL_SHAPES, default="scout")
    parser.add_argument("--layers", type=int, help="fewer than the shape's own, or than fit")
    parser.add_argument("--kv", type=lambda text: text.split(","), default=["bf16", "fp8"])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=8192, help="tokens (default 8192)")
    parser.add_argument("--pieces", type=numbers, default=[512, 4096, 8192],
                        help="tokens of a step of prefill (default 512,4096,8192)")  # fmt: skip
    parser.add_argument("--piece", type=int, default=4096, help="while the context is read")
    parser.add_argument("--runs", type=int, default=16, help="steps of each kind (default 16)")
    parser.add_argument("--timeline", action="store_true", help="also each call of a step")
    parser.add_argument("--memory", type=int, default=0, help="bytes (default: what is free)")
    parser.add_argument("--threads", type=int, default=0, help="that pack weights")
    records.add_note(parser)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the result")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        from camelid import _core
    except ImportError as error:
        sys.exit(f"[gpu_step] the engine is not there ({error}). tools/gpu_check builds it.")
    if args.device.startswith("cuda") and not _core.cuda_available():
        sys.exit(f"[gpu_step] {_core.__file__} sees no GPU, or was built without CUDA.")
    record = measure(args)
    print(step_table(record))
    records.exit_if_failed(record)


if __name__ == "__main__":
    main()
