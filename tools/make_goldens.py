"""Writes tests/data/goldens/: what transformers answers for every row of tests/variants.py.

    python tools/make_goldens.py [variant ...]

Needs torch and transformers; nothing that ships or is tested does. Every greedy token is a full
forward without a cache, so that nobody's cache is trusted. Also holds tests/reference/llama4.py to
the same answers, and says which prompt_seed a variant should name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers.models.llama4.modeling_llama4 import Llama4Router

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoints import SPECIAL_IDS, Weights, write_file
from reference.llama4 import forward
from variants import GOLDENS, N_GREEDY, VARIANTS, Variant, digest

# In standard deviations of the logits compared. Rounding in float32 moves them by some 1e-6.
_LEAST_GREEDY_MARGIN = 2e-3
_LEAST_ROUTER_MARGIN = 1e-4
_MAX_REFERENCE_DIFFERENCE = 1e-4
_COLUMN_STEP = 13  # every 13th column of every row is stored, and the last row whole


def load(folder: Path, weights: Weights, *, as_stored: bool, vision: bool) -> torch.nn.Module:
    """Return the folder's model in float32, by way of plain float32 unless `as_stored`."""
    config = json.loads((folder / "config.json").read_text())
    if not as_stored:
        config.pop("quantization_config", None)
        folder = folder / "plain"
        folder.mkdir()
        stored = {name: ("F32", value.shape, value.tobytes()) for name, value in weights.items()}
        write_file(folder / "model.safetensors", stored)
    text = config.get("text_config", config)
    if text["attention_chunk_size"] is None:  # its mask function refuses null, which means this
        text["attention_chunk_size"] = 1 << 20
    (folder / "config.json").write_text(json.dumps(config))
    kind = Llama4ForConditionalGeneration if vision else Llama4ForCausalLM
    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


class RouterMargins:
    """Collects by how much each token's last chosen expert beat the first that was not."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.least = np.inf
        for module in model.modules():
            if isinstance(module, Llama4Router) and module.top_k < module.num_experts:
                module.register_forward_hook(self._look)

    def _look(self, router: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        logits = output[1]
        best = logits.topk(router.top_k + 1, dim=-1).values
        margin = (best[:, -2] - best[:, -1]).min() / logits.std()
        self.least = min(self.least, float(margin))


@torch.no_grad()
def answer(model: torch.nn.Module, prompt: list[int]) -> tuple[np.ndarray, list[int], float]:
    """Return the prompt's logits, the greedy tokens, and the least margin one of them won by."""
    tokens = list(prompt)
    prompt_logits = None
    least = np.inf
    for _ in range(N_GREEDY):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        if prompt_logits is None:
            prompt_logits = logits
        best, second = np.argsort(-logits[-1])[:2]
        least = min(least, float((logits[-1, best] - logits[-1, second]) / logits.std()))
        tokens.append(int(best))
    return prompt_logits, tokens[len(prompt) :], least


def make(variant: Variant) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = variant.write(folder)
        config = json.loads((folder / "config.json").read_text())
        as_stored = variant.quantization is None and variant.fused is not False
        model = load(folder, weights, as_stored=as_stored, vision=variant.vision)
    wanted = variant.prompt_seed
    for prompt_seed in range(wanted, wanted + 100):
        variant = replace(variant, prompt_seed=prompt_seed)
        margins = RouterMargins(model)
        logits, greedy, margin = answer(model, variant.prompt())
        images = {SPECIAL_IDS["<|image|>"], SPECIAL_IDS["<|patch|>"]}
        clear = margin > _LEAST_GREEDY_MARGIN and margins.least > _LEAST_ROUTER_MARGIN
        if clear and not (variant.vision and images & set(greedy)):
            break
    else:
        raise SystemExit(f"{variant.name}: no prompt has clear margins; change its seed")

    scale = logits.std()
    difference = np.abs(forward(config, weights, variant.prompt()) - logits).max() / scale
    assert difference < _MAX_REFERENCE_DIFFERENCE, (variant.name, difference)
    path = GOLDENS / f"{variant.name}.npz"
    np.savez_compressed(
        path,
        prompt=np.array(variant.prompt(), np.int32),
        greedy=np.array(greedy, np.int32),
        columns=np.arange(0, logits.shape[1], _COLUMN_STEP, dtype=np.int32),
        logits=np.ascontiguousarray(logits[:, ::_COLUMN_STEP]),
        last=logits[-1],
        std=np.float32(scale),
        digest=np.array(digest(weights)),
    )
    print(
        f"{variant.name:22} prompt_seed={variant.prompt_seed:<2} std {scale:.3f} "
        f"margins {margin:.4f} greedy, {margins.least:.5f} router; "
        f"reference {difference:.1e}; {len(set(greedy))} different tokens; "
        f"{path.stat().st_size} bytes",
        flush=True,
    )
    if variant.prompt_seed != wanted:
        print(f"  set prompt_seed={variant.prompt_seed} in tests/variants.py")


def main() -> None:
    torch.set_num_threads(1)
    GOLDENS.mkdir(parents=True, exist_ok=True)
    names = sys.argv[1:]
    for variant in VARIANTS:
        if not names or variant.name in names:
            make(variant)


if __name__ == "__main__":
    main()
