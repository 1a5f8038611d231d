"""`bksdm prepare`: latents on the disk are those of the teacher's VAE, whoever makes them and however often stopped."""

import contextlib
import json
import resource
import shutil
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.data.folder import read_captions
from bksdm.data.pictures import PictureSamples
from bksdm.data.prepare import prepare
from bksdm.data.prepared import PreparedSamples, read_prepared
from bksdm.data.source import read_source
from bksdm.distill.conditions import Conditions
from bksdm.distill.data import open_data
from bksdm.distill.run import distill
from bksdm.models.pipelines import load_pipeline, save_pipeline, tokenizing, with_parts
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DistillOptions
from fast import slow
from tiny_models import CAPTIONS, LATENT, PICTURE, TWO_STAGES, build_pipeline
from verbs import Run, captioned, done_here, mtimes, read_lines

pytest_plugins = ["verbs_fixtures"]

NUMBERS = ("mean", "std", "mean_flipped", "std_flipped", "context")


def made(teacher: Path, data: Path, out: Path, **changes: object) -> Path:
    settings: dict[str, object] = {"shard_size": 3, "batch_size": 2, "workers": 0, "text_embeddings": True}
    prepare(PrepareOptions(str(data), str(teacher), str(out), **settings | changes))
    return out


def rows(folder: Path) -> dict[str, list]:
    table = datasets.load_from_disk(str(folder)).with_format("numpy")
    return {name: list(table[name]) for name in table.column_names}


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = rows(first), rows(second)
    assert ours.keys() == theirs.keys()
    assert (ours["name"], ours["text"]) == (theirs["name"], theirs["text"])
    for name in set(ours) - {"name", "text"}:
        assert np.array_equal(np.stack(ours[name]), np.stack(theirs[name]))


@pytest.fixture(scope="module")
def whole(exported_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight pictures, flipped too, with their embedded captions. Not to be changed."""
    return made(exported_model, pictures, tmp_path_factory.mktemp("prepared") / "out")


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, each of another size: lying, standing, and small."""
    rng = np.random.default_rng(0)
    sizes = ((48, 40), (32, 80), (16, 16))
    noise = [Image.fromarray(rng.integers(0, 255, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]
    return captioned(tmp_path_factory.mktemp("sized") / "data", noise)


# What is there


def test_rows_are_what_is_computed_on_the_way(
    kind_folder: Path, kind_teacher: DiffusionPipeline, sized: Path, tmp_path: Path
) -> None:
    """Latents of both directions, and all that the denoiser is told of captions and pictures."""
    out = made(kind_folder, sized, tmp_path / "out")
    conditions, tokenize = Conditions.of(kind_teacher), tokenizing(kind_teacher)
    pictures = PictureSamples(read_captions(sized), PICTURE, tokenize, flip=True, told=conditions.of_fitted)
    prepared = PreparedSamples(out, read_prepared(out), tokenize, flip=True)
    assert rows(out)["name"] == [f"{index}.png" for index in range(3)]
    for index in range(3):
        for seed in (0, 1):
            batch = {name: value[None] for name, value in pictures.sample(index, seed).items()}
            mean, std = conditions.posterior(batch["pixel_values"])
            wanted = {"latents_mean": mean, "latents_std": std, **conditions.told(batch)}
            found = prepared.sample(index, seed)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.allclose(found[name], value[0], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("text_embeddings", [True, False])
def test_numbers_about_pictures_are_kept_as_they_are(
    xl_folder: Path, sized: Path, tmp_path: Path, text_embeddings: bool
) -> None:
    out = made(xl_folder, sized, tmp_path / "out", storage="fp16", text_embeddings=text_embeddings)
    wanted = [[40, 48, 0, 3, 32, 32], [80, 32, 24, 0, 32, 32], [16, 16, 0, 0, 32, 32]]
    assert [row.tolist() for row in rows(out)["time_ids"]] == wanted
    assert ("context" in rows(out)) is ("text_embeds" in rows(out)) is text_embeddings


def test_the_folder_says_what_made_it(whole: Path, exported_model: Path) -> None:
    about = read_prepared(whole)
    assert (about.teacher, about.resolution, about.pictures, about.skipped) == (str(exported_model), PICTURE, 8, 0)
    assert (about.latent_shape, about.flip, about.storage) == ((4, LATENT, LATENT), True, "fp32")
    values = json.loads((whole / "prepared.json").read_text())
    assert 0 < values["images_per_second"] <= values["vae_images_per_second"]
    assert (whole / "skipped.jsonl").read_text() == ""
    assert len(list(whole.glob("data-*-of-00003.arrow"))) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_readers_and_shards_do_not_matter(
    whole: Path, exported_model: Path, pictures: Path, tmp_path: Path, workers: int, batch_size: int
) -> None:
    out = made(exported_model, pictures, tmp_path / "out", workers=workers, batch_size=batch_size, shard_size=100)
    ours, theirs = rows(out), rows(whole)
    for name in NUMBERS:
        assert np.allclose(np.stack(ours[name]), np.stack(theirs[name]), atol=1e-5)


def test_half_the_room(whole: Path, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    half = made(exported_model, pictures, tmp_path / "out", storage="fp16", shard_size=8)
    ours, theirs = rows(half), rows(whole)
    assert datasets.load_from_disk(str(half)).features["mean"].feature.dtype == "float16"
    assert np.allclose(np.stack(ours["mean"]), np.stack(theirs["mean"]), rtol=1e-3, atol=1e-4)
    sample = PreparedSamples(half, read_prepared(half), lambda _: torch.zeros(1)).sample(0, 0)
    assert {value.dtype for value in sample.values()} == {torch.float32}


def test_a_sample_is_its_row(whole: Path) -> None:
    found, samples = rows(whole), PreparedSamples(whole, read_prepared(whole), lambda _: torch.zeros(1), flip=True)
    assert len(samples) == 8
    assert samples.name(3) == "3.png"
    for seed, copy in ((0, ""), (1, "_flipped")):
        sample = samples.sample(5, seed)
        assert sample["latents_mean"].shape == sample["latents_std"].shape == (4, LATENT, LATENT)
        assert torch.equal(sample["latents_mean"].flatten(), torch.from_numpy(found[f"mean{copy}"][5].copy()))
        assert torch.equal(sample["latents_std"].flatten(), torch.from_numpy(found[f"std{copy}"][5].copy()))


def test_without_embeddings_a_sample_has_tokens(exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    out = made(exported_model, pictures, tmp_path / "out", text_embeddings=False, flip=False)
    asked: list[str] = []

    def tokens(text: str) -> Tensor:
        asked.append(text)
        return torch.ones(1)

    sample = PreparedSamples(out, read_prepared(out), tokens).sample(2, 0)
    assert set(sample) == {"latents_mean", "latents_std", "input_ids"}
    assert asked == [CAPTIONS[2]]


# Retraining


def retrained(teacher: Path, student: Path, data: Path, out: Path, **changes: object) -> list[list[float]]:
    settings: dict[str, object] = {"steps": 2, "batch_size": 4, "accumulation": 1, "log_every": 1, "sample_every": 0}
    settings |= {"precision": "fp32", "teacher_precision": "fp32"} | changes
    distill(DistillOptions(str(teacher), str(student), str(data), str(out), **settings))
    return [[line["task"], line["output_kd"], line["feature_kd"]] for line in read_lines(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("kind", "text_embeddings"),
    [
        pytest.param("exported", True, id="sd-True"),
        slow("exported", False, id="sd-False"),
        *(slow("shallow_xl", embedded, id=f"xl-{embedded}") for embedded in (False, True)),
    ],
    indirect=["kind"],
)
def test_retraining_from_latents_is_retraining_from_pictures(
    kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path, text_embeddings: bool
) -> None:
    latents = made(kind_folder, pictures, tmp_path / "latents", text_embeddings=text_embeddings)
    ours, theirs = (
        retrained(kind_folder, kind_student, data, tmp_path / name)
        for name, data in (("ours", latents), ("theirs", pictures))
    )
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4)


def test_latents_for_another_kind_of_teacher_are_refused(
    xl_teacher: DiffusionPipeline, exported: DiffusionPipeline, pictures: Path, tmp_path: Path
) -> None:
    """Also where the VAE is the same: there are no numbers about the pictures."""
    save_pipeline(with_parts(exported, vae=xl_teacher.vae), tmp_path / "v1")
    latents = made(tmp_path / "v1", pictures, tmp_path / "latents", text_embeddings=False)
    with pytest.raises(
        InputError, match=r"was prepared for another kind of teacher, and has no time_ids; run bksdm pr"
    ):
        open_data(str(latents), None, True, 1.0).check(xl_teacher)


def test_latents_of_another_vae_are_refused(whole: Path, exported_model: Path) -> None:
    with pytest.raises(
        InputError, match=rf"made by the vae of {exported_model}, which is not this teacher's; run bksdm pre"
    ):
        open_data(str(whole), None, True, 1.0).check(build_pipeline(TWO_STAGES, seed=1))


def test_a_teacher_with_the_same_vae_is_taken(whole: Path, exported_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported_model, tmp_path / "copy"))
    (copy / "vae" / "notes.txt").write_text("another file, the same network")
    open_data(str(whole), None, True, 1.0).check(load_pipeline(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 64}, "resolution is 64, and data .* was prepared at 32; leave it out or prepare again"),
        ({"flip": True}, "has no mirrored copies; give --flip false, or prepare with --flip"),
    ],
)
def test_what_was_not_prepared_is_refused(
    exported_model: Path,
    exported_student: Path,
    pictures: Path,
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    latents = made(exported_model, pictures, tmp_path / "latents", flip=False)
    with pytest.raises(InputError, match=message):
        retrained(exported_model, exported_student, latents, tmp_path / "run", **{"flip": False, **changes})


def test_a_shard_that_is_cut_short_is_refused(
    whole: Path, exported_model: Path, exported_student: Path, tmp_path: Path
) -> None:
    latents = Path(shutil.copytree(whole, tmp_path / "latents"))
    shard = next(latents.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"prepared data .*; prepare it again"):
        retrained(exported_model, exported_student, latents, tmp_path / "run")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"latent_shape": 3}'])
def test_a_damaged_description_is_refused(
    whole: Path, exported_model: Path, exported_student: Path, tmp_path: Path, content: str
) -> None:
    latents = Path(shutil.copytree(whole, tmp_path / "latents"))
    (latents / "prepared.json").write_text(content)
    with pytest.raises(InputError, match=r"prepared.json was not written by this bksdm prepare .* prepare again"):
        retrained(exported_model, exported_student, latents, tmp_path / "run")


# Pictures that cannot be read


def damaged(folder: Path) -> set[str]:
    """Two hundred pictures, ten of them damaged, and some odd ones that are not; the names of the damaged."""
    rng = np.random.default_rng(0)
    tints = rng.integers(0, 255, (200, 3))
    captioned(folder, [Image.new("RGB", (48, 40), tuple(map(int, tint))) for tint in tints])
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "3.png")
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "17.png").write_bytes(whole[:20])
    (folder / "44.png").write_bytes(b"")
    (folder / "45.png").write_bytes(b"")
    (folder / "71.png").write_text("<html>404 Not Found</html>")
    (folder / "72.png").write_bytes(whole[:60] + bytes(reversed(whole[60:300])) + whole[300:])
    (folder / "90.png").write_bytes(b"%PDF-1.7\n" + whole)
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    (folder / "133.png").write_bytes(header + whole[29:])
    jpeg = folder / "150.png"
    noise.save(jpeg, format="JPEG", quality=95)
    jpeg.write_bytes(jpeg.read_bytes()[:1500])
    (folder / "199.png").write_bytes(bytes(500))
    # Readable: moving, turned by its EXIF, grey, with a palette, in CMYK, 16 bits deep.
    noise.save(folder / "5.png", format="GIF", save_all=True, append_images=[noise.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "6.png", format="JPEG", exif=exif)
    noise.convert("L").save(folder / "7.png")
    noise.convert("P").save(folder / "8.png")
    noise.convert("CMYK").save(folder / "9.png", format="TIFF")
    Image.fromarray(rng.integers(0, 65535, (40, 40), dtype=np.uint16)).save(folder / "10.png")
    return {f"{number}.png" for number in (3, 17, 44, 45, 71, 72, 90, 133, 150, 199)}


def test_the_list_of_the_skipped_is_exact(exported_model: Path, tmp_path: Path) -> None:
    broken = damaged(tmp_path / "data")
    few = {"flip": False, "text_embeddings": False}  # nothing that is not asked about here
    out = made(exported_model, tmp_path / "data", tmp_path / "out", shard_size=64, batch_size=16, workers=1, **few)
    skipped = read_lines(out / "skipped.jsonl")
    assert {line["name"] for line in skipped} == broken
    assert len(skipped) == 10
    assert all(line["name"] in line["reason"] and "not a readable picture" in line["reason"] for line in skipped)
    assert (read_prepared(out).pictures, read_prepared(out).skipped) == (190, 10)
    assert set(rows(out)["name"]) == {f"{number}.png" for number in range(200)} - broken


def test_too_many_broken_pictures_stop_the_run(run: Run, exported_model: Path, tmp_path: Path) -> None:
    damaged(tmp_path / "data")
    words = ["prepare", tmp_path / "data", "--teacher", exported_model, "--out", tmp_path / "out", "--shard_size", 100]
    words += ["--flip", "false"]
    outcome = run(*words, "--max_broken", 0.01)
    assert outcome.code == 2
    assert outcome.said == [
        f"bksdm: 7 of 100 pictures of {tmp_path / 'data'} cannot be read, more than max_broken 0.01 allows; "
        f"see {tmp_path / 'out' / 'shards'}, mend them or allow more (the first: {tmp_path}/data/3.png is not a "
        f"readable picture (image file is truncated); replace or remove it)"
    ]
    assert not (tmp_path / "out" / "prepared.json").exists()
    assert run(*words, "--max_broken", 0.1).code == 0, "allowing more goes on"


@pytest.mark.parametrize(("column", "wanted"), [(None, "red"), ("alt", "blue")])
def test_the_column_that_is_asked_for_is_embedded(
    exported_model: Path, tmp_path: Path, column: str | None, wanted: str
) -> None:
    metadata = '{"file_name": "0.png", "text": "red", "alt": "blue"}\n'
    captioned(tmp_path / "data", [Image.new("RGB", (8, 8))], metadata)
    captioned(tmp_path / "wanted", [Image.new("RGB", (8, 8))], json.dumps({"file_name": "0.png", "text": wanted}))
    assert_same(
        made(exported_model, tmp_path / "data", tmp_path / "out", text_column=column),
        made(exported_model, tmp_path / "wanted", tmp_path / "again"),
    )


def test_no_readable_picture_at_all_is_refused(exported_model: Path, tmp_path: Path) -> None:
    captioned(tmp_path / "data", [Image.new("RGB", (8, 8))] * 3)
    for number in range(3):
        (tmp_path / "data" / f"{number}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 3 pictures .* cannot be read"):
        made(exported_model, tmp_path / "data", tmp_path / "out", max_broken=1.0)


# Going on


def test_finished_work_is_left_alone(whole: Path, exported_model: Path, pictures: Path) -> None:
    shards = sorted(whole.glob("*.arrow"))
    before = mtimes(shards)
    made(exported_model, pictures, whole)
    assert mtimes(shards) == before


def test_a_killed_run_goes_on_where_it_was(whole: Path, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["prepare", pictures, "--teacher", exported_model, "--out", out, "--shard_size", 3, "--batch_size", 2]
    words += ["--workers", 0, "--text_embeddings"]
    process = get_context("fork").Process(target=done_here, args=words)  # which has imported everything already
    process.start()
    while process.is_alive() and not list(out.glob("*.arrow")):
        time.sleep(0.001)
    process.kill()
    process.join()
    done = sorted(out.glob("*.arrow"))
    before = mtimes(done)
    done_here(*words)
    assert done
    assert mtimes(done) == before
    assert_same(out, whole)


def test_a_full_disk_loses_nothing(run: Run, exported_model: Path, pictures: Path, whole: Path, tmp_path: Path) -> None:
    """The file size is limited by the system, which is how a full disk looks to Arrow."""
    out = tmp_path / "out"
    words = ["prepare", pictures, "--teacher", exported_model, "--out", out, "--shard_size", 3, "--batch_size", 2]
    with files_of_at_most(10_000):
        outcome = run(*words, "--text_embeddings", "--workers", 0)
    assert outcome.code == 2
    assert "cannot be written" in outcome.said[-1]
    assert "make room and run the same command again" in outcome.said[-1]
    assert not list(out.glob(".*.partial"))
    made(exported_model, pictures, out)
    assert_same(out, whole)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes; Python ignores the signal, so that the write fails."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


# What is refused


def test_unfinished_latents_are_refused(
    whole: Path, exported_model: Path, exported_student: Path, tmp_path: Path
) -> None:
    latents = Path(shutil.copytree(whole, tmp_path / "latents"))
    (latents / "prepared.json").unlink()
    with pytest.raises(InputError, match="is not finished; run the bksdm prepare that made it again, it goes on"):
        retrained(exported_model, exported_student, latents, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; give at least 1"),
        ({"shard_size": 0}, "shard_size is 0; give at least 1"),
        ({"workers": -1}, "workers is -1; give 0 or more"),
        ({"max_broken": 1.5}, "max_broken is 1.5; give a share from 0 to 1"),
        ({"resolution": 30}, "resolution is 30; give a multiple of 8"),
    ],
)
def test_unfit_options_are_refused(
    exported_model: Path, pictures: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(exported_model, pictures, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_refused(whole: Path, exported_model: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match="holds another run"):
        made(exported_model, pictures, whole, flip=False)


def test_prepared_data_are_not_prepared_again(whole: Path, exported_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is prepared already; give the pictures that it was made from"):
        made(exported_model, whole, tmp_path / "out")


def test_prepared_data_are_no_pictures(whole: Path) -> None:
    with pytest.raises(InputError, match="is what bksdm prepare wrote, latents and no pictures; give the pictures"):
        read_source(whole)


def test_the_command_line_says_how_fast_it_was(run: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    outcome = run("prepare", pictures, "--teacher", exported_model, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0
    assert (outcome.json["pictures"], outcome.json["skipped"]) == (8, 0)
    assert outcome.json["images_per_second"] > 0
