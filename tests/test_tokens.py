"""Prompts become the tokens that diffusers makes of them, saved words too, and what is cut off is said."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from bksdm.common.prompts import cut_line, say_cut
from bksdm.export.components import components
from bksdm.export.layout import component_folder, write_layout
from bksdm.export.to_openvino import MODEL_FILE, write_graph
from bksdm.models.pipelines import cutting, save_pipeline, tokenizing
from bksdm.runtime.__main__ import main
from bksdm.runtime.openvino_networks import OpenvinoNetworks
from bksdm.runtime.tokens import Tokenizer, hidden_words, saved_words
from tiny_models import CONTEXT, MAX_TOKENS, V1_UNET, build_pipeline, tokenize
from verbs import Run, captioned

pytest_plugins = ["verbs_fixtures"]

PICTURE = Image.new("RGB", (32, 32), "red")
WORDS = {"<thing>": 3, "<one>": 1, "blob": 2, "Glob": 2}  # how many vectors each has
LONG, REST = "red car red car red car, été", ", été"  # six tokens fit


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """A pipeline with saved words, as diffusers loads them. Shared: not to be changed."""
    pipeline, folder = build_pipeline(V1_UNET), tmp_path_factory.mktemp("words")
    rng = torch.Generator().manual_seed(0)
    for word, vectors in WORDS.items():
        save_file({word: torch.randn(vectors, CONTEXT, generator=rng)}, folder / "word.safetensors")
        pipeline.load_textual_inversion(folder, weight_name="word.safetensors")
    return pipeline


@pytest.fixture(scope="module")
def speaking_folder(speaking: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on the disk. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("speaking") / "model"
    save_pipeline(speaking, folder)
    return folder


# Saved words

SAYINGS = [
    "a <thing> car",
    "<thing>, <thing>",
    "red<thing>car",
    "<one> <thing>",
    "a blob of <one>",
    "a Glob, a glob",
    "a <thing>_1",
    "a very long prompt that ends with <thing>",
    "red apple",
    "",
]


@pytest.mark.parametrize("saying", SAYINGS)
def test_saved_words_become_all_of_their_vectors_as_in_diffusers(
    speaking: StableDiffusionPipeline, tmp_path: Path, saying: str
) -> None:
    tokenizer = speaking.tokenizer
    written = speaking.maybe_convert_prompt(saying, tokenizer)
    wanted = tokenizer(written, padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids
    assert tokenizing(tokenizer)(saying).tolist() == wanted
    write_layout(speaking, tmp_path)
    assert Tokenizer(tmp_path / "tokenizer", MAX_TOKENS)([saying]).tolist() == [wanted]


def test_a_word_that_diffusers_does_not_find_is_named(
    done: Run, speaking: StableDiffusionPipeline, speaking_folder: Path, tmp_path: Path
) -> None:
    words = saved_words(speaking.tokenizer.added_tokens_encoder)
    assert hidden_words(words, speaking.tokenizer.tokenize) == ["Glob"]
    write_layout(speaking, tmp_path)
    assert Tokenizer(tmp_path / "tokenizer", MAX_TOKENS).hidden_words() == ["Glob"]
    said = done("generate", speaking_folder, "--prompt", "Glob", "--steps", 1, "--out", tmp_path / "o").said
    assert said == [
        "of the saved word Glob of the model, the first vector counts alone: give it a name in small letters"
    ]


def test_a_saved_word_of_three_vectors_is_three_tokens(speaking: StableDiffusionPipeline) -> None:
    tokenizer = speaking.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizing(tokenizer)("a <thing> car"))
    assert tokens[1:6] == ["a</w>", "<thing>", "<thing>_1", "<thing>_2", "car</w>"]


def test_prepare_embeds_what_the_pipeline_does(
    done: Run, speaking: StableDiffusionPipeline, speaking_folder: Path, tmp_path: Path
) -> None:
    data = captioned(tmp_path / "data", [PICTURE], '{"file_name": "0.png", "text": "a <thing> car"}\n')
    done("prepare", data, "--teacher", speaking_folder, "--text_embeddings", "--workers", 0, "--out", tmp_path / "out")
    (context,) = datasets.load_from_disk(str(tmp_path / "out")).with_format("numpy")["context"]
    wanted, _ = speaking.encode_prompt("a <thing> car", "cpu", 1, do_classifier_free_guidance=False)
    np.testing.assert_allclose(np.reshape(context, (MAX_TOKENS, CONTEXT)), wanted[0].detach(), atol=1e-5)


def test_an_exported_folder_embeds_what_the_pipeline_does(speaking: StableDiffusionPipeline, tmp_path: Path) -> None:
    write_layout(speaking, tmp_path)
    component, unet = (components(speaking, 32, 32)[name] for name in ("text_encoder", "unet"))
    component_folder(unet, tmp_path)
    write_graph(component, component_folder(component, tmp_path) / MODEL_FILE, "fp32", [])
    found = OpenvinoNetworks(tmp_path).encode(Tokenizer(tmp_path / "tokenizer", MAX_TOKENS)(["a <thing> car"]))
    wanted, _ = speaking.encode_prompt("a <thing> car", "cpu", 1, do_classifier_free_guidance=False)
    np.testing.assert_allclose(found["context"], wanted.detach(), atol=1e-4)


# What is cut off

CUTS = [
    (LONG, REST),
    ("red apple", ""),
    ("red car red car red car", ""),
    ("red car red car red car  red ", "red"),
    ("red car red car red carred", "rred"),
    ("a <thing> <thing> car", "<thing>_2 car"),
    ("", ""),
]


@pytest.mark.parametrize(("prompt", "rest"), CUTS)
def test_the_end_that_is_not_read_is_named(
    speaking: StableDiffusionPipeline, tmp_path: Path, prompt: str, rest: str
) -> None:
    assert cutting(speaking.tokenizer)(prompt) == rest
    speaking.tokenizer.save_pretrained(tmp_path)
    assert Tokenizer(tmp_path, MAX_TOKENS).cut_off(prompt) == rest


def test_of_many_prompts_the_first_few_are_named(
    v1_teacher: StableDiffusionPipeline, capsys: pytest.CaptureFixture
) -> None:
    cut_off = cutting(v1_teacher.tokenizer)
    say_cut(["red", *(f"{LONG} {number}" for number in range(7))], cut_off)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    assert said[0] == f"the prompt '{LONG} 0' is longer than the text encoder reads; cut off: '{REST} 0'"
    assert said[-1] == "7 prompts in all are cut"


def test_of_a_data_set_there_is_a_count(v1_teacher: StableDiffusionPipeline) -> None:
    line = cut_line(["red", LONG, LONG, "car " * 500], cutting(v1_teacher.tokenizer), "captions")
    counted = "2 of 3 captions are longer than the text encoder reads, and are cut"
    assert line == f"{counted}; the first, '{LONG}', loses '{REST}'"
    assert cut_line(["red"], cutting(v1_teacher.tokenizer), "captions") is None


SAID = f"the prompt '{LONG}' is longer than the text encoder reads; cut off: '{REST}'"
COUNTED = f"1 of 2 prompts are longer than the text encoder reads, and are cut; the first, '{LONG}', loses '{REST}'"


def test_generate_names_it(done: Run, exported_model: Path, onnx_folder: Path, tmp_path: Path) -> None:
    for model in (exported_model, onnx_folder):
        words = ["--prompt", "red", LONG, "--images_per_prompt", 2, "--steps", 1, "--out", tmp_path / model.name]
        assert done("generate", model, *words).said == [SAID]
    assert not done("generate", exported_model, "--prompt", "red", "--steps", 1, "--out", tmp_path / "short").said


def test_the_torch_free_command_names_it(onnx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", LONG, "--steps", "1", "--threads", "1", "--out", str(tmp_path / "x.png")]
    assert main([str(onnx_folder), *words]) == 0
    assert capsys.readouterr().err == (f"the model reads no more than the beginning of the prompt; cut off: '{REST}'\n")


def test_evaluate_counts_them(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"red\n{LONG}\n")
    words = ["--reference", pictures, "--prompts", tmp_path / "prompts.txt", "--encoder", "emoji", "--latency", 0]
    words += ["--scores", "clip_score", "--steps", 1, "--resamples", 2, "--out", tmp_path / "out"]
    assert COUNTED in done("evaluate", exported_model, *words).said


def test_prepare_and_distill_count_captions(
    done: Run, exported_model: Path, exported_student: Path, tmp_path: Path
) -> None:
    lines = [f'{{"file_name": "{number}.png", "text": "{text}"}}\n' for number, text in enumerate(("red", LONG))]
    data = captioned(tmp_path / "data", [PICTURE, PICTURE], "".join(lines))
    said = done("prepare", data, "--teacher", exported_model, "--workers", 0, "--out", tmp_path / "latents").said
    assert said == ["1 of 2 captions are longer than the text encoder reads, and are cut"]
    for number, where in enumerate((data, tmp_path / "latents")):
        words = ["--student", exported_student, "--data", where, "--steps", 1, "--batch_size", 1, "--accumulation", 1]
        words += ["--sample_every", 0, "--out", tmp_path / f"run-{number}"]
        assert COUNTED.replace("prompts", "captions") in done("distill", exported_model, *words).said


def test_personalize_names_it(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["--images", pictures, "--prompt", f"sks {LONG}", "--class_images", 0, "--views", 1, "--steps", 1]
    said = done("personalize", exported_model, *words, "--out", tmp_path / "run").said
    assert any(line.startswith(f"the prompt 'sks {LONG}' is longer than the text encoder reads") for line in said)


def test_a_tokenizer_without_saved_words_is_as_before(v1_teacher: StableDiffusionPipeline) -> None:
    assert torch.equal(tokenizing(v1_teacher.tokenizer)(LONG), tokenize(v1_teacher.tokenizer, LONG))
