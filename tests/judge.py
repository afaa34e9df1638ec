"""Holds logits to the reference as the device under test must come to it.

On the CPU that is the exact reference, within the exactness bar. On a GPU it is the one that
rounds where a GPU does: then what remains is rounding twice, a few thousandths, and routers whose
near ties fall otherwise. Those are found out, not tolerated: where a row is off, one of its own
near ties must explain it, or the test fails.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from checkpoints import Weights
from engines import assert_close
from reference.llama4 import forward, text_config
from reference.numerics import Bf16, Numerics
from reference.vision import encode

Array = NDArray[np.float64]
# The k-th logit of a router leads the next by so little, in standard deviations of the layer's
# logits, that operands in bf16 may say otherwise: they are off by 2^-9 of themselves, and so are
# the layers' outputs that add up to them.
NEAR_TIE = 0.05


class Judge:
    """Knows what a checkpoint must answer on this device.

    Args:
        folder: The checkpoint.
        weights: The float32 weights it stands for.
        kv: How the engine keeps keys and values; None for what loses least.
    """

    def __init__(self, folder: Path, weights: Weights, *, kv: str | None = None) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = weights
        self.kv = kv or backends.kv_caches()[0]
        self._integers = held_as_integers(folder, self.config)

    def numerics(self) -> Numerics:
        return Bf16(self._integers, self.kv) if backends.is_gpu() else Numerics()

    def check(
        self,
        got: NDArray[np.float32],
        tokens: Sequence[int],
        *,
        features: Mapping[int, Array] | None = None,
    ) -> Array:
        """Fail where logits of a sequence from its first token on are not what they must be.

        Args:
            got: [n_tokens, vocab_size].
            tokens: The sequence.
            features: By position, what takes the place of embeddings.

        Returns:
            What the logits must be.
        """
        numerics = self.numerics()
        wanted = self._answer(numerics, tokens, features)
        std = float(wanted.std())
        if not backends.is_gpu():
            assert_close(got, wanted, std=std, tolerance=backends.EXACT)
            return wanted
        allowed = backends.row_tolerance(self.kv, text_config(self.config)["num_hidden_layers"])
        while len(bad := np.flatnonzero(~(rows_off(got, wanted, std) <= allowed))):
            token = int(bad[0])

            def off(n: int = token + 1) -> float:
                answer = self._answer(numerics, tokens[:n], features)
                return float(rows_off(got[:n], answer, std)[-1])

            self._decide_near_tie(numerics, token, off, allowed)
            wanted = self._answer(numerics, tokens, features)
        return wanted

    def _answer(
        self, numerics: Numerics, tokens: Sequence[int], features: Mapping[int, Array] | None
    ) -> Array:
        there = {place: of for place, of in (features or {}).items() if place < len(tokens)}
        return forward(self.config, self.weights, tokens, numerics=numerics, features=there)

    def _decide_near_tie(
        self, numerics: Numerics, token: int, off: Callable[[], float], allowed: float
    ) -> None:
        """Decide a near tie of a token as brings its logits nearest, or fail if none does.

        Where two of its layers fell otherwise, the next call finds the other.
        """
        least = before = off()
        best = None
        ties = self._near_ties(numerics, token)
        for at, experts in ties:
            numerics.told[at] = experts
            now = off()
            del numerics.told[at]
            if now < least:
                least, best = now, (at, experts)
            if now <= allowed:
                break
        assert best is not None, (
            f"logits of token {token} are off by {before:.3g} standard deviations ({allowed:g} "
            f"allowed), which none of its {len(ties)} near ties explains; decided otherwise "
            f"before, as (layer, token): {sorted(numerics.told)}"
        )
        numerics.told[best[0]] = best[1]

    def check_features(self, got: NDArray[np.float32], pixels: NDArray[Any]) -> None:
        """Fail where features [n_tiles, tokens_per_tile, dim] are not what they must be."""
        numerics = Bf16(self._integers) if backends.is_gpu() else Numerics()
        wanted = encode(self.config, self.weights, pixels, numerics)
        std = float(wanted.std())
        if not backends.is_gpu():
            assert_close(got, wanted, std=std, tolerance=1e-4, what="features")
            return
        assert got.shape == wanted.shape
        rows = (-1, wanted.shape[-1])
        off = rows_off(got.reshape(rows), wanted.reshape(rows), std)
        assert off.max() <= backends.row_tolerance(), f"features are off by {off.max():.3g}"

    def _near_ties(self, numerics: Numerics, token: int) -> list[tuple[tuple[int, int], list[int]]]:
        """Return where a token's choice is nearly a tie, and the other choice; nearest first."""
        top_k = text_config(self.config)["num_experts_per_tok"]
        found = []
        for layer, logits in numerics.router_logits.items():
            row = logits[token]
            order = np.argsort(-row, kind="stable")
            if (layer, token) in numerics.told or len(order) <= top_k:
                continue
            lead = float(row[order[top_k - 1]] - row[order[top_k]]) / float(logits.std())
            if lead <= NEAR_TIE:
                experts = [int(e) for e in (*order[: top_k - 1], order[top_k])]
                found.append((lead, (layer, token), experts))
        return [(at, experts) for _, at, experts in sorted(found)]


def assert_likeliest(tokens: Sequence[int], logits: Array) -> None:
    """Fail where a token is not the likeliest after `logits`, or as likely but for rounding."""
    for i, token in enumerate(tokens):
        # Single values stray further than their row's mean: four times are one in 10^4.
        short = (logits[i].max() - logits[i, token]) / logits.std()
        allowed = 2 * 4 * backends.row_tolerance()
        assert short <= allowed, f"token {i} is {token}, {short:.3g} deviations below the likeliest"


def features_of(
    ids: Sequence[int], encoded: Sequence[NDArray[np.float32]], patch_id: int
) -> dict[int, Array]:
    """Return features by their place in a prompt: those of its images in turn."""
    rows = np.concatenate([image.reshape(-1, image.shape[-1]) for image in encoded])
    places = [i for i, token in enumerate(ids) if token == patch_id]
    return dict(zip(places, rows.astype(np.float64), strict=True))


def rows_off(got: NDArray[Any], wanted: Array, std: float) -> Array:
    """Return the root of the mean square of each row's deviation, in `std`."""
    assert got.shape == wanted.shape
    return np.sqrt(np.mean((got - wanted) ** 2, axis=1)) / std


def held_as_integers(folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the matrices of a checkpoint that a GPU multiplies as integers with scales.

    Source: cuda/host/matrix.cu; groups that its tiles cannot have become bf16.
    """
    if "quantization_config" not in config:
        return frozenset()
    (group,) = config["quantization_config"]["config_groups"].values()
    bits, size = group["weights"]["num_bits"], group["weights"]["group_size"] or 0
    names = set()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(n_bytes))
        for name, entry in header.items():
            if name.endswith(".weight_packed"):
                inputs = entry["shape"][1] * (32 // bits)
                if size == 0 or size >= inputs or size % 32 == 0:
                    names.add(name.removesuffix("_packed").removeprefix("language_model."))
    return frozenset(names)
