"""Which linears of a checkpoint are quantised, and how: `quantization_config` of config.json.

Owns the vocabulary of compressed-tensors (groups, targets, ignore) and the refusal, by name, of
every format that is not read. Rules of matching follow compressed-tensors 0.20 `utils/match.py`.
Must never know of tensors, files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from camelid.errors import CheckpointError, Unsupported
from camelid.json_file import Fields, shorten
from camelid.patterns import Budget, Patterns

__all__ = ["Matcher", "QuantizationConfig", "Scheme", "parse_quantization"]

_SUPPORTED = (
    "Supported: compressed-tensors in format pack-quantized (int weights of 4 or 8 bits per group "
    "or channel, activations not quantised), and unquantised F32, F16 and BF16"
)
# What to do about formats people do download. Key: quant_method.
_ADVICE = {
    "fbgemm_fp8": "FP8 by fbgemm",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "NVIDIA ModelOpt",
    "mlx": "MLX",
}
_MAX_PATTERNS = 128
_MAX_NAMES = 1 << 20
# Class names a linear answers to, as nn.Module's method resolution order lists them.
_LINEAR_CLASSES = frozenset({"Linear", "Module"})
_ROUTER_CLASSES = _LINEAR_CLASSES | {"Llama4Router"}


@dataclass(frozen=True)
class Scheme:
    """How the weight of one linear is held."""

    bits: int  # 4 or 8
    group_size: int  # values along in_dim that share a scale; 0: the whole row
    symmetric: bool  # False: weight_zero_point accompanies the scales

    @property
    def values_per_word(self) -> int:
        """Values in an int32."""
        return 32 // self.bits

    def n_groups(self, in_dim: int) -> int:
        """Scales of one row."""
        return -(-in_dim // self.group_size) if self.group_size else 1


class Matcher:
    """A list of module names, class names and `re:` patterns."""

    def __init__(self, entries: tuple[str, ...], *, budget: Budget | None = None) -> None:
        """Compile the list.

        Raises:
            Unsupported: If a pattern cannot be read, or there are too many.
        """
        patterns = [entry[3:] for entry in dict.fromkeys(entries) if entry.startswith("re:")]
        if len(patterns) > _MAX_PATTERNS or len(entries) > _MAX_NAMES:
            raise Unsupported(
                f"[quantization] a list holds {len(patterns)} patterns and {len(entries)} names, "
                f"at most {_MAX_PATTERNS} and {_MAX_NAMES} are read."
            )
        self._names = frozenset(entries)
        self._patterns = Patterns(patterns, budget)

    def rank(self, module_name: str) -> int | None:
        """Return how it matches: 0 by name, 1 by pattern, 2 by class, None not at all."""
        if module_name in self._names:
            return 0
        if self._patterns.match(module_name):
            return 1
        classes = _ROUTER_CLASSES if module_name.endswith(".router") else _LINEAR_CLASSES
        return 2 if not classes.isdisjoint(self._names) else None

    def matches(self, module_name: str) -> bool:
        """Tell whether anything in the list matches."""
        return self.rank(module_name) is not None


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantised part of a checkpoint."""

    groups: tuple[tuple[Matcher, Scheme], ...]
    ignore: Matcher
    _cache: dict[str, Scheme | None] = field(default_factory=dict, repr=False, compare=False)

    def scheme_for(self, module_name: str) -> Scheme | None:
        """Return how the linear `module_name` is quantised; None when it is not.

        Args:
            module_name: As in tensor names, without `.weight`, with `language_model.` if any.
        """
        if module_name not in self._cache:
            self._cache[module_name] = self._find(module_name)
        return self._cache[module_name]

    def _find(self, module_name: str) -> Scheme | None:
        ranked = [
            (rank, index)
            for index, (targets, _) in enumerate(self.groups)
            if (rank := targets.rank(module_name)) is not None
        ]
        if not ranked or self.ignore.matches(module_name):
            return None
        return self.groups[min(ranked)[1]][1]  # the most specific target wins, then the first


def parse_quantization(
    data: dict[str, Any], *, where: str = "quantization_config"
) -> QuantizationConfig:
    """Check a `quantization_config`.

    Raises:
        CheckpointError: If it is damaged.
        Unsupported: If it describes a format that is not read, naming it and what is.
    """
    fields = Fields(data, where)
    method = fields.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        known = _ADVICE.get(method, "") if isinstance(method, str) else ""
        raise _unsupported(where, f"quant_method {shorten(method)}{known and f' ({known})'}")
    for key in ("kv_cache_scheme", "transform_config"):
        if fields.get(key):
            raise _unsupported(where, f"a {key}")
    sparsity = fields.section("sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise _unsupported(where, f"sparsity {shorten(sparsity.get('format'))}")
    budget = Budget()
    groups = fields.section("config_groups")
    if not groups.data:
        raise CheckpointError(
            f"[config] {where}: config_groups is empty, expected at least one group of targets."
        )
    return QuantizationConfig(
        groups=tuple(
            _group(groups, name, fields.get("format", "pack-quantized"), budget)
            for name in groups.data
        ),
        ignore=Matcher(fields.strings("ignore"), budget=budget),
    )


def _unsupported(where: str, what: str) -> Unsupported:
    return Unsupported(f"[quantization] {where} asks for {what}. {_SUPPORTED}.")


def _group(
    groups: Fields, name: str, default_format: object, budget: Budget
) -> tuple[Matcher, Scheme]:
    if not isinstance(groups.data[name], dict):
        raise groups.error(name, "an object with targets and weights")
    group = groups.section(name)
    layout = group.get("format") or default_format
    if layout != "pack-quantized":
        raise _unsupported(group.where, f"format {shorten(layout)}")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _unsupported(group.where, f"quantised {key}")
    targets = group.strings("targets")
    if not targets:
        raise group.error("targets", "a list of module names, class names or re: patterns")
    if not isinstance(group.get("weights"), dict):
        raise group.error("weights", "an object with num_bits and strategy")
    return Matcher(targets, budget=budget), _scheme(group.section("weights"))


def _scheme(weights: Fields) -> Scheme:
    if str(weights.get("type", "int")).lower() != "int":
        raise _unsupported(weights.where, f"weights of type {shorten(weights.get('type'))}")
    bits = weights.integer("num_bits", 8, 1, 64)
    if bits not in (4, 8):
        raise _unsupported(weights.where, f"weights of {bits} bits")
    if weights.get("dynamic"):
        raise _unsupported(weights.where, "dynamic weights")
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static"):
        raise _unsupported(weights.where, f"actorder {shorten(order)}, which permutes columns,")
    return Scheme(bits, _group_size(weights), weights.boolean("symmetric", True))


def _group_size(weights: Fields) -> int:
    size = weights.get("group_size")
    if size is not None:
        size = weights.integer("group_size", 0, -1, 1 << 20)
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(weights.get("strategy") or implied).lower()
    if strategy == "channel":
        if size not in (None, -1):
            raise weights.error("group_size", "null for strategy channel")
        return 0
    if strategy != "group":
        raise _unsupported(weights.where, f"strategy {shorten(strategy)}")
    if size is None or size < 1:
        raise weights.error("group_size", "a positive integer for strategy group")
    return int(size)
