"""Checks of the exported demo model against transformers, and golden answers for the tests.

Reads only the two exported folders: what is compared is what was written, not what training held in
memory.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo_model import DemoConfig, Llama4Demo

MAX_DIFFERENCE = (
    1e-3  # of the logits' standard deviation: float32 sums in another order differ by about 1e-5
)
PROMPT = (
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\n{}<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n"
)


def dequantise(folder: Path) -> dict[str, Tensor]:
    """Return the INT4 folder's tensors as float32 in transformers' layout (fused experts)."""
    stored = load_file(str(folder / "model.safetensors"))
    tensors = {name: tensor.float() for name, tensor in stored.items() if ".weight_" not in name}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name in [n for n in stored if n.endswith(".weight_packed")]:
        linear = name.removesuffix(".weight_packed")
        out, width = stored[f"{linear}.weight_shape"].tolist()
        codes = (stored[name].long()[..., None] >> (4 * torch.arange(8))) & 15
        scale = stored[f"{linear}.weight_scale"].float()
        weight = ((codes.float() - 8).reshape(out, scale.shape[1], -1) * scale[..., None]).reshape(
            out, width
        )
        base, *expert = linear.split(".experts.")
        if expert:
            number, part = expert[0].split(".")
            experts.setdefault(f"{base}.experts", {}).setdefault(int(number), {})[part] = weight.T
        else:
            tensors[f"{linear}.weight"] = weight
    for base, parts in experts.items():
        ordered = [parts[e] for e in range(len(parts))]
        tensors[f"{base}.gate_up_proj"] = torch.stack(
            [torch.cat([p["gate_proj"], p["up_proj"]], 1) for p in ordered]
        )
        tensors[f"{base}.down_proj"] = torch.stack([p["down_proj"] for p in ordered])
    return tensors


def load_folder(folder: Path) -> Llama4Demo:
    """Return the training module with the weights of a float32 or INT4 folder."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama4Demo(
        DemoConfig(**{name: config[name] for name in DemoConfig.__dataclass_fields__})
    )
    model.load_state_dict(dequantise(folder))
    return model.eval()


@torch.no_grad()
def compare_with_transformers(folder: Path, corpus: ModuleType) -> float:
    """Return the greatest logit difference from transformers over three prompts.

    In standard deviations of the logits.

    Raises:
        AssertionError: If a difference exceeds `MAX_DIFFERENCE` or a tensor is missing or left
        over.
    """
    from transformers import AutoTokenizer, Llama4ForCausalLM

    mine, tokenizer = load_folder(folder), AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        # The float32 values of an INT4 folder, as a plain checkpoint transformers can read without
        # compressed-tensors.
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        config["torch_dtype"] = "float32"
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        save_file(
            {n: t.contiguous() for n, t in dequantise(folder).items()},
            f"{scratch}/model.safetensors",
            {"format": "pt"},
        )
        theirs, info = Llama4ForCausalLM.from_pretrained(
            scratch, dtype=torch.float32, output_loading_info=True
        )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    worst = 0.0
    for seed, n_tokens in ((1, 60), (2, 500), (3, 1000)):
        document = corpus.make_document(random.Random(seed), n_tokens_target=n_tokens)
        content = corpus.user_message(document.text, document.questions[0][0])
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert text == PROMPT.format(content), "the chat template and the training frame differ"
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        expected = theirs(tokens[None]).logits[0]
        worst = max(worst, float((mine.logits(tokens) - expected).abs().max() / expected.std()))
    assert worst < MAX_DIFFERENCE, (
        f"logits differ by {worst:.2e} standard deviations, expected below {MAX_DIFFERENCE}"
    )
    return worst


@torch.no_grad()
def greedy(model: Llama4Demo, tokens: list[int], *, stop: int, max_tokens: int = 24) -> list[int]:
    """Return the greedy continuation, without the stop token.

    Recomputes everything for each token: slow, and nothing to go wrong.
    """
    answer: list[int] = []
    while len(answer) < max_tokens:
        best = int(model.logits(torch.tensor(tokens + answer))[-1].argmax())
        if best == stop:
            break
        answer.append(best)
    return answer


def write_golden(folder: Path, corpus: ModuleType, path: Path) -> None:
    """Write held-out prompts of several lengths with the model's greedy answers.

    The answers are those of the dequantised INT4 folder, computed in float32.
    """
    model, tokenizer = load_folder(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    stop = tokenizer.token_to_id("<|eot|>")
    cases = []
    for seed, n_tokens in enumerate((40, 80, 150, 250, 300, 520, 600, 1000)):
        document = corpus.make_document(random.Random(1000 + seed), n_tokens_target=n_tokens)
        question, truth = document.questions[seed % len(document.questions)]
        content = corpus.user_message(document.text, question)
        tokens = tokenizer.encode(PROMPT.format(content), add_special_tokens=False).ids
        ids = greedy(model, tokens, stop=stop)
        cases.append(
            {
                "content": content,
                "truth": truth,
                "n_prompt_tokens": len(tokens),
                "answer": tokenizer.decode(ids),
                "answer_ids": ids,
            }
        )
    about = "content is the user's message; answer is greedy, in float32, from the INT4 weights"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
