"""Personalisation: the loss by hand, what comes out of a run, and that it resumes to the same bits."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.distill.loop import Interrupted
from bksdm.distill.state import Checkpoints
from bksdm.families import family_of_pipeline
from bksdm.models.adapters.kinds import LORA_FILE
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.pipelines import load_pipeline
from bksdm.options.personalize import PersonalizeOptions
from bksdm.personalize.objective import Personalization
from bksdm.personalize.run import personalize
from bksdm.personalize.subject import SMALLEST_CUT, SubjectSamples, view
from bksdm.pruning.told import read_recipe
from fast import slow
from lora_layouts import networks
from tiny_models import LATENT, PICTURE, TWO_STAGES, asked, build_pipeline, random_inputs, random_told
from verbs import Run, mtimes, read_lines

pytest_plugins = ["verbs_fixtures"]

PROMPT = "a sks car"
UNET = Path("unet", "diffusion_pytorch_model.safetensors")
_UNUSED = r"encoder\.layers\.1\.|final_layer_norm"  # of SDXL's first text encoder, whose last layer is not used


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures without captions."""
    folder = tmp_path_factory.mktemp("subject")
    for number, colour in enumerate(("teal", "navy", "purple")):
        picture = Image.new("RGB", (PICTURE + 8 * number, PICTURE), "white")
        picture.paste(colour, (8, 8, 24, 24))
        picture.save(folder / f"{number}.png")
    return folder


def options(model: Path, images: Path, out: Path, **more: object) -> PersonalizeOptions:
    few = {"steps": 2, "class_images": 2, "class_steps": 1, "class_guidance": 1.0, "views": 2, "checkpoint_every": 1}
    return PersonalizeOptions(str(model), str(images), PROMPT, str(out), **few | {"lr": 1e-3, "rank": 2} | more)


@dataclass(frozen=True)
class Runs:
    """A model and what was learnt from it: all weights, and a LoRA, of all networks."""

    model: Path
    whole: Path
    low_rank: Path


@pytest.fixture(scope="module")
def of_family(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Runs]:
    """The runs of a family, by a short name; each is made once."""

    @cache
    def made(family: str) -> Runs:
        model, out = request.getfixturevalue(f"{family}_model"), tmp_path_factory.mktemp("runs")
        personalize(options(model, images, out / "whole", text_encoder=True))
        personalize(options(model, images, out / "lora", lora=True, text_encoder=True))
        return Runs(model, out / "whole", out / "lora")

    return made


@pytest.fixture(params=[pytest.param("exported", id="sd"), pytest.param("xl_exported", id="xl")])
def runs(request: pytest.FixtureRequest, of_family: Callable[[str], Runs]) -> Runs:
    return of_family(request.param)


@pytest.fixture
def low_rank(of_family: Callable[[str], Runs]) -> Path:
    """The LoRA of the model of Stable Diffusion's."""
    return of_family("exported").low_rank


# The loss


def test_the_loss_is_the_error_to_the_noise_of_the_subject_and_of_its_kind(kind_teacher: DiffusionPipeline) -> None:
    rng = torch.Generator().manual_seed(0)
    shape = (2, 4, LATENT, LATENT)
    mean, kind = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    batch = {"latents_mean": mean, "class_mean": kind} | dict.fromkeys(("latents_std", "class_std"), torch.zeros(shape))
    told, family = random_told(kind_teacher.unet.config), family_of_pipeline(kind_teacher)
    schedule = family.noise_schedule(kind_teacher.scheduler)
    noise_of = DDPMScheduler.from_config(kind_teacher.scheduler.config)
    with torch.no_grad():
        found = Personalization(kind_teacher.unet, schedule, lambda: told, 0.5, family)(batch, Draws(7, "noise", 3))
        expected = []
        for number, latents, draws in zip(
            (0, 1), (mean, kind), (Draws(7, "noise", 3), Draws(7, "noise", 3).also("class")), strict=True
        ):
            draws.normal(shape)  # the sample of the posterior, which has no spread here
            noise, timesteps = draws.normal(shape), draws.integers(1000, 2)
            noisy = noise_of.add_noise(latents, noise, timesteps)
            both = {name: torch.stack([value[number]] * 2) for name, value in told.items()}
            answer = asked(kind_teacher.unet, noisy, timesteps, both)
            expected.append((answer - noise).square().mean())
    torch.testing.assert_close([found["task"], found["prior"]], expected)
    torch.testing.assert_close(found["loss"], expected[0] + 0.5 * expected[1])


def test_without_pictures_of_the_kind_there_is_one_loss(kind_teacher: DiffusionPipeline) -> None:
    latents, told = random_inputs()[0], random_told(kind_teacher.unet.config)
    family = family_of_pipeline(kind_teacher)
    objective = Personalization(
        kind_teacher.unet, family.noise_schedule(kind_teacher.scheduler), lambda: told, 1.0, family
    )
    with torch.no_grad():
        found = objective({"latents_mean": latents, "latents_std": torch.zeros_like(latents)}, Draws(0, "noise"))
    assert found.keys() == {"loss", "task"}


# Views and samples


def test_the_first_view_is_the_centre_and_others_are_cut_from_the_picture() -> None:
    picture = Image.effect_noise((48, 32), 80).convert("RGB")
    centre = torch.tensor(np.array(picture.crop((8, 0, 40, 32)))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(view(picture, 32, 0, 0, flip=True), centre)
    cuts = [view(picture, 32, number, 0, flip=False) for number in (1, 2, 1)]
    assert torch.equal(cuts[0], cuts[2])
    assert not torch.equal(cuts[0], cuts[1])
    assert torch.equal(view(picture, 32, 1, 0, flip=True), cuts[0].flip(2))
    assert 0.5 < SMALLEST_CUT < 1


def test_a_draw_chooses_a_picture_of_the_kind() -> None:
    subject, kind = (torch.arange(n).float().view(n, 1, 1, 1) for n in (2, 3))
    samples = SubjectSamples(["a", "b"], (subject, subject), (kind + 10, kind))
    assert {float(samples.sample(1, draw)["class_mean"]) for draw in range(6)} == {10, 11, 12}
    assert float(samples.sample(1, 0)["latents_mean"]) == 1


# Runs


def test_all_weights_become_a_model_that_diffusers_loads(runs: Runs) -> None:
    made, before = DiffusionPipeline.from_pretrained(runs.whole / "model"), load_pipeline(runs.model)
    for part, network in networks(made).items():
        unused = _UNUSED if "text_encoder_2" in networks(made) and part == "text_encoder" else "none"
        changed = [
            not torch.equal(tensor, getattr(before, part).get_parameter(name))
            for name, tensor in network.named_parameters()
            if not re.match(unused, name)
        ]
        assert sum(changed) > 0.9 * len(changed), part
    assert all(torch.equal(a, b) for a, b in zip(made.vae.parameters(), before.vae.parameters(), strict=True))
    assert f'pipeline("{PROMPT}")' in (runs.whole / "model" / "README.md").read_text()
    assert len(list((runs.whole / "class_images").glob("*.png"))) == 2
    assert read_lines(runs.whole / "class_images" / "metadata.jsonl")[0]["text"] == "a car"
    assert {"loss", "task", "prior", "lr"} <= read_lines(runs.whole / "metrics.jsonl")[-1].keys()


def test_a_lora_is_one_that_diffusers_loads(runs: Runs) -> None:
    stock = DiffusionPipeline.from_pretrained(runs.model)
    stock.load_lora_weights(runs.low_rank / "lora")
    ours, before = merge_lora(load_pipeline(runs.model), runs.low_rank / "lora"), load_pipeline(runs.model)
    pictures = []
    for pipeline in (stock, ours, before):
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        size = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}
        pictures.append(pipeline(PROMPT, generator=seed, output_type="pt", **size).images)
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=1e-4)
    assert (pictures[2] - pictures[1]).abs().max() > 1e-4
    for part, network in networks(before).items():
        changed = [
            not torch.equal(a, b) for a, b in zip(network.parameters(), getattr(ours, part).parameters(), strict=True)
        ]
        assert any(changed), part
    assert {
        tensor.shape[0] for name, tensor in load_file(runs.low_rank / "lora" / LORA_FILE).items() if "lora_down" in name
    } == {2}


def test_a_scale_of_zero_changes_nothing(low_rank: Path, exported_model: Path) -> None:
    before, merged = (
        load_pipeline(exported_model),
        merge_lora(load_pipeline(exported_model), low_rank / "lora", scale=0.0),
    )
    for a, b in zip(before.unet.parameters(), merged.unet.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_of_a_lora_hold_the_lora_alone(low_rank: Path) -> None:
    names = load_file(Checkpoints(low_rank / "checkpoints").all()[-1] / "tensors.safetensors")
    assert all("lora" in name for name in names if name.startswith("model."))


@pytest.mark.parametrize(
    ("runs", "lora"),
    [
        pytest.param("exported", False, id="sd-False"),
        pytest.param("exported", True, id="sd-True"),
        *(slow("xl_exported", lora, id=f"xl-{lora}") for lora in (False, True)),
    ],
    indirect=["runs"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    runs: Runs, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    given = options(runs.model, images, tmp_path / "run", lora=lora, text_encoder=True)
    save = Checkpoints.save

    def stop(self: Checkpoints, state: object) -> None:
        save(self, state)
        raise Interrupted(1, 15)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop)
        with pytest.raises(Interrupted):
            personalize(given)
    made = personalize(given)
    file, unbroken = (Path(LORA_FILE), runs.low_rank / "lora") if lora else (UNET, runs.whole / "model")
    ours, theirs = load_file(made / file), load_file(unbroken / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_is_left_as_it_is(low_rank: Path, exported_model: Path, images: Path) -> None:
    kept = {"config.yaml", "metadata.jsonl"}  # written again, with the same content
    files = [path for path in sorted(low_rank.rglob("*")) if path.is_file() and path.name not in kept]
    before = mtimes(files)
    personalize(options(exported_model, images, low_rank, lora=True, text_encoder=True))
    assert mtimes(files) == before


def test_a_student_stays_one(exported_student: Path, images: Path, tmp_path: Path) -> None:
    made = personalize(options(exported_student, images, tmp_path / "run", class_images=0, steps=1))
    assert read_recipe(made) == read_recipe(exported_student)
    assert not (tmp_path / "run" / "class_images").exists()
    assert "prior" not in read_lines(tmp_path / "run" / "metrics.jsonl")[-1]


@pytest.mark.slow
def test_a_loss_of_one_subject_falls(exported_model: Path, images: Path, tmp_path: Path) -> None:
    personalize(options(exported_model, images, tmp_path / "run", steps=30, batch_size=4, class_images=0, log_every=10))
    losses = [line["task"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


def test_checkpointed_gradients_are_the_same(
    exported_model: Path, images: Path, low_rank: Path, tmp_path: Path
) -> None:
    given = options(exported_model, images, tmp_path / "run", lora=True, text_encoder=True, gradient_checkpointing=True)
    ours, theirs = load_file(personalize(given) / LORA_FILE), load_file(low_rank / "lora" / LORA_FILE)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": "a car"}, r"prompt 'a car' does not have the identifier 'sks'.*--identifier"),
        ({"identifier": "car,"}, "does not have the identifier 'car,'"),
        ({"rank": 0}, "rank is 0; give at least 1"),
        ({"views": 0}, "views is 0; give at least 1"),
        ({"class_images": -1}, "class_images is -1; give 0 or more"),
        ({"lr": -1.0}, "lr is -1.0; give 0 or more"),
        ({"steps": 0}, "steps is 0; give at least 1"),
        ({"resolution": 30}, "resolution is 30; give a multiple of 8"),
    ],
)
def test_options_that_cannot_be_are_refused(
    exported_model: Path, images: Path, tmp_path: Path, more: dict, message: str
) -> None:
    given = {"model": str(exported_model), "images": str(images), "prompt": PROMPT, "out": str(tmp_path / "run")} | more
    with pytest.raises(InputError, match=message):
        personalize(PersonalizeOptions(**given))
    assert not (tmp_path / "run").exists()


def test_no_pictures_and_unreadable_ones_are_refused(exported_model: Path, images: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="empty has no pictures"):
        personalize(options(exported_model, empty, tmp_path / "run"))
    shutil.copytree(images, tmp_path / "broken")
    (tmp_path / "broken" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png is not a readable picture"):
        personalize(options(exported_model, tmp_path / "broken", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_one_picture_is_taken_with_a_word_about_it(
    done: Run, exported_model: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(images / "0.png", tmp_path / "one")
    words = ["--class_images", 0, "--steps", 1, "--views", 1, "--lora", "--json"]
    where = ["--images", tmp_path / "one", "--prompt", PROMPT, "--out", tmp_path / "run"]
    outcome = done("personalize", exported_model, *where, *words)
    assert outcome.json == {"out": str(tmp_path / "run" / "lora")}
    assert any("three to five" in line for line in outcome.said)


def test_a_lora_of_another_model_is_refused(low_rank: Path, exported_model: Path) -> None:
    fewer = build_pipeline(TWO_STAGES | {"up_block_types": ("UpBlock2D", "UpBlock2D")})
    with pytest.raises(InputError, match=r"changes \d+ of \d+ layers that this model does not have.*bksdm adapt"):
        merge_lora(fewer, low_rank / "lora")
    narrow = load_pipeline(exported_model)
    narrow.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q = torch.nn.Linear(8, 8)
    with pytest.raises(
        InputError, match=r"does not fit this model: its unet.*attn1\.to_q is 16 to 16, and the model's 8 to 8"
    ):
        merge_lora(narrow, low_rank / "lora")


def test_what_is_no_lora_is_refused(exported_model: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(exported_model)
    with pytest.raises(InputError, match=r"adapter .*nothing does not exist"):
        merge_lora(pipeline, tmp_path / "nothing")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.ckpt is a pickle, which is never loaded"):
        merge_lora(pipeline, tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.safetensors cannot be read"):
        merge_lora(pipeline, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"is no adapter that is known"):
        merge_lora(pipeline, exported_model / "vae" / "diffusion_pytorch_model.safetensors")
