"""Writes tests/data/mixed_goldens/: what transformers answers for every row of mixed_variants.py.

    python tools/make_mixed_goldens.py [variant ...]

Needs torch and transformers; nothing that ships or is tested does. A full forward without a cache
for every greedy token. Says which prompt_seed a variant should name.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from make_goldens import RouterMargins, load
from mixed_variants import GOLDENS, MIXED_VARIANTS, N_GREEDY, PATCH, MixedVariant, direction
from variants import digest

# In standard deviations of the logits compared. Rounding in float32 moves them by some 1e-5, and a
# prompt of thousands of rows has thousands of router decisions.
_LEAST_GREEDY_MARGIN = 2e-3
_LEAST_ROUTER_MARGIN = 2e-5
_MAX_TRIES = 100
_MAX_ROWS = 24  # stored column by column; of all rows, one projection each
_COLUMN_STEP = 13


@torch.no_grad()
def answer(
    model: torch.nn.Module, ids: list[int], images: list[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], list[int], float]:
    """Return the prompt's logits, the greedy tokens, and the least margin one of them won by."""
    pixels = torch.from_numpy(np.concatenate(images))
    tokens = list(ids)
    prompt_logits = None
    least = np.inf
    for _ in range(N_GREEDY):
        output = model(input_ids=torch.tensor([tokens]), pixel_values=pixels, use_cache=False)
        logits = output.logits[0].numpy()
        if prompt_logits is None:
            prompt_logits = logits
        best, second = np.argsort(-logits[-1])[:2]
        least = min(least, float((logits[-1, best] - logits[-1, second]) / logits.std()))
        tokens.append(int(best))
        if best == PATCH:  # which transformers would look for an image for
            return prompt_logits, [], 0.0
    return prompt_logits, tokens[len(ids) :], least


def make(variant: MixedVariant) -> None:
    with tempfile.TemporaryDirectory() as name:
        weights = variant.write(name)
        as_stored = variant.quantization is None
        model = load(Path(name), weights, as_stored=as_stored, vision=True)
    wanted = variant.prompt_seed
    for prompt_seed in range(wanted, wanted + _MAX_TRIES):
        variant = replace(variant, prompt_seed=prompt_seed)
        ids, images = variant.prompt()
        margins = RouterMargins(model)
        logits, greedy, margin = answer(model, ids, images)
        if margin > _LEAST_GREEDY_MARGIN and margins.least > _LEAST_ROUTER_MARGIN:
            break
    else:
        raise SystemExit(f"{variant.name}: no prompt has clear margins; change its seed")
    rows = np.unique(np.linspace(0, len(ids) - 1, _MAX_ROWS).astype(np.int32))
    columns = np.arange(0, logits.shape[1], _COLUMN_STEP, dtype=np.int32)
    path = GOLDENS / f"{variant.name}.npz"
    np.savez_compressed(
        path,
        rows=rows,
        columns=columns,
        logits=logits[np.ix_(rows, columns)],
        last=logits[-1],
        projected=logits @ direction(logits.shape[1]),
        greedy=np.array(greedy, np.int32),
        std=np.float32(logits.std()),
        digest=np.array(digest(weights)),
    )
    print(
        f"{variant.name:22} {len(ids)} tokens, tiles {[len(image) for image in images]}, "
        f"std {logits.std():.3f}, margins {margin:.4f} greedy, {margins.least:.6f} router; "
        f"{path.stat().st_size} bytes",
        flush=True,
    )
    if variant.prompt_seed != wanted:
        print(f"  set prompt_seed={variant.prompt_seed} in tests/mixed_variants.py")


def main() -> None:
    torch.set_num_threads(1)
    GOLDENS.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:]
    for variant in MIXED_VARIANTS:
        if not names or variant.name in names:
            make(variant)


if __name__ == "__main__":
    main()
