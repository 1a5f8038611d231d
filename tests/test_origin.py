"""What a folder says in files that no verb changes stays as it was, whatever verb writes the next folder."""

import functools
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bksdm.common.assets import asset
from bksdm.common.errors import InputError
from bksdm.distill.few_steps import lcm
from bksdm.distill.run import distill
from bksdm.export.ldm import write_single_file
from bksdm.export.push import push
from bksdm.export.run import export
from bksdm.models.adapters.controlnet import load_controlnet
from bksdm.models.pipelines import load_pipeline
from bksdm.options.distill import DistillOptions, LcmOptions
from bksdm.options.export import ExportOptions, PushOptions
from bksdm.options.personalize import PersonalizeOptions
from bksdm.options.pruning import PruneOptions
from bksdm.personalize.run import personalize
from bksdm.pruning.run import prune
from hub_cache import in_hub_cache
from published import RECIPES
from tiny_models import CONTEXT, PICTURE, age, write_json

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder", "model.safetensors")
SCHEDULER = Path("scheduler", "scheduler_config.json")
INDEX = Path("model_index.json")
CARD = "README.md"
PAPERS = {CARD: "---\nlicense: openrail\n---\n# Old\n", "LICENSE": "Open RAIL\n", "NOTICE.txt": "Made in 2022\n"}
FLAX = "diffusion_flax_model.msgpack"
ONE_STEP = {"steps": 1, "batch_size": 2, "accumulation": 1, "sample_every": 0, "precision": "fp32"}


def pruned(teacher: Path, pictures: Path, out: Path) -> Path:
    prune(PruneOptions(str(teacher), "small", str(out / "pruned")))
    return out / "pruned"


def distilled(teacher: Path, pictures: Path, out: Path) -> Path:
    student = str(pruned(teacher, pictures, out))
    return distill(DistillOptions(str(teacher), student, str(pictures), str(out / "run"), **ONE_STEP))


def in_few_steps(teacher: Path, pictures: Path, out: Path) -> Path:
    student = str(pruned(teacher, pictures, out))
    return lcm(LcmOptions(str(teacher), student, str(pictures), str(out / "run"), **ONE_STEP))


def personal(teacher: Path, pictures: Path, out: Path, *, text_encoder: bool = False) -> Path:
    few = {"steps": 1, "class_images": 0, "views": 1, "text_encoder": text_encoder}
    return personalize(PersonalizeOptions(str(teacher), str(pictures), "a sks car", str(out / "run"), **few))


def personal_words(teacher: Path, pictures: Path, out: Path) -> Path:
    return personal(teacher, pictures, out, text_encoder=True)


def rewritten(teacher: Path, pictures: Path, out: Path) -> Path:
    export(ExportOptions(str(teacher), "diffusers", str(out / "again")))
    return out / "again"


def pushed(teacher: Path, pictures: Path, out: Path) -> Path:
    student = pruned(teacher, pictures, out)
    push(PushOptions(str(student), "me/small", str(out / "hub"), license="mit", dry_run=True))
    return out / "hub"


Make = Callable[[Path, Path, Path], Path]
CHANGED: dict[Make, set[str]] = {
    pruned: {"unet"},
    distilled: {"unet"},
    in_few_steps: {"unet", "scheduler"},
    personal: {"unet"},
    personal_words: {"unet", "text_encoder"},
    rewritten: set(),
    pushed: {"unet"},
}
every_verb = pytest.mark.parametrize("verb", CHANGED, ids=lambda verb: verb.__name__)


@pytest.fixture(scope="session")
def old_teacher(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher as the folders of 2022 are, in half precision, of which their configs did not speak.

    Shared by all tests: not to be changed.
    """
    folder = age(Path(shutil.copytree(exported_model, tmp_path_factory.mktemp("old") / "teacher")))
    for file in folder.rglob("*.safetensors"):
        halves = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    for name, text in PAPERS.items():
        (folder / name).write_text(text)
    (folder / "tokenizer" / "extra.model").write_bytes(b"\0")
    (folder / "vae" / FLAX).write_bytes(b"\0")
    return folder


@pytest.fixture(scope="session")
def half_teacher(old_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as diffusers saves it today. Shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("half") / "teacher"
    StableDiffusionPipeline.from_pretrained(old_teacher, dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def variant_teacher(half_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with nothing but the variant fp16. Shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("variant") / "teacher"
    StableDiffusionPipeline.from_pretrained(half_teacher, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture(scope="session")
def written(old_teacher: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """What a verb makes of the old teacher, made once."""
    return functools.cache(lambda verb: verb(old_teacher, pictures, tmp_path_factory.mktemp(verb.__name__)))


def files(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}


def formats(file: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}


def draws(folder: Path, side: int = PICTURE) -> None:
    """Load a folder as people do, with no word about number formats, and draw."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in networks for parameter in part.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("red apple", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert picture.size == (side, side)


def timesteps(folder: Path) -> list[int]:
    """Where DPM-Solver++ looks in ten steps, built as diffusers' documents say."""
    bare = dict.fromkeys(("unet", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    own = StableDiffusionPipeline.from_pretrained(folder, **bare).scheduler
    scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    scheduler.set_timesteps(10)
    return scheduler.timesteps.tolist()


# Every verb that writes a pipeline


@every_verb
def test_files_of_parts_that_do_not_change_are_the_same(
    verb: Make, old_teacher: Path, written: Callable[[Make], Path]
) -> None:
    made = written(verb)
    kept = {file for file in files(old_teacher) if file.parts[0] not in CHANGED[verb]}
    kept -= {INDEX, Path(CARD), Path("vae", FLAX)}
    assert {file.parts[0] for file in kept} >= {"vae", "tokenizer", "safety_checker", "feature_extractor", "LICENSE"}
    for file in kept:
        assert (made / file).read_bytes() == (old_teacher / file).read_bytes(), file
    assert not {file for file in files(made) - files(old_teacher) if file.parts[0] in {part.parts[0] for part in kept}}


def test_a_folder_that_is_written_again_keeps_its_card(
    old_teacher: Path, written: Callable[[Make], Path], tmp_path: Path
) -> None:
    again = written(rewritten)
    assert (again / CARD).read_bytes() == (old_teacher / CARD).read_bytes()
    assert (written(pruned) / CARD).read_text() != PAPERS[CARD], "a student has a card of its own"
    found = push(PushOptions(str(again), "me/old", str(tmp_path / "hub"), dry_run=True))
    assert found.license == "openrail"
    assert {*PAPERS, "tokenizer/extra.model"} <= set(found.files)


@every_verb
def test_the_index_says_what_it_said(verb: Make, old_teacher: Path, written: Callable[[Make], Path]) -> None:
    made = written(verb)
    if "scheduler" not in CHANGED[verb]:
        assert (made / INDEX).read_bytes() == (old_teacher / INDEX).read_bytes()
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (old_teacher, made))
    assert after | {"scheduler": before["scheduler"]} == before


@pytest.mark.parametrize("verb", [verb for verb in CHANGED if verb is not in_few_steps], ids=lambda verb: verb.__name__)
def test_another_scheduler_looks_where_it_would_for_the_teacher(
    verb: Make, old_teacher: Path, written: Callable[[Make], Path]
) -> None:
    assert timesteps(written(verb)) == timesteps(old_teacher)
    assert timesteps(old_teacher)[0] == 999


def test_a_student_of_few_steps_has_the_scheduler_that_it_was_taught_for(
    written: Callable[[Make], Path],
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(written(in_few_steps))
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.scheduler.config.original_inference_steps == LcmOptions("", "", "", "").solver_steps


@every_verb
def test_diffusers_draws_without_a_word_about_number_formats(verb: Make, written: Callable[[Make], Path]) -> None:
    draws(written(verb))


@every_verb
def test_what_learns_is_kept_in_float32_and_all_else_as_it_came(verb: Make, written: Callable[[Make], Path]) -> None:
    learns = set() if verb in (pruned, pushed) else CHANGED[verb]
    for part, weights in (("unet", UNET), ("text_encoder", TEXT), ("vae", Path("vae", UNET.name))):
        assert formats(written(verb) / weights) == {torch.float32 if part in learns else torch.float16}, part


@every_verb
def test_everyone_may_read_what_the_umask_lets_them(verb: Make, written: Callable[[Make], Path]) -> None:
    made = written(verb)
    run = made.parent if (made.parent / "config.yaml").exists() else made  # with its checkpoints
    mask = os.umask(0)
    os.umask(mask)
    for file in run.rglob("*"):
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file


# The same from the Hub, and from one file


def test_a_student_of_a_model_on_the_hub_has_its_scheduler(
    old_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(old_teacher, "someone/old", tmp_path / "cache", monkeypatch)
    prune_from("someone/old", tmp_path / "student")
    assert (tmp_path / "student" / SCHEDULER).read_bytes() == (old_teacher / SCHEDULER).read_bytes()
    assert not any(file.is_symlink() for file in (tmp_path / "student").rglob("*"))
    draws(tmp_path / "student")


def test_a_file_for_other_programs_may_be_read_by_others(old_teacher: Path, tmp_path: Path) -> None:
    write_single_file(load_pipeline(old_teacher), tmp_path / "one.safetensors")
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_one_file_and_back_leaves_the_scheduler_as_it_was(old_teacher: Path, tmp_path: Path) -> None:
    write_single_file(load_pipeline(old_teacher), tmp_path / "one.safetensors")
    export(ExportOptions(str(tmp_path / "one.safetensors"), "diffusers", str(tmp_path / "back")))
    assert timesteps(tmp_path / "back") == timesteps(old_teacher)
    back, there = (json.loads((folder / SCHEDULER).read_text()) for folder in (tmp_path / "back", old_teacher))
    assert back | {"_diffusers_version": ""} == there | {"_diffusers_version": ""}


# The embedded model, which ships in half precision


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_the_embedded_model_and_its_students_draw_in_stock_diffusers(tmp_path: Path, recipe: str | None) -> None:
    folder = asset("emoji", "model")
    if recipe:
        prune(PruneOptions("emoji", recipe, str(tmp_path / "student")))
        folder = tmp_path / "student"
        assert (folder / SCHEDULER).read_bytes() == (asset("emoji", "model") / SCHEDULER).read_bytes()
    assert formats(folder / UNET) == {torch.float16}
    draws(folder, side=64)


# Number formats


def test_a_student_keeps_the_format_of_each_network(half_teacher: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(half_teacher, tmp_path / "mixed"))
    save_file({name: t.float() for name, t in load_file(mixed / "vae" / UNET.name).items()}, mixed / "vae" / UNET.name)
    prune_from(mixed, tmp_path / "student")
    assert formats(tmp_path / "student" / UNET) == {torch.float16}
    assert formats(tmp_path / "student" / "vae" / UNET.name) == {torch.float32}
    draws(tmp_path / "student")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_another_format_is_that_of_all_networks(
    old_teacher: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    prune(PruneOptions(str(old_teacher), "small", str(tmp_path / "student"), precision))
    for file in (tmp_path / "student").rglob("*.safetensors"):
        assert formats(file) == {dtype}, file
    draws(tmp_path / "student")


def test_a_single_file_in_half_precision_makes_a_student_in_half(
    old_teacher: Path, written: Callable[[Make], Path], tmp_path: Path
) -> None:
    write_single_file(load_pipeline(old_teacher), tmp_path / "one.safetensors", dtype=torch.float16)
    ours = load_file(prune_from(tmp_path / "one.safetensors", tmp_path / "student") / UNET)
    theirs = load_file(written(pruned) / UNET)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.float16 for name in theirs)
    draws(tmp_path / "student")


def prune_from(teacher: str | Path, out: Path) -> Path:
    prune(PruneOptions(str(teacher), "small", str(out)))
    return out


def test_a_folder_is_written_again_with_another_scheduler(old_teacher: Path, tmp_path: Path) -> None:
    export(ExportOptions(str(old_teacher), "diffusers", str(tmp_path / "again"), scheduler="DDIMScheduler"))
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path / "again").scheduler) is DDIMScheduler


def test_a_folder_is_written_again_in_another_format(old_teacher: Path, tmp_path: Path) -> None:
    export(ExportOptions(str(old_teacher), "diffusers", str(tmp_path / "again"), "fp32"))
    for file in (tmp_path / "again").rglob("*.safetensors"):
        assert formats(file) == {torch.float32}, file
    assert (tmp_path / "again" / SCHEDULER).read_bytes() == (old_teacher / SCHEDULER).read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_a_text_encoder_in_half_loads_in_float32_whatever_its_config_says(
    half_teacher: Path, tmp_path: Path, key: str | None
) -> None:
    teacher = Path(shutil.copytree(half_teacher, tmp_path / "teacher"))
    for part in ("text_encoder", "safety_checker"):
        config = json.loads((teacher / part / "config.json").read_text())
        del config["dtype"]
        write_json(teacher / part / "config.json", config | ({key: "float16"} if key else {}))
    draws(prune_from(teacher, tmp_path / "student"))
    said = json.loads((tmp_path / "student" / "text_encoder" / "config.json").read_text())
    assert said[key or "dtype"] == "float32"


# What older tools look for is there, also where the teacher lacks it


def test_what_a_teacher_lacks_is_written(half_teacher: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(half_teacher, tmp_path / "teacher"))
    save_file({name.removeprefix("text_model."): t for name, t in load_file(teacher / TEXT).items()}, teacher / TEXT)
    assert not (teacher / "tokenizer" / "vocab.json").exists()
    student = prune_from(teacher, tmp_path / "student")
    assert all(name.startswith("text_model.") for name in load_file(student / TEXT))
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (student / "tokenizer").iterdir()}


# Variants


def test_a_folder_with_nothing_but_a_variant_is_a_model(variant_teacher: Path, half_teacher: Path) -> None:
    found, wanted = load_pipeline(variant_teacher), load_pipeline(half_teacher)
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        ours, theirs = (pipeline.components[name].state_dict() for pipeline in (found, wanted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_its_student_has_the_names_that_are_looked_for_first(
    variant_teacher: Path, half_teacher: Path, tmp_path: Path
) -> None:
    student, other = prune_from(variant_teacher, tmp_path / "student"), prune_from(half_teacher, tmp_path / "other")
    assert {file.name for file in student.rglob("*.safetensors")} == {UNET.name, TEXT.name}
    for file in student.rglob("*.safetensors"):
        assert file.read_bytes() == (other / file.relative_to(student)).read_bytes()
    draws(student)


def test_plain_weights_come_before_those_of_a_variant(old_teacher: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(old_teacher, tmp_path / "both"))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(both / UNET).items()}
    save_file(tensors, both / UNET.with_stem(f"{UNET.stem}.fp16"))
    student = prune_from(both, tmp_path / "student")
    assert not list(student.rglob("*fp16*"))
    for model in (both, student):
        assert load_pipeline(model).unet.conv_in.weight.any()


@pytest.mark.parametrize("listed", [True, False])
def test_a_variant_on_the_hub_is_a_model_too(
    variant_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    in_hub_cache(variant_teacher, "someone/half", tmp_path / "cache", monkeypatch, listed=listed)
    assert formats(prune_from("someone/half", tmp_path / "student") / UNET) == {torch.float16}


def test_a_variant_that_nobody_knows_stands_in_alone_and_not_among_others(
    variant_teacher: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(variant_teacher, tmp_path / "teacher"))
    fp16 = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    own = fp16.rename(fp16.with_name("diffusion_pytorch_model.mine.safetensors"))
    assert load_pipeline(folder).unet.dtype == torch.float32
    shutil.copy(own, fp16.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(InputError, match=r"unet has weights of mine, non_ema; leave one of them$"):
        load_pipeline(folder)


def test_a_controlnet_with_nothing_but_a_variant_is_one(tmp_path: Path) -> None:
    small = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": CONTEXT, "norm_num_groups": 16}
    network = ControlNetModel(**small, conditioning_embedding_out_channels=(8, 16)).half()
    network.save_pretrained(tmp_path / "canny", variant="fp16")
    found = load_controlnet(tmp_path / "canny").state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in network.state_dict().items())


# Weights in pieces


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_pieces_are_copied_piece_by_piece(
    old_teacher: Path, written: Callable[[Make], Path], tmp_path: Path, variant: str | None
) -> None:
    folder = tmp_path / "teacher"
    pipeline = StableDiffusionPipeline.from_pretrained(old_teacher)
    pipeline.save_pretrained(folder, variant=variant, max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*-of-*"))) > 2
    assert len(list((folder / "vae").glob("*-of-*"))) > 1
    student = prune_from(folder, tmp_path / "student")
    wanted = load_file(written(pruned) / UNET)
    assert all(torch.equal(tensor.half(), wanted[name]) for name, tensor in load_file(student / UNET).items())
    draws(student)
