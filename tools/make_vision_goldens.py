"""Writes tests/data/vision_goldens/: what transformers makes of every row of vision_variants.py.

    python tools/make_vision_goldens.py [variant ...]

Needs torch and transformers; nothing that ships or is tested does. Also holds
tests/reference/vision.py to the same answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import Llama4ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference.vision import encode
from variants import digest
from vision_variants import (
    GOLDENS,
    MIXED,
    VISION_VARIANTS,
    VisionVariant,
    mixed_prompt,
    write_mixed,
)

_MAX_REFERENCE_DIFFERENCE = 1e-4  # standard deviations of the features


@torch.no_grad()
def make(variant: VisionVariant) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = variant.write(folder)
        config = json.loads((folder / "config.json").read_text())
        model = Llama4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    pixels = variant.pixels()
    hidden = model.vision_model(torch.from_numpy(pixels)).last_hidden_state
    projected = model.multi_modal_projector(hidden.reshape(-1, hidden.shape[-1]))
    features = projected.reshape(len(pixels), -1, projected.shape[-1]).numpy()
    scale = features.std()
    difference = np.abs(encode(config, weights, pixels) - features).max() / scale
    assert difference < _MAX_REFERENCE_DIFFERENCE, (variant.name, difference)
    path = GOLDENS / f"{variant.name}.npz"
    np.savez_compressed(
        path, features=features, std=np.float32(scale), digest=np.array(digest(weights))
    )
    print(
        f"{variant.name:20} {features.shape} std {scale:.3f}; reference {difference:.1e}; "
        f"{path.stat().st_size} bytes",
        flush=True,
    )


@torch.no_grad()
def make_mixed() -> None:
    """The logits of a prompt of text and images."""
    ids, images = mixed_prompt()
    with tempfile.TemporaryDirectory() as name:
        weights = write_mixed(name)
        model = Llama4ForConditionalGeneration.from_pretrained(
            name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    pixels = torch.from_numpy(np.concatenate(images))
    output = model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False)
    logits = output.logits[0].numpy()
    np.savez_compressed(
        MIXED, logits=logits, std=np.float32(logits.std()), digest=np.array(digest(weights))
    )
    print(f"mixed prompt         {logits.shape} std {logits.std():.3f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    GOLDENS.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:]
    if not names or "mixed" in names:
        make_mixed()
    for variant in VISION_VARIANTS:
        if not names or variant.name in names:
            make(variant)


if __name__ == "__main__":
    main()
