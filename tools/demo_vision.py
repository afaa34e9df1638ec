"""The Llama 4 vision tower as a small training module, and the text model's ears for it.

Owns the tower's sizes and how prompts of images become batches. The modules are transformers' own,
so `state_dict()` is the checkpoint. It must never know how the model is trained.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import (
    Llama4MultiModalProjector,
    Llama4VisionModel,
)

from camelid import demo_scenes
from camelid.image_prompt import PATCH, image_ids
from camelid.images import ImageConfig, tile
from demo_model import Batch

if TYPE_CHECKING:
    from train_demo_model import Examples

# A tile is three patches' squares wide: each of its nine embeddings sees one cell of a scene's
# overview. Four tiles and the overview make 53 tokens.
IMAGE_CONFIG = ImageConfig(tile_side=96, max_tiles=4)
TOKENS_PER_TILE = 9
# The head of the conversation, an image, and the rest of the message: as the chat template has it.
HEAD = "<|begin_of_text|><|header_start|>user<|header_end|>\n\n"


def vision_sizes() -> dict[str, Any]:
    """Return the tower's sizes by the names of transformers' `Llama4VisionConfig`."""
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,  # also the width of the four embeddings that become one
        "image_size": IMAGE_CONFIG.tile_side,
        "patch_size": 16,
        "num_channels": 3,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 128,
        "projector_output_dim": 128,
        "vision_output_dim": 128,
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "projector_dropout": 0.0,
        "multi_modal_projector_bias": False,
        "vision_feature_select_strategy": "default",
    }


class DemoVision(nn.Module):
    """From tiles to what the text model takes in the place of its embeddings."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        config = Llama4VisionConfig(**vision_sizes())
        config._attn_implementation = "sdpa"
        text = Llama4TextConfig(hidden_size=hidden_size, num_hidden_layers=1)
        self.vision_model = Llama4VisionModel(config)
        self.multi_modal_projector = Llama4MultiModalProjector(
            Llama4Config(vision_config=Llama4VisionConfig(**vision_sizes()), text_config=text)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [n_tiles, TOKENS_PER_TILE, hidden] of pixels [n_tiles, 3, side, side]."""
        encoded = self.vision_model(pixel_values=pixels).last_hidden_state
        return self.multi_modal_projector(encoded)


@dataclass(frozen=True)
class Pictures:
    """Scenes with their tiles, and the tiles' place in a batch."""

    scenes: list[demo_scenes.Scene]
    pixels: Tensor  # [n_tiles, 3, side, side], image by image, overviews last
    grids: list[tuple[int, int]]

    def overviews(self) -> Tensor:
        """Return which tiles are overviews, one for each scene, int64 [n_scenes]."""
        counts = torch.tensor([rows * columns for rows, columns in self.grids])
        return (counts + (counts > 1)).cumsum(0) - 1


def draw_pictures(
    rng: random.Random, n: int, *, split: demo_scenes.Split, sides: tuple[int, int]
) -> Pictures:
    """Draw scenes and cut them into tiles."""
    scenes = [demo_scenes.make_scene(rng, split=split, sides=sides) for _ in range(n)]
    cut = [tile(scene.draw(), IMAGE_CONFIG) for scene in scenes]
    pixels = torch.cat([torch.from_numpy(tiles) for tiles, _ in cut])
    return Pictures(scenes, pixels, [grid for _, grid in cut])


def image_batch(
    examples: Examples, rng: random.Random, pictures: Pictures, *, n_questions: int
) -> Batch:
    """Ask about each picture; the batch still lacks the features of the tiles."""
    specials = examples.tokenizer.token_to_id
    head = examples.encode(HEAD)
    prefixes = [head + image_ids(grid, TOKENS_PER_TILE, specials) for grid in pictures.grids]
    questions = [
        rng.sample(scene.questions, min(n_questions, len(scene.questions)))
        for scene in pictures.scenes
    ]
    batch = examples.assemble(rng, prefixes, questions, two_turns=0.15)
    return dataclasses.replace(batch, is_feature=batch.document == specials(PATCH))
