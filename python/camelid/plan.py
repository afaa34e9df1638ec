"""What a model will be loaded as: what "auto" means for this checkpoint, and whether that fits.

Decides from headers alone, before a weight is read. Must never know the engine or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from camelid.checkpoint import Checkpoint
from camelid.config import ModelConfig
from camelid.errors import CapacityError, Unsupported
from camelid.options import LoadOptions
from camelid.report import Report, inspect, kv_report, show_bytes

__all__ = ["LoadPlan", "image_cache_bytes", "make_plan", "require_fit"]

# Quantised weights from which "auto" computes fast. Smaller ones fit a processor's caches and run
# at thousands of tokens a second as they are: there is nothing to gain for the exactness lost.
FAST_FROM_BYTES = 64 << 20
# Encoded images "auto" remembers: 90 tiles of the released models, 5 photos at their largest.
IMAGE_CACHE_BYTES = 256 << 20
# Most tokens of a step. A GPU reads all experts in each step of a prompt, and only from about 50
# tokens of each expert on do products take longer: 800 tokens of 16 experts, evenly spread.
STEP_TOKENS = 512
GPU_STEP_TOKENS = 4096
_SMALLER = ("bf16", "int8", "int4")  # values of weights=, the most exact first


@dataclass(frozen=True)
class LoadPlan:
    """How a checkpoint is held and computed; nothing is "auto" any more but weights as stored."""

    weights: str  # auto (as stored) | bf16 | int8 | int4
    compute: str  # exact | fast
    head: str  # stored | int8
    kv_cache: str
    step_tokens: int = STEP_TOKENS  # most tokens of one step


def make_plan(checkpoint: Checkpoint, options: LoadOptions, *, on_gpu: bool = False) -> LoadPlan:
    """Decide what `options` leave open.

    Raises:
        Unsupported: If they ask for what only the other kind of device has.
    """
    report = inspect(checkpoint, weights=options.weights)
    if on_gpu:
        return _plan_for_gpu(report, options)
    if options.kv_cache == "fp8":
        raise Unsupported('[options] kv_cache="fp8" is for GPUs; "int8" is as small on the CPU.')
    quantised = sum(part.quantised_bytes for part in report.parts.values())
    compute = options.compute
    if compute == "auto":
        compute = "fast" if quantised >= FAST_FROM_BYTES else "exact"
    head = options.head
    if head == "auto":
        head = "int8" if compute == "fast" and _is_int4(report, options.weights) else "stored"
    kv_cache = options.kv_cache
    if kv_cache == "auto":
        kv_cache = "bf16" if compute == "fast" else "f32"
    return LoadPlan(options.weights, compute, head, kv_cache, STEP_TOKENS)


def _plan_for_gpu(report: Report, options: LoadOptions) -> LoadPlan:
    """Plan for tensor cores: they multiply bf16, so what is stored wider is held as bf16."""
    if options.compute == "exact":
        raise Unsupported(
            '[options] compute="exact" is for the CPU; a GPU multiplies bf16. Use device="cpu", or '
            'compute="auto".'
        )
    if options.kv_cache == "f32":
        raise Unsupported(
            '[options] kv_cache="f32" is for the CPU; a GPU takes bf16, fp8 or int8. Use one of '
            'them, or device="cpu".'
        )
    plain = not any(part.quantised_bytes for part in report.parts.values())
    weights = "bf16" if plain and options.weights == "auto" else options.weights
    head = options.head
    if head == "auto":
        head = "int8" if _is_int4(report, weights) else "stored"
    kv_cache = "bf16" if options.kv_cache == "auto" else options.kv_cache
    return LoadPlan(weights, "fast", head, kv_cache, GPU_STEP_TOKENS)


def _is_int4(report: Report, weights: str) -> bool:
    return weights == "int4" or (weights == "auto" and "INT4" in report.stored_as)


def image_cache_bytes(config: ModelConfig, options: LoadOptions, left_bytes: int) -> int:
    """Return how much memory encoded images may take, of what weights leave.

    Where the caller leaves it open, a sixteenth at most: the KV cache of a small machine is worth
    more.
    """
    if config.vision is None:
        return 0
    if options.image_cache is not None:
        return options.image_cache
    return min(IMAGE_CACHE_BYTES, left_bytes // 16)


def require_fit(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    *,
    limit_bytes: int,
    limit_is_wish: bool,
    workspace_bytes: int = 0,
    cache_bytes: int = 0,
    on_gpu: bool = False,
) -> int:
    """Refuse weights that will not fit beside a workspace, a page of KV cache and `cache_bytes`.

    Returns:
        The bytes that are left.

    Raises:
        CapacityError: Saying what is needed, what there is, and which choices would fit.
    """
    page = kv_report(checkpoint.config, plan.kv_cache).bytes_for(1)
    others = workspace_bytes + page + cache_bytes

    def needed(plan: LoadPlan) -> int:
        report = inspect(checkpoint, weights=plan.weights, head=plan.head, on_gpu=on_gpu)
        return report.loaded_bytes + others

    if needed(plan) <= limit_bytes:
        return limit_bytes - needed(plan)
    sizes = {name: needed(replace(plan, weights=name)) for name in _SMALLER}
    fitting = [name for name, size in sizes.items() if size <= limit_bytes]
    without = needed(plan) - cache_bytes
    if cache_bytes and without <= limit_bytes:
        advice = f"Lower image_cache=: all else takes {show_bytes(without)}."
    elif fitting:
        advice = f'weights="{fitting[0]}" takes {show_bytes(sizes[fitting[0]])} and would fit.'
    else:
        least = min([needed(plan), *sizes.values()])
        advice = f"The smallest choice of weights= takes {show_bytes(least)}."
    cache = f" and image_cache={cache_bytes}" if cache_bytes else ""
    there = "memory= allows" if limit_is_wish else "this process may still take"
    raise CapacityError(
        f"[memory] {checkpoint.folder} with weights={plan.weights}{cache} takes "
        f"{show_bytes(needed(plan))}, {there} {show_bytes(limit_bytes)}. {advice}"
    )
