"""Fidelity to subject and prompt: the scores by hand, and what runs give."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ViTConfig, ViTModel

from bksdm.common.errors import InputError
from bksdm.evaluate.dino import Dino
from bksdm.evaluate.encoder import DualEncoder
from bksdm.options.personalize import FidelityOptions, PersonalizeOptions
from bksdm.personalize.fidelity import fidelity
from bksdm.personalize.run import personalize
from tiny_models import PICTURE, write_json
from verbs import Run, mtimes, told

pytest_plugins = ["verbs_fixtures"]

FEW = {"images_per_prompt": 2, "steps": 2, "guidance": 1.0, "encoder": "emoji", "resamples": 20}


@pytest.fixture(scope="module")
def runs(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one subject, of all weights and of a LoRA, with pictures, prompts and a small DINO."""
    folder = tmp_path_factory.mktemp("fidelity")
    (folder / "images").mkdir()
    for number, colour in enumerate(("teal", "navy")):
        Image.new("RGB", (PICTURE, PICTURE), colour).save(folder / "images" / f"{number}.png")
    (folder / "prompts.txt").write_text("a {subject}\na red {subject}\na green {subject}\n")
    for name, lora in (("whole", False), ("lora", True)):
        given = {"lora": lora, "steps": 2, "class_images": 0, "views": 1, "lr": 1e-3}
        personalize(
            PersonalizeOptions(
                str(exported_model), str(folder / "images"), "a sks car, new", str(folder / name), **given
            )
        )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(folder / "dino")
    write_json(folder / "dino" / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    return folder


@pytest.fixture(scope="module")
def result(runs: Path, exported_model: Path) -> dict:
    models = [f"whole={runs / 'whole'}", f"lora={runs / 'lora'}", f"before={exported_model}"]
    dino = str(runs / "dino")
    return fidelity(FidelityOptions(models, str(runs / "out"), str(runs / "prompts.txt"), dino=dino, **FEW))


def test_the_scores_are_mean_cosines(result: dict, runs: Path) -> None:
    encoder, dino = DualEncoder.load("emoji"), Dino.load(str(runs / "dino"), torch.device("cpu"))
    real = [Image.open(path).convert("RGB") for path in sorted((runs / "images").iterdir())]
    texts = encoder.text_features([prompt for prompt in ("a car", "a red car", "a green car") for _ in range(2)])
    for name in ("whole", "lora", "before"):
        made = [Image.open(path) for path in sorted((runs / "out" / "pictures" / name).glob("*.png"))]
        assert len(made) == 6
        scores = {key: values["value"] for key, values in result["models"][name]["scores"].items()}
        by_clip = F.cosine_similarity(encoder.image_features(made)[:, None], encoder.image_features(real)[None], dim=-1)
        by_dino = F.cosine_similarity(dino.image_features(made)[:, None], dino.image_features(real)[None], dim=-1)
        of_prompt = F.cosine_similarity(encoder.image_features(made), texts, dim=-1)
        expected = {"dino": by_dino.mean(), "clip_i": by_clip.mean(), "clip_t": of_prompt.mean()}
        assert scores == pytest.approx({key: float(value) for key, value in expected.items()}, abs=1e-5)


def test_runs_say_what_the_subject_is(result: dict, runs: Path) -> None:
    assert result["subject"] == {"words": "sks car", "kind": "car", "images": str(runs / "images")}
    made = told(runs / "out" / "pictures" / "lora" / "00002.png")
    assert (made["prompt"], made["lora"]) == ("a red sks car", str(runs / "lora" / "lora"))
    assert {item["score"] for item in result["differences"]} == {"dino", "clip_i", "clip_t"}
    assert len(result["differences"]) == 9
    with Image.open(runs / "out" / "grid.png") as grid:
        assert grid.size == (3 * PICTURE + 4, 4 * PICTURE + 6)


def test_the_same_command_draws_nothing_again(done: Run, result: dict, runs: Path, exported_model: Path) -> None:
    pictures = sorted((runs / "out" / "pictures").rglob("*.png"))
    before = mtimes(pictures)
    models = [f"whole={runs / 'whole'}", f"lora={runs / 'lora'}", f"before={exported_model}"]
    words = [word for name, value in FEW.items() for word in (f"--{name}", value)]
    where = ["--out", runs / "out", "--prompts", runs / "prompts.txt", "--dino", runs / "dino"]
    outcome = done("fidelity", *models, *where, *words)
    assert mtimes(pictures) == before
    assert "subject, CLIP-I" in outcome.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"models": []}, "no model is given"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"prompts": "plain.txt"}, "without {subject}"),
        ({"dino": "nowhere/at-all"}, "dino nowhere/at-all is not in the hub's cache here"),
        ({"encoder": "nowhere/at-all"}, "encoder nowhere/at-all is not in the hub"),
    ],
)
def test_bad_input_is_refused(runs: Path, tmp_path: Path, more: dict, message: str) -> None:
    (tmp_path / "plain.txt").write_text("a car\n")
    given = {"models": [str(runs / "whole")], "out": str(tmp_path / "out"), "prompts": str(runs / "prompts.txt"), **FEW}
    given |= {key: str(tmp_path / value) if key == "prompts" else value for key, value in more.items()}
    with pytest.raises(InputError, match=message):
        fidelity(FidelityOptions(**given))
    assert not (tmp_path / "out").exists()


def test_models_alone_need_to_be_told_the_subject(runs: Path, exported_model: Path, tmp_path: Path) -> None:
    given = FidelityOptions([str(exported_model)], str(tmp_path / "out"), str(runs / "prompts.txt"), **FEW)
    with pytest.raises(InputError, match="none of the models is a run of bksdm personalize; give --images"):
        fidelity(given)


def test_a_run_that_is_not_done_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text((runs / "whole" / "config.yaml").read_text())
    with pytest.raises(InputError, match="half is not finished"):
        fidelity(FidelityOptions([str(tmp_path / "half")], str(tmp_path / "out"), str(runs / "prompts.txt"), **FEW))
