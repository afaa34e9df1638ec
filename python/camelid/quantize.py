"""Writes a quantised copy of a checkpoint, in the compressed-tensors form other engines load too.

Owns which linears are quantised, the plan of output files, and the promise that a folder with the
final name is whole: everything is written to a sibling `DST.partial-*`, made durable, then renamed.
One linear is in memory at a time. The arithmetic is `_core.quantize`. Must never touch the source.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from camelid.checkpoint import OTHER_WEIGHTS, Checkpoint, account
from camelid.config import ModelConfig
from camelid.errors import CapacityError, CheckpointError, InvalidRequest, Unsupported
from camelid.json_file import read_json, shorten
from camelid.layout import (
    Linear,
    expert_linears,
    head_name,
    is_fused,
    layer_linears,
    layer_name,
    quantised_tensors,
    router_linear,
    vision_linears,
)
from camelid.quantization import Matcher, Scheme
from camelid.safetensors import (
    DTYPE_BYTES,
    SafetensorsWriter,
    TensorEntry,
    TensorSpec,
    disk_errors,
)
from camelid.sources import LinearSource, fused_expert, linear_source

__all__ = ["Progress", "QuantizeResult", "quantize"]

# Called with bytes of the source done, bytes in all, and the module or tensor just finished.
Progress: TypeAlias = Callable[[int, int, str], None]

# What llm-compressor and transformers use; hubs and file systems like it.
_MAX_SHARD_BYTES = 5_000_000_000
_COPY_BYTES = 16 << 20
# Small files beside the weights; also room for the file system's own needs.
_SLACK_BYTES = 64 << 20
_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class QuantizeResult:
    """What was written."""

    folder: Path
    n_quantised: int  # linears
    n_kept: int  # linears left as they were
    source_bytes: int  # of tensors
    written_bytes: int
    n_shards: int


@dataclass(frozen=True)
class _Output:
    """Tensors that are written together, and how."""

    name: str
    specs: tuple[TensorSpec, ...]
    write: Callable[[SafetensorsWriter], None]
    source_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class _Job:
    """One run: what to read, and how to quantise."""

    checkpoint: Checkpoint
    scheme: Scheme
    ignore: Matcher
    threads: int
    vision: bool

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    weights: str = "int4",
    group_size: int = 128,
    vision: bool = False,
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
    threads: int | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> QuantizeResult:
    """Write a quantised copy of the checkpoint in `src` to the new folder `dst`.

    Attention, experts, shared experts and dense layers are quantised, symmetric, from the values
    alone; embeddings, head, router and norms stay as they are, and the vision tower unless asked
    for.

    Args:
        src: Folder of an unquantised checkpoint; only read.
        dst: Folder to create; it appears when all is written and not before.
        weights: "int4" or "int8".
        group_size: Values along the input that share a scale; 0 for one scale per row.
        vision: Quantise the vision tower too, all but its patch embedding. llm-compressor's recipes
            leave towers plain, and some engines read no others.
        ignore: Further modules to leave alone: names, or `re:` patterns.
        progress: Called after every linear and copied tensor.
        threads: Threads to quantise with; None for all physical cores.
        max_shard_bytes: Bytes of tensors in one file, unless a single tensor is larger.

    Raises:
        InvalidRequest: If an option or `dst` is unusable, or `vision` meets no tower.
        CheckpointError: If `src` is damaged, or a linear does not divide into groups.
        CapacityError: If the disk is too small.
        Unsupported: If `src` is quantised already.
    """
    scheme = _scheme(weights, group_size)
    source, target = Path(os.path.realpath(src)), Path(os.path.realpath(dst))
    _check_target(source, target)
    with Checkpoint.open(source) as checkpoint:
        if checkpoint.config.quantization is not None:
            raise Unsupported(
                f"[quantize] {source} is quantised already (compressed-tensors). Start from the "
                "BF16 checkpoint."
            )
        account(checkpoint)
        if vision and checkpoint.config.vision is None:
            raise InvalidRequest(
                f"[quantize] {source} has no vision tower to quantise. Leave vision out."
            )
        job = _Job(checkpoint, scheme, Matcher(tuple(ignore)), threads or 0, vision)
        _check_groups(job)
        outputs = list(_plan(job))
        shards = _shards(outputs, max(1, max_shard_bytes))
        _check_space(target, sum(output.nbytes for output in outputs))
        _write_folder(job, target, shards, progress or (lambda done, total, name: None))
        return QuantizeResult(
            folder=target,
            n_quantised=sum(1 for _ in _quantised_linears(job)),
            n_kept=len(_kept_linears(job)),
            source_bytes=checkpoint.total_bytes,
            written_bytes=sum(output.nbytes for output in outputs),
            n_shards=len(shards),
        )


def _scheme(weights: str, group_size: int) -> Scheme:
    if weights not in _BITS:
        raise InvalidRequest(f"[quantize] weights is {shorten(weights)}, expected int4 or int8.")
    if not isinstance(group_size, int) or group_size < 0 or group_size % 8:
        raise InvalidRequest(
            f"[quantize] group_size is {shorten(group_size)}, expected a multiple of 8 (32, 64 and "
            "128 load everywhere), or 0 for one scale per row."
        )
    return Scheme(_BITS[weights], group_size, symmetric=True)


def _check_target(source: Path, target: Path) -> None:
    if target == source or source in target.parents:
        raise InvalidRequest(
            f"[quantize] {target} is inside the source {source}. Give a folder elsewhere."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidRequest(
            f"[quantize] {target} exists and is not an empty folder. Give a new name, or remove it."
        )
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)


def _check_groups(job: _Job) -> None:
    size = job.scheme.group_size
    for linear in _quantised_linears(job):
        if size and linear.in_dim % size:
            raise CheckpointError(
                f"[quantize] {linear.name} has {linear.in_dim} inputs, which groups of {size} do "
                "not divide. Choose another group_size, 0 for one scale per row, or ignore it."
            )


def _check_space(target: Path, planned: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < planned + _SLACK_BYTES:
        raise CapacityError(
            f"[quantize] {target.parent} has {free} bytes free, the copy needs "
            f"{planned + _SLACK_BYTES}. Free some, or write to another disk."
        )


def _all_linears(job: _Job) -> Iterator[Linear]:
    """Yield what can be quantised; routers are not."""
    for layer in range(job.config.n_layers):
        yield from layer_linears(job.config, layer, with_experts=True, with_router=False)
    yield from _tower_linears(job)


def _tower_linears(job: _Job) -> Iterator[Linear]:
    """Yield what is quantised of the tower: nothing unless asked for.

    Never the patch embedding. Everything seen comes through it, it is a thousandth of the tower,
    and the 588 inputs of the released one fall into no groups.
    """
    if job.vision and job.config.vision is not None:
        for linear, _ in vision_linears(job.config.vision, job.config.dim):
            if not linear.name.endswith("patch_embedding.linear"):
                yield linear


def _untouched(job: _Job) -> list[str]:
    """Return the linears that are never quantised."""
    config = job.config
    names = [
        router_linear(config, layer).name
        for layer in range(config.n_layers)
        if config.is_moe_layer[layer]
    ]
    names.append(head_name(config))
    if config.vision is not None:
        tower = {linear.name for linear in _tower_linears(job)}
        linears = (linear.name for linear, _ in vision_linears(config.vision, config.dim))
        names += [name for name in linears if name not in tower]
    return names


def _quantised_linears(job: _Job) -> Iterator[Linear]:
    return (linear for linear in _all_linears(job) if not job.ignore.matches(linear.name))


def _kept_linears(job: _Job) -> list[str]:
    """Return every linear that stays plain, by name: the `ignore` of the written config."""
    asked = [linear.name for linear in _all_linears(job) if job.ignore.matches(linear.name)]
    return asked + _untouched(job)


def _plan(job: _Job) -> Iterator[_Output]:
    """Yield everything to be written, in the order of the model."""
    checkpoint, config = job.checkpoint, job.config
    taken: set[str] = set()
    quantised: dict[str, list[_Output]] = {}
    single = list(_tower_linears(job))
    for layer in range(config.n_layers):
        single += layer_linears(config, layer, with_experts=False, with_router=False)
        if config.is_moe_layer[layer]:
            first, names, outputs = _expert_outputs(job, layer)
            quantised[first] = outputs
            taken |= names
    for linear in single:
        if not job.ignore.matches(linear.name):
            quantised[f"{linear.name}.weight"] = [_linear_output(job, linear)]
    for entry in checkpoint.tensors.values():
        if entry.name in quantised:
            yield from quantised[entry.name]
        elif entry.name not in taken:
            yield _copy_output(checkpoint, entry)


def _expert_outputs(job: _Job, layer: int) -> tuple[str, set[str], list[_Output]]:
    """Return where the experts of a layer begin, the tensors they consume and what is written."""
    config, checkpoint = job.config, job.checkpoint
    if is_fused(config, layer, checkpoint.tensors):
        base = f"{layer_name(config, layer)}.feed_forward.experts"
        names = {f"{base}.gate_up_proj", f"{base}.down_proj"}
        outputs = [
            output
            for expert in range(config.n_experts)
            for output in _fused_outputs(job, layer, expert)
        ]
        return f"{base}.gate_up_proj", names, outputs
    linears = [
        linear
        for expert in range(config.n_experts)
        for linear in expert_linears(config, layer, expert)
        if not job.ignore.matches(linear.name)
    ]
    names = {f"{linear.name}.weight" for linear in linears}
    first = f"{linears[0].name}.weight" if linears else ""
    return first, names, [_linear_output(job, linear) for linear in linears]


def _linear_output(job: _Job, linear: Linear) -> _Output:
    checkpoint = job.checkpoint
    name = f"{linear.name}.weight"

    def write(writer: SafetensorsWriter) -> None:
        _write_quantised(job, writer, linear, linear_source(checkpoint, linear))
        checkpoint.release(name)

    return _Output(linear.name, _specs(linear, job.scheme), write, checkpoint.entry(name).nbytes)


def _fused_outputs(job: _Job, layer: int, expert: int) -> Iterator[_Output]:
    """Yield gate, up and down of one fused expert; the last of each tensor gives its part back."""
    config, checkpoint = job.config, job.checkpoint
    base = f"{layer_name(config, layer)}.feed_forward.experts"
    tensors = (f"{base}.gate_up_proj", f"{base}.gate_up_proj", f"{base}.down_proj")
    for index, linear in enumerate(expert_linears(config, layer, expert)):
        tensor = tensors[index]
        part = checkpoint.entry(tensor).nbytes // config.n_experts

        def read(index: int = index) -> LinearSource:
            return fused_expert(checkpoint, layer, expert)[index]

        yield _fused_output(
            job,
            linear,
            read=read,
            release=(tensor, expert * part, (expert + 1) * part) if index else None,
            source_bytes=part if tensor.endswith("down_proj") else part // 2,
        )


def _fused_output(
    job: _Job,
    linear: Linear,
    *,
    read: Callable[[], LinearSource],
    release: tuple[str, int, int] | None,
    source_bytes: int,
) -> _Output:
    keep = job.ignore.matches(linear.name)
    dtype = read().dtype
    plain = TensorSpec(f"{linear.name}.weight", dtype, (linear.out_dim, linear.in_dim))

    def write(writer: SafetensorsWriter) -> None:
        if keep:  # unfused all the same: engines expect one module per expert in quantised files
            writer.write(plain.name, _transposed(read()))
        else:
            _write_quantised(job, writer, linear, read())
        if release is not None:
            job.checkpoint.release_range(*release)

    specs = (plain,) if keep else _specs(linear, job.scheme)
    return _Output(linear.name, specs, write, source_bytes)


def _copy_output(checkpoint: Checkpoint, entry: TensorEntry) -> _Output:
    def pieces() -> Iterator[memoryview]:
        data = checkpoint.view(entry.name)
        for at in range(0, entry.nbytes, _COPY_BYTES):
            yield data[at : at + _COPY_BYTES].data
            checkpoint.release_range(entry.name, at, at + _COPY_BYTES)

    spec = TensorSpec(entry.name, entry.dtype, entry.shape)
    return _Output(
        entry.name, (spec,), lambda writer: writer.write(entry.name, pieces()), entry.nbytes
    )


def _specs(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, "BF16" if name.endswith("_scale") else expected.dtypes[0], expected.shape)
        for name, expected in quantised_tensors(linear, scheme)
    )


def _write_quantised(
    job: _Job, writer: SafetensorsWriter, linear: Linear, source: LinearSource
) -> None:
    words, scales = _quantize_linear(source, job.scheme, job.threads)
    writer.write(f"{linear.name}.weight_packed", [_bytes_of(words)])
    writer.write(f"{linear.name}.weight_scale", [_bytes_of(scales)])
    shape = np.array([linear.out_dim, linear.in_dim], dtype="<i8")
    writer.write(f"{linear.name}.weight_shape", [_bytes_of(shape)])


def _quantize_linear(
    source: LinearSource, scheme: Scheme, threads: int
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    from camelid import _core  # here: planning and its tests need no compiled engine

    return _core.quantize(source, scheme.bits, scheme.group_size, threads)


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _transposed(source: LinearSource) -> Iterator[memoryview]:
    """Yield the rows of a matrix that is stored by columns, some at a time."""
    assert source.data is not None
    size = DTYPE_BYTES[source.dtype]
    element = np.dtype(f"<u{size}")
    matrix = np.ndarray(
        (source.out_dim, source.in_dim),
        dtype=element,
        buffer=source.data,
        strides=(source.row_stride * size, source.col_stride * size),
    )
    rows = max(1, _COPY_BYTES // (source.in_dim * size))
    for at in range(0, source.out_dim, rows):
        yield _bytes_of(matrix[at : at + rows])


def _shards(outputs: list[_Output], limit: int) -> list[list[_Output]]:
    shards: list[list[_Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def _write_folder(job: _Job, target: Path, shards: list[list[_Output]], progress: Progress) -> None:
    partial = target.parent / f"{target.name}.partial-{secrets.token_hex(4)}"
    with disk_errors(partial):
        partial.mkdir()
    try:
        weight_map = _write_shards(job, partial, shards, progress)
        _copy_other_files(job.checkpoint.folder, partial)
        if len(shards) > 1:
            total = sum(output.nbytes for shard in shards for output in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(partial / "model.safetensors.index.json", index)
        # Last of all, so that even the partial folder never passes for a checkpoint too early.
        _write_json(partial / "config.json", _quantised_config(job))
        with disk_errors(target):
            _sync(partial)
            os.rename(partial, target)  # replaces an empty folder, fails on any other
            _sync(target.parent)
    except BaseException:  # KeyboardInterrupt too: nothing of ours stays behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_shards(
    job: _Job, folder: Path, shards: list[list[_Output]], progress: Progress
) -> dict[str, str]:
    total = job.checkpoint.total_bytes
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        specs = [spec for output in shard for spec in output.specs]
        weight_map.update((spec.name, file) for spec in specs)
        writer = SafetensorsWriter(folder / file, specs)
        try:
            for output in shard:
                output.write(writer)
                done += output.source_bytes
                progress(done, total, output.name)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
    return weight_map


def _quantised_config(job: _Job) -> dict[str, Any]:
    """Return config.json as llm-compressor writes it."""
    data = read_json(job.checkpoint.folder / "config.json")
    size = job.scheme.group_size
    data["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": size or None,
                    "num_bits": job.scheme.bits,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group" if size else "channel",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": _kept_linears(job),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    return data


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, templates, generation and image settings: all that is no weight."""
    skipped = {"config.json", "model.safetensors.index.json"}
    for folder in (source, source / "additional_chat_templates"):
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            weights = path.suffix == ".safetensors" or path.suffix in OTHER_WEIGHTS
            if weights or path.name in skipped or path.name.startswith(".") or not path.is_file():
                continue
            copy = target / path.relative_to(source)
            with disk_errors(copy):
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
                _sync(copy)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with disk_errors(path), open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    with disk_errors(path):
        _sync(path)


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
