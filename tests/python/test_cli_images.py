"""Images on the command line: `demo --image`, `run --image` and `/image` in a chat."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import camelid
from camelid.cli import main
from camelid.demo_scenes import make_scene
from checkpoints import write_checkpoint

DEMO = str(camelid.demo_model_path())
CPU = ["--device", "cpu", "--threads", "1"]
GREEDY = ["--temperature", "0", "--max-tokens", "24"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Return a picture's file, with a question and the model's answer to it."""
    path = tmp_path_factory.mktemp("picture") / "a picture.png"
    scene = make_scene(random.Random(1))
    scene.draw().save(path)
    question = scene.questions[-1][0]
    image = {"type": "image_url", "image_url": {"url": str(path)}}
    message = {"role": "user", "content": [image, {"type": "text", "text": question}]}
    with camelid.LLM(DEMO, device="cpu", threads=1) as llm:
        answer = llm.chat([message], camelid.SamplingParams(max_tokens=24, temperature=0)).text
    return path, question, answer


def test_the_demo_draws_a_picture_and_answers_about_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--image", "--seed", "3", *CPU]) == 0
    first = capsys.readouterr()
    assert first.out.count("Question: ") == 3
    assert first.out.count("Right.") + first.out.count("Wrong.") == 3
    assert "--seed 3 with --image" in first.err
    saved = tmp_path / "camelid-demo-3.png"
    assert Image.open(saved).tobytes() == make_scene(random.Random(3)).draw().tobytes()
    assert main(["demo", "--image", "--seed", "3", *CPU]) == 0  # over itself
    assert capsys.readouterr().out == first.out


def test_the_demo_never_writes_over_another_file(tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"precious")
    for where in (mine, tmp_path, tmp_path / "no folder" / "a.png"):
        assert main(["demo", "--seed", "3", *CPU, "--image", str(where)]) == 1
        assert "Name another" in capsys.readouterr().err
    assert mine.read_bytes() == b"precious"


def test_run_shows_an_image(picture: tuple[Path, str, str], capsys: Any) -> None:
    path, question, answer = picture
    assert main(["run", DEMO, question, "--image", str(path), *GREEDY, *CPU]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert main(["run", DEMO, question, *GREEDY, *CPU]) == 0
    assert capsys.readouterr().out != f"{answer}\n"


def test_chat_shows_an_image_with_the_next_message(
    picture: tuple[Path, str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, question, answer = picture
    lines = f"/image\n/image {path.parent}/none.png\n/image {path}\n{question}\n/clear\n/bye\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", DEMO, *GREEDY, *CPU]) == 0
    out, err = capsys.readouterr()
    assert out == f"{answer}\n"
    assert "/image needs the path" in err
    assert "cannot read" in err
    with Image.open(path) as image:
        assert f"{image.width} x {image.height} pixels, goes with the next message" in err


def test_images_are_refused_where_they_cannot_be_seen(
    picture: tuple[Path, str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(picture[0])
    write_checkpoint(tmp_path, seed=1)
    assert main(["run", str(tmp_path), "x", "--image", path, *CPU]) == 1
    assert "vision" in capsys.readouterr().err
    assert main(["run", DEMO, "x", "--raw", "--image", path, *CPU]) == 1
    assert "--raw" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {path}\n"))
    assert main(["chat", str(tmp_path), *CPU]) == 0
    assert "no vision tower" in capsys.readouterr().err
