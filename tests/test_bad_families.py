"""What users get wrong about kinds of models: code 2 and one line that names the value, whichever verb meets it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from bksdm.export.ldm import original_tensors
from bksdm.families import family_of
from bksdm.models.pipelines import save_pipeline
from fast import slow
from tiny_models import CONTEXT, XL_SHALLOW_UNET, XL_UNET, build_xl_pipeline
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

INDEX = "model_index.json"
# Told five numbers about pictures, and without attention in its innermost stage.
REFINER_UNET = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 10 * CONTEXT,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 10 * CONTEXT + 5 * 256,
}


@dataclass
class World:
    """What a user has at hand, of both families."""

    tmp: Path
    v1: Path
    xl: Path
    v1_student: Path
    xl_student: Path
    pictures: Path
    xl_pipeline: StableDiffusionXLPipeline

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def built(self, **unet: object) -> Path:
        """A pipeline of SDXL's whose U-Net differs from the teacher's in its config."""
        save_pipeline(build_xl_pipeline(XL_SHALLOW_UNET | unet), self.tmp / "built")
        return self.tmp / "built"

    def copy(self, source: Path | None = None) -> Path:
        return Path(shutil.copytree(source or self.xl, self.tmp / "copy"))

    def changed(self, file: str, **values: object) -> Path:
        """The teacher of SDXL's with other values in a JSON file."""
        folder = self.copy()
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    def without(self, name: str) -> Path:
        folder = self.copy()
        shutil.rmtree(folder / name)
        return folder

    def swapped(self, part: str, other: Path) -> Path:
        """The teacher of SDXL's with a part of another pipeline."""
        folder = self.without(part)
        shutil.copytree(other, folder / part)
        return folder

    def refiner(self) -> Path:
        """A folder as SDXL's refiner has it: no first text encoder."""
        gone = {"text_encoder": [None, None], "tokenizer": [None, None]}
        folder = self.changed(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline", **gone)
        for name in gone:
            shutil.rmtree(folder / name)
        UNet2DConditionModel(**XL_UNET | REFINER_UNET).save_pretrained(folder / "unet")
        return folder

    def refiner_file(self) -> Path:
        """The same as a single file, whose only text encoder is the first."""
        unet = UNet2DConditionModel(**XL_UNET | REFINER_UNET)
        places = family_of(XL_UNET).layout(XL_UNET).parts["unet"].places(unet.state_dict())
        tensors = {
            name.replace("embedders.1.", "embedders.0."): tensor
            for name, tensor in original_tensors(self.xl_pipeline, torch.float32).items()
            if not name.startswith(("model.", "conditioner.embedders.0."))
        }
        save_file(
            tensors | {places[key].name: tensor for key, tensor in unet.state_dict().items()},
            self.tmp / "refiner.safetensors",
        )
        return self.tmp / "refiner.safetensors"

    def describe(self, model: Path, *words: object) -> list[object]:
        return ["describe", model, *words]

    def prune(self, teacher: Path, recipe: str = "small") -> list[object]:
        return ["prune", teacher, "--recipe", recipe, "--out", self.out]

    def distill(self, teacher: Path, student: Path, data: Path | None = None, verb: str = "distill") -> list[object]:
        given = ["--student", student, "--data", data or self.pictures, "--out", self.out, "--resolution", 32]
        return [verb, teacher, *given, "--steps", 1, "--batch_size", 1, "--accumulation", 1, "--sample_every", 0]

    def generate(self, model: Path) -> list[object]:
        return ["generate", model, "--out", self.out, "--steps", 2, "--prompt", "red"]

    def prepare(self, teacher: Path) -> list[object]:
        return ["prepare", self.pictures, "--teacher", teacher, "--out", self.out, "--resolution", 32]


@pytest.fixture
def world(
    tmp_path: Path,
    v1_folder: Path,
    shallow_xl_folder: Path,
    v1_student: Path,
    shallow_xl_student: Path,
    pictures: Path,
    shallow_xl_teacher: StableDiffusionXLPipeline,
) -> World:
    return World(tmp_path, v1_folder, shallow_xl_folder, v1_student, shallow_xl_student, pictures, shallow_xl_teacher)


Build = Callable[[World], list[object]]


def case(name: str, build: Build, *fragments: str) -> object:
    """A command line, and what its message must hold; `{tmp}` is the folder of the test."""
    return pytest.param(build, fragments, id=name)


def each(name: str, model: Callable[[World], Path], *fragments: str, verbs: tuple[str, ...]) -> list[object]:
    """A case for each of these verbs."""
    starts: dict[str, Callable[[World, Path], list[object]]] = {
        "describe": lambda w, at: w.describe(at),
        "prune": lambda w, at: w.prune(at),
        "prepare": lambda w, at: w.prepare(at),
        "distill": lambda w, at: w.distill(at, w.v1_student),
        "generate": lambda w, at: w.generate(at),
    }
    return [case(f"{name}, {verb}", lambda w, go=starts[verb]: go(w, model(w)), *fragments) for verb in verbs]


FIVE = "it is shaped like SDXL's refiner, which takes five numbers about the picture"
ONE_OF = "give one of FluxPipeline, Flux2Pipeline, Flux2KleinPipeline, ZImagePipeline, StableDiffusionXLPipeline, "
CASES = [
    *each("the refiner", World.refiner, "{tmp}/copy has no folder text_encoder", FIVE, verbs=("prune", "generate")),
    *each("the refiner", World.refiner, "this U-Net cannot be pruned", FIVE, verbs=("describe",)),
    *each(
        "the refiner as a file",
        World.refiner_file,
        "{tmp}/refiner.safetensors is not a whole Stable Diffusion checkpoint",
        FIVE,
        verbs=("describe", "prune", "distill"),
    ),
    *each(
        "a U-Net for in-painting",
        lambda w: w.built(in_channels=9),
        "{tmp}/built has a U-Net of 9 channels, and its latents have 4",
        verbs=("distill",),
    ),
    *each(
        "a U-Net for in-painting",
        lambda w: w.built(in_channels=9),
        "{tmp}/built is one for in-painting; give it --image and --mask",
        verbs=("generate",),
    ),
    *(
        case(name, lambda w, name=name: w.prune(w.changed(INDEX, _class_name=name)), f"holds a {name}; {ONE_OF}")
        for name in ("PixArtSigmaPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline")
    ),
    *each(
        "no second text encoder",
        lambda w: w.without("text_encoder_2"),
        "{tmp}/copy has no folder text_encoder_2",
        verbs=("prune", "prepare", "distill", "generate"),
    ),
    *each(
        "no second tokenizer",
        lambda w: w.without("tokenizer_2"),
        "{tmp}/copy has no folder tokenizer_2",
        verbs=("prune", "prepare"),
    ),
    *each(
        "a second tokenizer left out",
        lambda w: shutil.rmtree((folder := w.changed(INDEX, tokenizer_2=[None, None])) / "tokenizer_2") or folder,
        "{tmp}/copy has no folder tokenizer_2; give a whole pipeline",
        verbs=("prune",),
    ),
    *each(
        "another first text encoder",
        lambda w: w.swapped("text_encoder", w.v1 / "text_encoder"),
        "{tmp}/copy does not fit together: its text encoders give embeddings of width 32 and 24, and its U-Net 32",
        verbs=("prune", "prepare", "generate"),
    ),
    *each(
        "another pooled embedding",
        lambda w: w.built(projection_class_embeddings_input_dim=6 * 8 + 12) and w.swapped("unet", w.tmp / "built/unet"),
        "{tmp}/copy does not fit together: its second text encoder gives pooled embeddings of width 16, and its U-Net "
        "takes 12",
        verbs=("prune", "prepare"),
    ),
    *each(
        "a VAE as Playground's",
        lambda w: w.changed("vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "{tmp}/copy does not fit together: its VAE has latents_mean and latents_std, as that of Playground 2.5 has",
        verbs=("prune", "prepare", "generate"),
    ),
    case(
        "a U-Net of Stable Diffusion's in a pipeline of SDXL's",
        lambda w: w.generate(put(w.copy(), w.v1, "unet")),
        "{tmp}/copy is a StableDiffusionXLPipeline around a U-Net of Stable Diffusion 1.x or 2.x",
    ),
    case("a recipe of Stable Diffusion's", lambda w: w.prune(w.xl, "tiny"), "recipe 'tiny' does not fit this teacher"),
    case("a recipe of SDXL's", lambda w: w.prune(w.v1, "ssd-1b"), "recipe 'ssd-1b' does not fit this teacher"),
    *(
        case(
            f"a student of Stable Diffusion's, {verb}",
            lambda w, verb=verb: w.distill(w.xl, w.v1_student, verb=verb),
            "is of Stable Diffusion 1.x or 2.x, and teacher {xl} of SDXL; give a student of its own",
        )
        for verb in ("distill", "lcm")
    ),
    case(
        "a student of SDXL's",
        lambda w: w.distill(w.v1, w.xl_student),
        "student {xl_student} is of SDXL, and teacher {v1} of Stable Diffusion 1.x or 2.x",
    ),
]


def put(folder: Path, other: Path, part: str) -> Path:
    """A folder with a part of another."""
    shutil.rmtree(folder / part)
    shutil.copytree(other / part, folder / part)
    return folder


@pytest.mark.parametrize(("build", "fragments"), CASES)
def test_each_is_code_2_and_one_line(world: World, run: Run, build: Build, fragments: tuple[str, ...]) -> None:
    outcome = run(*build(world))
    assert outcome.code == 2, outcome.err
    line = outcome.said[-1]
    assert line.startswith("bksdm: ")
    for fragment in fragments:
        assert fragment.format(tmp=world.tmp, v1=world.v1, xl=world.xl, xl_student=world.xl_student) in line
    assert not world.out.exists()


@pytest.mark.parametrize(("prepared", "taught"), [("v1", "xl"), slow("xl", "v1")])
def test_data_prepared_for_the_other_family_is_refused(world: World, run: Run, prepared: str, taught: str) -> None:
    data = world.tmp / "data"
    folders = {"v1": world.v1, "xl": world.xl}
    options = ["--teacher", folders[prepared], "--out", data, "--resolution", 32]
    assert run("prepare", world.pictures, *options).code == 0
    student = world.v1_student if taught == "v1" else world.xl_student
    outcome = run(*world.distill(folders[taught], student, data))
    assert outcome.code == 2, outcome.err
    assert f"data {data} was " in outcome.said[-1]
    assert "run bksdm prepare with this teacher" in outcome.said[-1]


def test_a_unet_for_in_painting_can_be_pruned(world: World, run: Run) -> None:
    assert run(*world.prune(world.built(in_channels=9))).code == 0


def test_a_few_step_teacher_is_remarked_on_and_taken(world: World, run: Run) -> None:
    teacher = world.changed("scheduler/scheduler_config.json", timestep_spacing="trailing")
    outcome = run(*world.prune(teacher))
    assert outcome.code == 0
    (line,) = (line for line in outcome.said if "few-step models" in line)
    assert "--guidance 0 and --steps 1 to 4 (turbo) or 4 to 8 (lightning)" in line
    student = world.out.rename(world.tmp / "student")
    outcome = run(*world.distill(teacher, student, verb="lcm"))
    assert outcome.code == 0, outcome.err
    assert line in outcome.said
    assert not [line for line in run(*world.prune(world.xl)).said if "few-step" in line]
