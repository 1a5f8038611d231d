"""Scores against their formulas, and `bksdm evaluate` on a handful of real pictures."""

import csv
import itertools
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bksdm.common.assets import asset
from bksdm.data.folder import read_captions
from bksdm.data.prompts import read_prompts
from bksdm.evaluate import blocks
from bksdm.evaluate.blocks import Blocks
from bksdm.evaluate.encoder import DualEncoder, cosine
from bksdm.evaluate.inception import Inception
from bksdm.evaluate.output_error import output_error
from bksdm.evaluate.run import evaluate
from bksdm.evaluate.scores import (
    Estimate,
    Resampling,
    clip_score,
    differences,
    frechet_distance,
    mean_of,
    retrieval_r1,
)
from bksdm.evaluate.sources import named
from bksdm.evaluate.table import csv_table, text_table
from bksdm.families.recipe import load_recipe
from bksdm.models.configs import load_denoiser_config
from bksdm.options.evaluate import EvaluateOptions
from bksdm.pruning.cost import unet_cost
from bksdm.pruning.inherit import prune_unet
from fast import slow
from verbs import Run, captioned, copy_pictures, mtimes

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

HELD_OUT = asset("emoji", "art", "heldout")


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64)
    return shift + scale * torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing


def frechet_by_symmetric_roots(a: Tensor, b: Tensor) -> float:
    """The formula with (S^1/2 T S^1/2)^1/2, whose trace is that of (S T)^1/2, by eigenvalues of symmetric matrices."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    s, t = torch.cov(a.T), torch.cov(b.T)
    cross = root(root(s) @ t @ root(s))
    return float((a.mean(0) - b.mean(0)).square().sum() + torch.trace(s + t - 2 * cross))


@pytest.mark.parametrize(("n", "d"), [(200, 4), (50, 8), (20, 32)])
def test_the_frechet_distance_is_its_formula(n: int, d: int) -> None:
    a, b = features(n, d, 0), features(n, d, 1, scale=2.0, shift=0.5)
    assert frechet_distance(a, b) == pytest.approx(frechet_by_symmetric_roots(a, b), rel=1e-5)


def test_the_frechet_distance_of_the_same_pictures_is_zero() -> None:
    a = features(100, 6, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    a = features(100, 6, 0)
    assert frechet_distance(a + 3, a) == pytest.approx(6 * 9, rel=1e-6)


def test_the_clip_score_is_the_mean_cosine() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx(0.5)


def test_retrieval_counts_the_pictures_whose_own_caption_is_nearest() -> None:
    names = [f"caption {number}" for number in range(10)]
    pool = dict(zip(names, torch.eye(10), strict=True))
    images = torch.eye(10)
    assert retrieval_r1(images, names, pool, among=10) == 1
    assert retrieval_r1(images.roll(1, dims=0), names, pool, among=10) == 0
    half = torch.cat([images[:5], images[5:].roll(1, dims=0)])
    assert retrieval_r1(half, names, pool, among=10) == 0.5


def test_retrieval_among_fewer_captions_is_easier() -> None:
    names = [f"caption {number}" for number in range(50)]
    pool = dict(zip(names, features(50, 16, 0).float(), strict=True))
    images = torch.stack(list(pool.values())) + features(50, 16, 1, scale=2).float()
    few, many = (retrieval_r1(images, names, pool, among=n) for n in (2, 50))
    assert many < few


def test_a_caption_without_rivals_is_always_the_best() -> None:
    pool = {"red": torch.ones(4)}
    assert retrieval_r1(torch.randn(3, 4), ["red"] * 3, pool, among=1) == 1


def test_retrieval_never_draws_a_pictures_own_caption_as_a_rival() -> None:
    names = [f"caption {number}" for number in range(5)]
    pool = dict(zip(names, torch.eye(5), strict=True))
    assert retrieval_r1(torch.eye(5), names, pool, among=2) == 1


def test_retrieval_is_the_mean_over_all_draws_of_rivals() -> None:
    names = [f"caption {number}" for number in range(6)]
    pool = dict(zip(names, features(6, 4, 0).float(), strict=True))
    images = torch.stack(list(pool.values())) + features(6, 4, 1).float()
    similar = cosine(images, torch.stack(list(pool.values())))
    hits = [
        all(similar[own, own] > similar[own, other] for other in rivals)
        for own in range(6)
        for rivals in itertools.combinations([n for n in range(6) if n != own], 2)
    ]
    assert 0 < sum(hits) < len(hits)
    assert retrieval_r1(images, names, pool, among=3) == pytest.approx(sum(hits) / len(hits))


def test_features_do_not_depend_on_what_stands_beside() -> None:
    encoder = DualEncoder.load("emoji")
    entries = read_captions(HELD_OUT)[:3]
    images, texts = [entry.open() for entry in entries], [entry.text for entry in entries]
    for together, alone in (
        (encoder.image_features(images), [encoder.image_features([image]) for image in images]),
        (encoder.text_features(texts), [encoder.text_features([text]) for text in texts]),
    ):
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_embedded_encoder_knows_real_art() -> None:
    encoder = DualEncoder.load("emoji")
    entries = read_captions(HELD_OUT)
    images = encoder.image_features([entry.open() for entry in entries])
    similar = cosine(images, encoder.text_features([entry.text for entry in entries]))
    own = similar.diagonal().mean()
    others = (similar.sum() - similar.diagonal().sum()) / (similar.numel() - len(entries))
    assert own > others + 0.3


def test_a_teacher_has_no_output_error_and_a_pruned_one_has(exported: StableDiffusionPipeline, pictures: Path) -> None:
    entries = read_captions(pictures)
    student, _ = prune_unet(exported.unet, load_recipe("small"))
    assert output_error(exported.unet, exported, entries) == 0
    assert output_error(student, exported, entries) > 1e-4


def test_the_output_error_is_the_same_for_the_same_seed(exported: StableDiffusionPipeline, pictures: Path) -> None:
    entries = read_captions(pictures)
    student, _ = prune_unet(exported.unet, load_recipe("small"))
    first, again, other = (output_error(student, exported, entries, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


# The verb

QUICK = ("--scores", "frechet_distance", "clip_score", "--encoder", "emoji", "--steps", 1, "--latency", 0)
QUICK += ("--resamples", 10)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return copy_pictures(HELD_OUT, tmp_path / "reference", 4)


def scores_of(result: Any, model: str | None = None) -> dict[str, float]:
    """Name -> value of a model's scores; of the first by default."""
    models = result["models"]
    return {name: item["value"] for name, item in models[model or next(iter(models))]["scores"].items()}


def test_evaluate_writes_its_scores_and_prints_the_same(done: Run, exported_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    reference = copy_pictures(HELD_OUT, tmp_path / "reference", 12)
    models = (f"mine={exported_model}", "--teacher", exported_model)
    words = ("evaluate", *models, "--reference", reference, "--encoder", "emoji", "--out", out)
    asked = ("frechet_distance", "kernel_distance", "precision", "recall", "clip_score", "retrieval_r1", "output_error")
    printed = done(
        *words, "--distractors", "emoji/train", "--scores", *asked, "--steps", 1, "--latency", 1, "--json"
    ).json
    assert printed == json.loads((out / "scores.json").read_text())
    model = printed["models"]["mine"]
    assert model["pictures"] == 12
    assert list(model["scores"]) == list(asked)
    for item in model["scores"].values():
        assert item["low"] <= item["value"] <= item["high"]
    assert model["scores"]["output_error"]["value"] == 0
    assert model["scores"]["clip_score"]["deviation"] > 0
    assert model["params"] == unet_cost(load_denoiser_config(exported_model)).params
    assert model["seconds_per_picture"] > 0
    assert set(printed["reference"]["scores"]) == {"clip_score", "retrieval_r1"}
    assert printed["protocol"]["retrieval_among"] == 100
    assert len(list((out / "models" / "mine" / "pictures").glob("*.png"))) == 12
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert {row["score"]: float(row["value"]) for row in rows if row["model"] == "mine"} == scores_of(printed)


@pytest.fixture(scope="module")
def charted(exported_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of one model. Not to be changed."""
    out = tmp_path_factory.mktemp("charted") / "scores"
    asked = {"scores": ["clip_score"], "encoder": "emoji", "steps": 1, "latency": 0, "resamples": 10}
    evaluate(EvaluateOptions([str(exported_model)], str(out), str(pictures), **asked))
    return out


def test_quality_against_cost_is_a_picture_and_on_the_page(charted: Path) -> None:
    with Image.open(charted / "quality.png") as plot:
        assert plot.format == "PNG"
    assert "<svg" in (charted / "report.html").read_text()


def test_a_pruned_model_is_worse_than_its_teacher(
    done: Run, exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    words = (
        "--reference",
        pictures,
        "--teacher",
        exported_model,
        *QUICK,
        "--scores",
        "clip_score",
        "output_error",
        "--json",
    )
    models = (f"teacher={exported_model}", f"student={exported_student}")
    result = done("evaluate", *models, *words, "--json", "--out", tmp_path / "scores").json
    assert list(result["models"]) == ["teacher", "student"]
    assert scores_of(result, "teacher")["output_error"] == 0
    assert scores_of(result, "student")["output_error"] > 1e-4
    compared = {item["score"]: item for item in result["differences"]}
    assert (compared["output_error"]["first"], compared["output_error"]["second"]) == ("teacher", "student")
    assert compared["output_error"]["difference"] == pytest.approx(scores_of(result, "student")["output_error"])
    assert compared["output_error"]["real"]


def test_the_same_command_makes_no_picture_again(
    done: Run, exported_model: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("evaluate", exported_model, "--reference", pictures, *QUICK, "--out", tmp_path / "scores", "--json")
    first = done(*words).json
    made = sorted((tmp_path / "scores" / "models").rglob("*.png"))
    assert len(made) == 8
    before = mtimes(made)
    again = done(*words, "--batch_size", 3).json
    assert again["models"] == first["models"]
    assert mtimes(made) == before


def test_the_frechet_distance_has_its_interval_by_influence_or_by_resamples(
    done: Run, pictures: Path, tmp_path: Path
) -> None:
    reference = copy_pictures(HELD_OUT, tmp_path / "reference", 12)
    out = tmp_path / "scores"
    words = ("evaluate", f"mine={pictures}", "--reference", reference, *QUICK, "--out", out, "--json")
    found, pages = {}, {}
    for way in ("influence", "bootstrap"):
        result = done(*words, *([] if way == "influence" else ["--intervals", way])).json
        assert result["protocol"]["intervals"] == way
        found[way], pages[way] = result["models"]["mine"]["scores"], (out / "report.html").read_text()
    assert [scores["frechet_distance"]["by"] for scores in found.values()] == list(found)
    assert found["influence"]["clip_score"] == found["bootstrap"]["clip_score"]
    assert found["influence"]["clip_score"]["by"] == "bootstrap"
    distances = [scores["frechet_distance"] for scores in found.values()]
    assert distances[0]["value"] == pytest.approx(distances[1]["value"])
    assert distances[0]["deviation"] > 0
    assert "by its influence function" in pages["influence"]
    assert "by its influence function" not in pages["bootstrap"]


def test_another_model_joins_those_that_were_drawn(
    done: Run, exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("--reference", pictures, *QUICK, "--out", tmp_path / "scores", "--json")
    alone = done("evaluate", f"teacher={exported_model}", *words).json
    made = sorted((tmp_path / "scores" / "models").rglob("*.png"))
    before = mtimes(made)
    both = done("evaluate", f"teacher={exported_model}", f"student={exported_student}", *words).json
    assert both["models"]["teacher"] == alone["models"]["teacher"]
    assert mtimes(made) == before
    page = (tmp_path / "scores" / "report.html").read_text()
    assert len(re.findall('alt="teacher: ', page)) == len(re.findall('alt="student: ', page)) == 8


def test_more_scores_draw_nothing_again(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("evaluate", exported_model, "--reference", pictures, *QUICK, "--out", tmp_path / "scores")
    done(*words)
    before = mtimes(sorted((tmp_path / "scores" / "models").rglob("*.safetensors")))
    found = scores_of(done(*words, "--scores", "recall", "--json").json)
    assert set(found) == {"frechet_distance", "recall", "clip_score"}
    assert mtimes(sorted((tmp_path / "scores" / "models").rglob("*.safetensors"))) == before


def test_the_output_error_alone_needs_no_encoder(
    done: Run, exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    words = (
        "--reference",
        pictures,
        "--teacher",
        exported_model,
        "--scores",
        "output_error",
        "--steps",
        1,
        "--latency",
        0,
    )
    result = done("evaluate", exported_student, *words, "--out", tmp_path / "scores", "--json").json
    assert list(scores_of(result)) == ["output_error"]


def test_a_model_that_changed_is_not_mixed_with_what_it_drew_before(
    run: Run, done: Run, exported_model: Path, v2_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("--reference", pictures, *QUICK, "--out", tmp_path / "scores")
    done("evaluate", f"mine={exported_model}", *words)
    outcome = run("evaluate", f"mine={v2_folder}", *words)
    assert outcome.code == 2
    assert "models/mine holds another run (the content of model has changed since)" in outcome.said[-1]


def test_finished_pictures_are_scored_as_the_model_that_drew_them(
    done: Run, exported_model: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("--reference", pictures, *QUICK, "--out", tmp_path / "scores", "--json")
    drawn = done("evaluate", f"drawn={exported_model}", *words).json
    folder = tmp_path / "scores" / "models" / "drawn" / "pictures"
    both = done("evaluate", f"drawn={exported_model}", f"finished={folder}", *words).json
    assert scores_of(both, "finished") == scores_of(drawn)
    assert {item["difference"] for item in both["differences"]} == {0}
    assert not any(item["real"] for item in both["differences"])


def test_pictures_without_captions_are_compared_and_not_read(done: Run, pictures: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in pictures.glob("*.png"):
        shutil.copy(path, bare)
    result = done("evaluate", bare, "--reference", pictures, *QUICK, "--out", tmp_path / "scores", "--json").json
    assert scores_of(result) == {"frechet_distance": pytest.approx(0, abs=1e-4)}


def test_finished_pictures_meet_their_prompts_by_the_numbers_in_their_names(done: Run, tmp_path: Path) -> None:
    """`2.png` is the third picture of twelve, and not the fifth as by its letters."""
    reference = copy_pictures(HELD_OUT, tmp_path / "reference", 12)
    bare = tmp_path / "bare"
    bare.mkdir()
    entries = read_captions(reference)
    for number, entry in enumerate(entries):
        shutil.copy(entry.path, bare / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("".join(entry.text + "\n" for entry in entries))
    words = (f"captioned={reference}", f"numbered={bare}", "--prompts", tmp_path / "prompts.txt", *QUICK)
    result = done("evaluate", *words, "--reference", reference, "--out", tmp_path / "scores", "--json").json
    assert scores_of(result, "numbered") == scores_of(result, "captioned")
    assert scores_of(result, "numbered")["clip_score"] > 0.5


def test_pictures_that_have_no_plain_order_are_not_matched_to_prompts(run: Run, pictures: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("1.png", "01.png", "2.png"):
        shutil.copy(pictures / "1.png", bare / name)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    words = ("evaluate", bare, "--reference", pictures, *QUICK, "--out", tmp_path / "scores")
    assert run(*words).code == 0, "without prompts the order does not matter"
    outcome = run(*words[:-1], tmp_path / "other", "--prompts", tmp_path / "prompts.txt")
    message = f"bksdm: {bare} has 01.png and 1.png, and nothing says which comes first; rename one"
    assert (outcome.code, outcome.said) == (2, [message])


@pytest.mark.usefixtures("own_data_cache")
@pytest.mark.parametrize("layout", ["tar", slow("beside"), slow("parquet")])
def test_the_reference_may_have_any_layout_of_data(done: Run, pictures: Path, tmp_path: Path, layout: str) -> None:
    found = []
    for out, reference in (("a", pictures), ("b", laid_out(pictures, tmp_path / "data", layout))):
        words = ("--reference", reference, *QUICK, "--resamples", 10, "--out", tmp_path / out, "--json")
        found.append(done("evaluate", f"finished={pictures}", *words).json)
    assert found[0]["models"] == found[1]["models"]
    assert found[0]["reference"] == found[1]["reference"]


def test_the_report_shows_the_pictures_of_a_reference_in_a_tar(
    done: Run, exported_model: Path, pictures: Path, tmp_path: Path
) -> None:
    tar = laid_out(pictures, tmp_path / "data", "tar")
    done("evaluate", exported_model, "--reference", tar, *QUICK, "--resamples", 10, "--out", tmp_path / "scores")
    page = (tmp_path / "scores" / "report.html").read_text()
    assert len(re.findall('alt="real" src="data:image/png;base64,', page)) == 8


def laid_out(pictures: Path, folder: Path, layout: str) -> Path:
    """Captioned pictures in another layout."""
    folder.mkdir()
    entries = read_captions(pictures)
    for entry in entries:
        shutil.copy(entry.path, folder)
        (folder / f"{entry.path.stem}.txt").write_text(entry.text)
    if layout == "tar":
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for path in sorted(folder.glob("*.*")):
                tar.add(path, path.name)
        return folder / "00000.tar"
    if layout == "parquet":
        columns = {"image": [entry.path.read_bytes() for entry in entries], "text": [entry.text for entry in entries]}
        pq.write_table(pa.table(columns), folder / "a.parquet")
        return folder / "a.parquet"
    return folder


def test_prompts_may_be_others_than_the_references_captions(
    done: Run, exported_model: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("snail\nhouse\nsnail\ncat\n")
    words = ("--reference", pictures, "--prompts", tmp_path / "prompts.txt", "--limit", 3, "--images_per_prompt", 2)
    words += (*QUICK, "--scores", "clip_score", "retrieval_r1", "--distractors", pictures)
    result = done("evaluate", exported_model, *words, "--out", tmp_path / "scores", "--json").json
    captions = {entry.text for entry in read_captions(pictures)}
    assert result["reference"]["pictures"] == 8
    assert result["protocol"]["retrieval_among"] == len(captions | {"snail", "house"})
    (model,) = result["models"].values()
    assert model["pictures"] == 6
    assert len(model["scores"]["clip_score"]["seeds"]) == 2
    folder = next((tmp_path / "scores" / "models").iterdir()) / "pictures"
    assert [entry.text for entry in read_captions(folder)] == ["snail", "snail", "house", "house", "snail", "snail"]


def test_the_captions_of_ms_coco_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "captions_val2014.json"
    rows = [(7, "a  cat \n"), (3, "a dog"), (7, "the same cat"), (9, "a bird")]
    file.write_text(json.dumps({"annotations": [{"image_id": image, "caption": text} for image, text in rows]}))
    assert read_prompts(file) == ["a cat", "a dog", "a bird"]


def test_a_reference_with_one_caption_can_be_scored(done: Run, exported_model: Path, tmp_path: Path) -> None:
    reference = captioned(tmp_path / "reds", [Image.new("RGB", (32, 32), colour) for colour in ("red", "darkred")])
    words = (*QUICK, "--reference", reference, "--scores", "retrieval_r1", "--out", tmp_path / "scores", "--json")
    result = done("evaluate", exported_model, *words).json
    assert (result["protocol"]["retrieval_among"], scores_of(result)["retrieval_r1"]) == (1, 1.0)


def test_an_encoder_may_be_given_as_a_folder(done: Run, exported_model: Path, reference: Path, tmp_path: Path) -> None:
    words = ("evaluate", exported_model, "--reference", reference, *QUICK, "--features", "emoji", "--json")
    embedded = done(*words, "--out", tmp_path / "a").json
    folder = asset("emoji", "encoder")
    given = done(*words, "--out", tmp_path / "b", "--encoder", folder, "--features", folder).json
    assert given["models"] == embedded["models"]


def test_an_encoder_as_todays_transformers_writes_it_is_the_same(tmp_path: Path) -> None:
    """One `processor_config.json` in the place of `preprocessor_config.json`."""
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    old = Path(shutil.copytree(asset("emoji", "encoder"), tmp_path / "old"))
    (old / "preprocessor_config.json").write_text(json.dumps(colours))
    processor = CLIPProcessor(CLIPImageProcessorPil(**colours), CLIPTokenizer.from_pretrained(old))
    processor.save_pretrained(tmp_path / "new")
    CLIPModel.from_pretrained(old).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "preprocessor_config.json").exists()
    ours, theirs = DualEncoder.load(tmp_path / "new"), DualEncoder.load(old)
    assert torch.allclose(ours.mean.flatten(), torch.tensor(colours["image_mean"]))
    assert torch.equal(ours.std, theirs.std)
    entries = read_captions(HELD_OUT)[:3]
    images, texts = [entry.open() for entry in entries], [entry.text for entry in entries]
    assert torch.equal(ours.image_features(images), theirs.image_features(images))
    assert torch.equal(ours.text_features(texts), theirs.text_features(texts))


def test_the_papers_protocol_by_hand(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    network, weights = Inception.random(), tmp_path / "inception.safetensors"
    save_file(network.state_dict(), weights)
    asked = ("frechet_distance", "kernel_distance", "inception_score")
    reference = copy_pictures(pictures, tmp_path / "reference", 3)
    words = ("--reference", reference, "--inception_weights", weights, "--scores", *asked, "--limit", 2, "--steps", 1)
    words += ("--latency", 0, "--resamples", 0, "--out", tmp_path / "scores", "--json")
    drawn = done("evaluate", f"drawn={exported_model}", *words).json
    kept = tmp_path / "scores" / "models" / "drawn" / "pictures"
    finished = done("evaluate", f"finished={kept}", *words).json
    assert scores_of(finished) == scores_of(drawn)

    def pixels(files: list[Path], *, real: bool) -> Tensor:
        prepared = []
        for file in files:
            step = Image.open(file)
            if not real:
                step.save(tmp_path / "step.jpg")
                step = Image.open(tmp_path / "step.jpg")
            step.resize((256, 256)).save(tmp_path / "last.jpg")
            prepared.append(np.asarray(Image.open(tmp_path / "last.jpg")))
        return torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2)

    ours = pixels(sorted(kept.glob("*.png")), real=False)
    real = pixels([entry.path for entry in read_captions(reference)], real=True)
    by_hand = scores_of(drawn)
    a, b = (network(shown).features.double().numpy() for shown in (ours, real))
    # The trace of the root of a product of low rank, by the singular values of the centred features' product.
    centred = (a - a.mean(0)) / np.sqrt(len(a) - 1), (b - b.mean(0)) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum(np.square(part).sum() for part in centred)
    assert by_hand["frechet_distance"] == pytest.approx(
        np.square(a.mean(0) - b.mean(0)).sum() + traces - 2 * cross, rel=1e-4
    )
    within = [(x @ x.T / 2048 + 1) ** 3 for x in (a, b)]
    pairs = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    assert by_hand["kernel_distance"] == pytest.approx(
        sum(pairs) - 2 * ((a @ b.T / 2048 + 1) ** 3).mean(), rel=1e-3, abs=1e-6
    )
    assert by_hand["inception_score"] == pytest.approx(1, abs=1e-6)  # two pictures are a split each


def test_statistics_stand_for_the_pictures_they_were_made_from(
    done: Run, exported_model: Path, pictures: Path, tmp_path: Path
) -> None:
    first = done("evaluate", exported_model, "--reference", pictures, *QUICK, "--out", tmp_path / "a", "--json").json
    made = tmp_path / "a" / "reference" / "statistics.npz"
    assert set(np.load(made)) >= {"mu", "sigma"}
    words = (*QUICK, "--prompts", pictures, "--out", tmp_path / "b", "--json")
    again = done("evaluate", exported_model, "--reference", made, *words).json
    assert scores_of(again) == scores_of(first)


def test_pictures_need_not_be_kept(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    many = ("--images_per_prompt", 5, "--keep_pictures", "false")
    done("evaluate", exported_model, "--reference", pictures, *QUICK, *many, "--out", tmp_path / "scores")
    kept = sorted(path.stem for path in (tmp_path / "scores" / "models").rglob("*.png"))
    assert kept == [f"{number:05d}" for number in range(0, 32, 2)]


def test_without_json_there_is_a_table(done: Run, exported_model: Path, reference: Path, tmp_path: Path) -> None:
    out = done("evaluate", f"mine={exported_model}", "--reference", reference, *QUICK, "--out", tmp_path / "a").out
    assert [line.split()[0] for line in out.splitlines()] == ["model", "mine", "real", "report"]


def test_the_batch_size_changes_no_score(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("--reference", pictures, *QUICK, "--limit", 4, "--images_per_prompt", 2, "--json")
    found = [
        scores_of(done("evaluate", exported_model, *words, "--batch_size", size, "--out", tmp_path / str(size)).json)
        for size in (1, 3, 64)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-3)
    assert found[2] == pytest.approx(found[1], rel=1e-3, abs=1e-3)


def test_a_killed_evaluation_ends_with_the_same_digits(
    exported_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(out: str) -> EvaluateOptions:
        return EvaluateOptions(
            [str(exported_model)], str(tmp_path / out), str(pictures), encoder="emoji", scores=["frechet_distance"],
            images_per_prompt=3, steps=1, latency=0, keep_pictures=False,
        )  # fmt: skip

    class Killed(BaseException):
        pass

    monkeypatch.setattr(blocks, "BLOCK", 5)
    whole = evaluate(options("whole"))
    written: list[str] = []
    original = Blocks._write

    def write(store: Blocks, start: int, features: Any) -> None:
        if len(written) % 3 == 2:
            written.append("killed")
            raise Killed
        written.append(store.file(start).name)
        original(store, start, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "_write", write)
        for _ in range(2):
            with pytest.raises(Killed):
                evaluate(options("killed"))
    assert evaluate(options("killed"))["models"] == whole["models"]
    assert written.count("killed") == 2


# Uncertainty


def estimate(value: float, resampled: Tensor, seeds: tuple[float, ...] = ()) -> Estimate:
    return Estimate(value, (resampled - resampled.mean()) / (len(resampled) - 1) ** 0.5, seeds)


def test_what_two_models_share_does_not_blur_their_difference() -> None:
    shared, own = torch.randn(400, generator=torch.Generator().manual_seed(0)), torch.linspace(-0.01, 0.01, 400)
    models = {"a": {"clip_score": estimate(1.0, 1 + shared)}, "b": {"clip_score": estimate(1.1, 1.1 + shared + own)}}
    (found,) = differences(models)
    assert found.difference == pytest.approx(0.1)
    assert found.deviation == pytest.approx(float(own.std()), rel=1e-4)
    assert found.real


def test_a_difference_inside_the_band_from_seed_to_seed_is_none() -> None:
    sure = torch.linspace(-1e-3, 1e-3, 100)
    models = {"a": {"recall": estimate(0.5, sure)}, "b": {"recall": estimate(0.6, sure, seeds=(0.5, 0.7))}}
    assert not differences(models)[0].real


def test_the_interval_holds_the_truth_about_as_often_as_it_says(tmp_path: Path) -> None:
    held = 0
    for seed in range(200):
        values = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        low, high = Resampling.of(range(60), 200, seed).estimate(mean_of(values)).interval
        held += low <= 0 <= high
    assert 0.89 <= held / 200 <= 0.99


# Names and tables


def test_models_are_named_by_their_paths_or_by_the_user() -> None:
    given = ["emoji", "runs/small/student", "CompVis/stable-diffusion-v1-4", "mine=/a/b=c/d", "/x/y.safetensors"]
    assert named(given) == {
        "emoji": "emoji",
        "small-student": "runs/small/student",
        "CompVis-stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
        "mine": "/a/b=c/d",
        "x-y": "/x/y.safetensors",
    }


def test_the_table_has_a_line_a_model_and_one_for_the_real_pictures() -> None:
    scores = {
        "frechet_distance": {"value": 12.5, "deviation": 0.5, "low": 11.5, "high": 13.5},
        "clip_score": {"value": 0.25, "deviation": 0.0, "low": 0.25, "high": 0.25},
    }
    real = {"clip_score": {"value": 0.75, "deviation": 0.0, "low": 0.75, "high": 0.75}}
    result = {"models": {"mine": {"scores": scores}, "yours": {"scores": scores}}, "reference": {"scores": real}}
    lines = text_table(result).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "mine", "yours", "real"]
    assert "12.5 ± 1" in lines[1]
    assert "0.75" in lines[3]
    assert csv_table(result).splitlines()[1] == "mine,frechet_distance,12.5,0.5,11.5,13.5"
