"""Checks of the exported demo model against transformers, and golden answers for the tests.

Reads only the two exported folders: what is compared is what was written, not what training held in
memory.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from camelid import demo_corpus, demo_scenes
from camelid.image_prompt import PATCH, image_ids
from camelid.images import tile
from demo_model import DemoConfig, Llama4Demo
from demo_vision import HEAD, IMAGE_CONFIG, TOKENS_PER_TILE, DemoVision

MAX_DIFFERENCE = (
    1e-3  # of the logits' standard deviation: float32 sums in another order differ by about 1e-5
)
TAIL = "<|eot|><|header_start|>assistant<|header_end|>\n\n"
_TEXT = "language_model."


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


def load_folder(folder: Path) -> tuple[Llama4Demo, DemoVision | None]:
    """Return the training modules with the weights of a float32 or INT4 folder."""
    config = json.loads((folder / "config.json").read_text())
    text_config = config.get("text_config", config)
    model = Llama4Demo(
        DemoConfig(**{name: text_config[name] for name in DemoConfig.__dataclass_fields__})
    )
    tensors = dequantise(folder)
    if "vision_config" not in config:
        model.load_state_dict(tensors)
        return model.eval(), None
    vision = DemoVision(model.config.hidden_size)
    text = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_TEXT)}
    model.load_state_dict({name.removeprefix(_TEXT): tensor for name, tensor in text.items()})
    vision.load_state_dict(tensors)
    return model.eval(), vision.eval()


class Reader:
    """Encodes conversations of one turn as the training frame does, and answers them greedily.

    Recomputes everything for each token: slow, and nothing to go wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.model, self.vision = load_folder(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def text_ids(self, content: str) -> list[int]:
        """Return a message of text as token ids."""
        ids: list[int] = self.tokenizer.encode(
            f"{HEAD}{content}{TAIL}", add_special_tokens=False
        ).ids
        return ids

    def image_ids(self, scene: demo_scenes.Scene, question: str) -> tuple[list[int], Tensor]:
        """Return a picture and a question as token ids, and the picture's tiles."""
        pixels, grid = tile(scene.draw(), IMAGE_CONFIG)
        image = image_ids(grid, TOKENS_PER_TILE, self.tokenizer.token_to_id)
        parts = [
            self.tokenizer.encode(part, add_special_tokens=False).ids
            for part in (HEAD, f"{question}{TAIL}")
        ]
        return [*parts[0], *image, *parts[1]], torch.from_numpy(pixels)

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: Tensor | None = None) -> Tensor:
        """Return logits [n_tokens, vocab]."""
        tokens = torch.tensor(ids)
        if pixels is None:
            return self.model.logits(tokens)
        assert self.vision is not None
        features = self.vision(pixels).flatten(0, 1)
        return self.model.logits(tokens, tokens == self.tokenizer.token_to_id(PATCH), features)

    def greedy(
        self, ids: list[int], pixels: Tensor | None = None, *, max_tokens: int = 24
    ) -> list[int]:
        """Return the greedy continuation, without the stop token."""
        stop = self.tokenizer.token_to_id("<|eot|>")
        answer: list[int] = []
        while len(answer) < max_tokens:
            best = int(self.logits(ids + answer, pixels)[-1].argmax())
            if best == stop:
                break
            answer.append(best)
        return answer


@torch.no_grad()
def compare_with_transformers(folder: Path) -> float:
    """Return the greatest logit difference from transformers over a few prompts.

    In standard deviations of the logits. Texts go through the folder's own chat template, and
    pictures through its processor, too: what is compared is everything a user would run.

    Raises:
        AssertionError: If a difference exceeds `MAX_DIFFERENCE`, a tensor is missing or left over,
            or a prompt is encoded otherwise than in training.
    """
    import transformers

    mine = Reader(folder)
    sees = mine.vision is not None
    kind = transformers.Llama4ForConditionalGeneration if sees else transformers.Llama4ForCausalLM
    with tempfile.TemporaryDirectory() as scratch:
        _write_plain(folder, Path(scratch))
        theirs, info = kind.from_pretrained(scratch, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    for seed, n_tokens in ((1, 60), (2, 500), (3, 1000)):
        document = demo_corpus.make_document(random.Random(seed), n_tokens_target=n_tokens)
        content = demo_corpus.user_message(document.text, document.questions[0][0])
        ids = mine.text_ids(content)
        inputs = _templated(tokenizer, content)
        assert inputs["input_ids"][0].tolist() == ids, "the template and training's frame differ"
        worst = max(worst, _difference(mine.logits(ids), theirs(**inputs).logits[0]))
    if sees:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        processor.chat_template = tokenizer.chat_template
        for seed in range(4):
            scene = demo_scenes.make_scene(random.Random(seed), sides=(64, 400))
            question = scene.questions[-1][0]
            ids, pixels = mine.image_ids(scene, question)
            picture = {"type": "image", "image": scene.draw()}
            inputs = _templated(processor, [picture, {"type": "text", "text": question}])
            assert inputs["input_ids"][0].tolist() == ids, "the layout of the picture differs"
            inputs["pixel_values"] = inputs["pixel_values"].float()  # the processor's are bf16
            worst = max(worst, _difference(mine.logits(ids, pixels), theirs(**inputs).logits[0]))
    assert worst < MAX_DIFFERENCE, (
        f"logits differ by {worst:.2e} standard deviations, expected below {MAX_DIFFERENCE}"
    )
    return worst


def _write_plain(folder: Path, target: Path) -> None:
    """Write a folder's float32 values, for transformers without compressed-tensors."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in dequantise(folder).items()}
    save_file(tensors, str(target / "model.safetensors"), {"format": "pt"})


def _templated(encoder: Any, content: Any) -> Any:
    return encoder.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _difference(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.std())


def write_golden(folder: Path, path: Path) -> None:
    """Write held-out prompts and scenes with the model's greedy answers.

    The answers are those of the dequantised INT4 folder, computed in float32.
    """
    reader = Reader(folder)
    cases: list[dict[str, Any]] = []
    for seed, n_tokens in enumerate((40, 80, 150, 250, 300, 520, 600, 1000)):
        document = demo_corpus.make_document(random.Random(1000 + seed), n_tokens_target=n_tokens)
        question, truth = document.questions[seed % len(document.questions)]
        content = demo_corpus.user_message(document.text, question)
        ids = reader.text_ids(content)
        cases.append({"content": content, "truth": truth, **_answered(reader, ids)})
    scenes = []
    for seed in range(8):
        scene = demo_scenes.make_scene(random.Random(seed))
        question, truth = random.Random(seed).choice(scene.questions)
        answered = _answered(reader, *reader.image_ids(scene, question))
        scenes.append({"scene_seed": seed, "content": question, "truth": truth, **answered})
    about = (
        "content is the user's message, after the picture of make_scene(Random(scene_seed)) where "
        "there is one; answer is greedy, in float32, from the INT4 weights"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    golden = {"about": about, "cases": cases, "scenes": scenes}
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


def _answered(reader: Reader, ids: list[int], pixels: Tensor | None = None) -> dict[str, Any]:
    answer = reader.greedy(ids, pixels)
    text = reader.tokenizer.decode(answer)
    return {"n_prompt_tokens": len(ids), "answer": text, "answer_ids": answer}
