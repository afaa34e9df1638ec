"""Holds logits to the reference as the device under test must come to it.

On the CPU that is the exact reference, within the exactness bar. On a GPU it is the one that
rounds where a GPU does: then what remains is rounding twice, a few thousandths, and routers whose
near ties fall otherwise. Those are found out, not tolerated: where a row is off, one of its own
near ties must explain it, or the test fails. How far off a row may be is measured where it is off
by more than is usual: on references whose sums are another device's.
"""

from __future__ import annotations

import itertools
import json
import math
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
from reference.numerics import Bf16, Numerics, OtherSums
from reference.vision import encode

Array = NDArray[np.float64]
Told = dict[tuple[int, int], list[int]]  # the experts of (layer, token)
# The k-th logit of a router leads the next by so little, in standard deviations of the layer's
# logits, that operands in bf16 may say otherwise: they are off by 2^-9 of themselves, and so are
# the layers' outputs that add up to them.
NEAR_TIE = 0.05
# Of some models (few channels, many layers, a cache of 8 bits) rounding twice moves more than of
# others, and more than backends.row_tolerance() says. What is right for a model and a prompt, so
# many references show that are as right as the first (reference.numerics.OtherSums). A device is
# one more of them: of 2200 such references the worst row was off by 1.35 times what the worst of
# three others was in 1 of 100, and by 1.66 times at most.
N_OTHERS = 4
BEYOND_OTHERS = 1.5


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
        # Of each layer with a router: what a near tie is, and its logits' standard deviation.
        self._near: dict[int, float] = {}
        self._spread: dict[int, float] = {}

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
        self._near = dict.fromkeys(numerics.router_logits, NEAR_TIE)
        # Over all tokens: the logits of the first alone may all be nearly as large.
        self._spread = {at: float(of.std()) for at, of in numerics.router_logits.items()}
        if not (rows_off(got, wanted, std) <= allowed).all():
            allowed = max(allowed, self._measure_others(numerics, tokens, features, wanted))
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

    def _measure_others(
        self,
        numerics: Numerics,
        tokens: Sequence[int],
        features: Mapping[int, Array] | None,
        wanted: Array,
    ) -> float:
        """Return how far off a row may be, and note what a near tie is in each layer."""
        assert isinstance(numerics, Bf16)
        worst = 0.0
        for seed in range(N_OTHERS):
            other = OtherSums(numerics, seed)
            answer = self._answer(other, tokens, features)
            worst = max(worst, float(rows_off(answer, wanted, float(wanted.std())).max()))
            for layer, logits in numerics.router_logits.items():
                moved = np.abs(other.router_logits[layer] - logits).max() / self._spread[layer]
                self._near[layer] = max(self._near[layer], BEYOND_OTHERS * float(moved))
        return BEYOND_OTHERS * worst

    def _decide_near_tie(
        self, numerics: Numerics, token: int, off: Callable[[], float], allowed: float
    ) -> None:
        """Decide near ties of a token as brings its logits nearest, or fail if that brings nothing.

        One, or else two of them, for the first may be what makes the second one. Where more of its
        layers fell otherwise, the next call finds them.
        """
        before = off()
        least, best = before, Told()
        for n_ties in (1, 2):
            now, told = self._best_ties(numerics, token, off, allowed, n_ties)
            if now < least:
                least, best = now, told
            if least <= allowed:
                break
            off()  # asks routers anew, as they are where nothing was tried
        assert best, (
            f"logits of token {token} are off by {before:.3g} standard deviations ({allowed:.3g} "
            f"allowed), which none of its {len(self._near_ties(numerics, token))} near ties "
            f"explains; decided otherwise before, as (layer, token): {sorted(numerics.told)}"
        )
        numerics.told.update(best)

    def _best_ties(
        self,
        numerics: Numerics,
        token: int,
        off: Callable[[], float],
        allowed: float,
        n_ties: int,
    ) -> tuple[float, Told]:
        """Return how far logits are off at best with up to n_ties decided otherwise, and which."""
        least, best = math.inf, Told()
        for at, experts in self._near_ties(numerics, token):
            numerics.told[at] = experts
            now, told = off(), {at: experts}
            if n_ties > 1:
                next_now, more = self._best_ties(numerics, token, off, allowed, n_ties - 1)
                if next_now < now:
                    now, told = next_now, told | more
            del numerics.told[at]
            if now < least:
                least, best = now, told
            if least <= allowed:
                break
        return least, best

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
        """Return where a token's choice is nearly a tie, and other choices; nearest first."""
        top_k = text_config(self.config)["num_experts_per_tok"]
        found = []
        for layer, logits in numerics.router_logits.items():
            row = logits[token]
            order = np.argsort(-row, kind="stable")
            if (layer, token) in numerics.told or len(order) <= top_k:
                continue
            # Of more than two that are nearly as good, any may be the one that is left out.
            for out, instead in itertools.product(order[:top_k], order[top_k:]):
                lead = float(row[out] - row[instead]) / self._spread[layer]
                if lead <= self._near[layer]:
                    experts = [int(instead if e == out else e) for e in order[:top_k]]
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
