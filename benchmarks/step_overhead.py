"""Measure what a decode step costs outside kernels, and its share of MODEL's step.

    python benchmarks/step_overhead.py MODEL
    python benchmarks/step_overhead.py MODEL -t 2 -r 5 --note ours

The overhead is the step of a model with MODEL's layers, experts, heads and vocabulary, and rows so
short that kernels take almost no time. Both models run twice: through the engine alone, as `camelid
bench`, and through `LLM.generate` with its queue, scheduler, sampling and text. They take turns.
Prints a table and writes it, with every run, to benchmarks/results.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice, product
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

import camelid
import records
from camelid import layout
from camelid.bench import Case
from camelid.bench import measure as measure_cases
from camelid.checkpoint import Checkpoint
from camelid.config import ModelConfig
from camelid.loading import load
from camelid.options import LoadOptions
from camelid.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from make_slice import write_folder  # noqa: E402

# Rows of one or two vectors of 16 floats, the least that kernels do without a remainder.
TINY = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32, "intermediate_size_mlp": 32}
# MODEL's steps are long: fewer of them make as steady a mean.
N_TINY_TOKENS, N_MODEL_TOKENS = 256, 64
N_SPECIAL = 2048  # ids that follow a tokenizer.model's own
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
PATHS = {"engine": "engine, as `camelid bench`", "generate": "`LLM.generate`"}
Step = Callable[[int], float]  # tokens -> seconds of one step


# ---- the tiny model ----
def tiny_config(data: dict[str, Any]) -> dict[str, Any]:
    """Return MODEL's config.json with tiny dimensions, text alone, nothing quantised."""
    text = {**data, **data.get("text_config", {})}
    for key in ("text_config", "vision_config", "quantization_config"):
        text.pop(key, None)
    return text | TINY | {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}


def write_tiny(model: Path, folder: Path, vocab_size: int) -> None:
    """Write a folder like MODEL's with weights of tiny dimensions and any values.

    (Stacks of plain experts, which make_slice takes for norms, are ones: no time depends on it.)
    """
    data = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_folder(folder, tiny_config(data), lambda n_bytes: None)
    found = [model / name for name in TOKENIZER_FILES if (model / name).exists()]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if not found:
        write_tokenizer(folder / "tokenizer.model", vocab_size)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer of every byte, then pairs and triples, so that answers have a text."""
    tokens = chain.from_iterable(product(range(256), repeat=n) for n in (1, 2, 3))
    n_tokens = max(256, vocab_size - N_SPECIAL)
    lines = [
        f"{b64encode(bytes(token)).decode()} {rank}\n"
        for rank, token in enumerate(islice(tokens, n_tokens))
    ]
    path.write_text("".join(lines), encoding="ascii")


def load_options(checkpoint: Checkpoint, threads: int) -> tuple[LoadOptions, LoadOptions]:
    """Return how MODEL is loaded, and how the tiny one is to run through the same code.

    "auto" would compute exactly what is small, and the tiny weights are stored in bf16.
    """
    ours = LoadOptions.parse(device="cpu", threads=threads)
    plan = asdict(make_plan(checkpoint, ours)) | {"weights": stored_as(checkpoint.config)}
    del plan["step_tokens"]  # nobody's to choose
    return ours, LoadOptions.parse(device="cpu", threads=threads, **plan)


def stored_as(config: ModelConfig) -> str:
    """Return the `weights=` that makes of plain weights what MODEL's last layer holds."""
    linears = layout.layer_linears(config, config.n_layers - 1, with_experts=True)
    names = [linear.name for linear in linears]
    schemes = [config.quantization.scheme_for(name) for name in names if config.quantization]
    bits = [scheme.bits for scheme in schemes if scheme is not None]
    return f"int{min(bits)}" if bits else "auto"


# ---- one step ----
@contextmanager
def engine_step(folder: Path, options: LoadOptions) -> Iterator[Step]:
    """Give seconds per step of the engine alone."""
    with Checkpoint.open(folder) as checkpoint:
        loaded = load(checkpoint, options, max_step_tokens=512)

    def step(n_tokens: int) -> float:
        case = Case(0, n_tokens)
        (row,) = measure_cases(loaded.core, loaded.config.vocab_size, [case], repeats=1)
        return 1 / row.median

    yield step


@contextmanager
def generate_step(folder: Path, options: LoadOptions) -> Iterator[Step]:
    """Give seconds per token of LLM.generate; the prompt of one token is one of the steps."""
    with camelid.LLM(folder, **asdict(options)) as llm:

        def step(n_tokens: int) -> float:
            params = camelid.SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
            started = time.perf_counter()
            (answer,) = llm.generate({"prompt_token_ids": [1]}, params)
            seconds = time.perf_counter() - started
            assert len(answer.token_ids) == n_tokens
            return seconds / n_tokens

        step(8)  # the first answer starts the engine's thread
        yield step


def measure(
    path: str,
    folders: tuple[Path, Path],
    options: tuple[LoadOptions, LoadOptions],
    n_runs: int,
    progress: Callable[[], object],
) -> dict[str, Any]:
    """Run MODEL and the tiny one in turns on one path; return the microseconds of their steps."""
    result: dict[str, Any] = {"path": path, "overhead_us": [], "step_us": []}
    enter = {"engine": engine_step, "generate": generate_step}[path]
    with enter(folders[0], options[0]) as model, enter(folders[1], options[1]) as tiny:
        for _ in range(n_runs):
            result["overhead_us"].append(tiny(N_TINY_TOKENS) * 1e6)
            result["step_us"].append(model(N_MODEL_TOKENS) * 1e6)
            progress()
    return result


# ---- what is made of it ----
def overhead_table(record: dict[str, Any]) -> str:
    """Return a Markdown table: medians, and the median share of a turn."""
    lines = [["", "overhead, us per step", "step, us", "share"]]
    for row in record["rows"]:
        share = median(a / b for a, b in zip(row["overhead_us"], row["step_us"], strict=True))
        sizes = [f"{median(row['overhead_us']):.1f}", f"{median(row['step_us']):.0f}"]
        lines.append([PATHS[row["path"]], *sizes, f"{share:.2%}"])
    return records.table(lines)


def markdown(record: dict[str, Any]) -> str:
    """Return the report."""
    machine = record["machine"]
    return "\n".join(
        [
            f"# {record['date']}: a decode step outside kernels, camelid {record['version']}",
            "",
            f"{machine['cpu']}, {machine['threads']} threads. Model: {record['model']}; "
            f"{record['how']}. {len(record['rows'][0]['step_us'])} turns.",
            "",
            overhead_table(record),
            "",
            "The overhead is the step of a model with as many layers of each kind, experts, heads "
            f"and tokens in its vocabulary, but rows of {TINY['hidden_size']}. Sampling is in it, "
            "and what is left of the kernels. What products cost that threads share, handing them "
            "out and waiting for the last, is not: the engine does not share such small ones. "
            f"MODEL's steps are those of tg{N_MODEL_TOKENS}, the tiny model's of "
            f"tg{N_TINY_TOKENS}; the share is the median over turns.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    args = records.arguments(__doc__, argv)
    with Checkpoint.open(args.model) as checkpoint:
        config, options = checkpoint.config, load_options(checkpoint, args.threads)
    with tempfile.TemporaryDirectory(prefix="camelid-tiny-") as parent:
        tiny = Path(parent) / "tiny"
        write_tiny(args.model, tiny, config.vocab_size)
        with tqdm(total=len(PATHS) * args.n_runs, desc="measuring") as bar:
            rows = [
                measure(path, (args.model, tiny), options, args.n_runs, bar.update)
                for path in PATHS
            ]
    how = {key: value for key, value in asdict(options[1]).items() if isinstance(value, str)}
    record = records.head("step_overhead", args.threads) | {
        "model": f"{config.n_layers} layers, {config.n_experts} experts, {config.n_heads} heads, "
        f"width {config.dim}, vocabulary {config.vocab_size}",
        "how": ", ".join(f"{key} {value}" for key, value in how.items()),
        "rows": rows,
    }
    print(overhead_table(record))
    path = records.write(record, markdown(record), args.out, args.note)
    print(f"[step_overhead] wrote {path}.json and .md")


if __name__ == "__main__":
    main()
