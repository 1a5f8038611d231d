"""Publishing: what would go to the Hub is a folder that is whole and says what others must know."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.export.push import push
from bksdm.models.drawing import drawing
from bksdm.models.pipelines import family_of_pipeline, image_size, load_pipeline
from bksdm.options.export import PushOptions
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from verbs import Run

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

LICENCE = "creativeml-openrail-m"


@pytest.fixture
def run_folder(v1_student: Path, v1_folder: Path, tmp_path: Path) -> Path:
    """A run of distill around a student, as far as the Hub is concerned, and a teacher with a licence."""
    teacher = shutil.copytree(v1_folder, tmp_path / "teacher")
    (teacher / "README.md").write_text(f"---\nlicense: {LICENCE}\n---\n# Teacher\n")
    shutil.copytree(v1_student, tmp_path / "run" / "student")
    config = {"verb": "distill", "teacher": str(teacher), "student": str(v1_student), "data": "/home/me/laion_11k"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "student" / SAMPLING_FILE).write_text(Defaults(4, 1.0).text())
    (tmp_path / "run" / "student" / "provenance.json").write_text('{"command": ["/home/me/bksdm"]}')
    return tmp_path / "run"


def scores(file: Path, model: Path) -> Path:
    value = {"value": 13.05, "deviation": 0.1, "low": 12.85, "high": 13.25, "seeds": []}
    result = {
        "models": {"small": {"model": str(model), "steps": 4, "guidance": 1.0, "scores": {"frechet_distance": value}}},
        "protocol": {"reference": "/home/me/val2014", "features": "inception"},
    }
    file.write_text(json.dumps(result))
    return file


def test_a_dry_run_leaves_a_folder_that_loads_and_a_card_that_tells(
    done: Run, run_folder: Path, tmp_path: Path
) -> None:
    file = scores(tmp_path / "scores.json", run_folder / "student")
    words = ["--repo", "me/small-sd", "--out", tmp_path / "hub", "--scores", file, "--dry_run", "--json"]
    made = done("push", run_folder / "student", *words).json
    assert made["url"] is None
    assert made["license"] == LICENCE
    assert drawing(tmp_path / "hub") == Defaults(4, 1.0)
    assert {"README.md", "recipe.yaml", SAMPLING_FILE, "unet/diffusion_pytorch_model.safetensors"} <= made[
        "files"
    ].keys()
    assert not {"config.yaml", "provenance.json"} & made["files"].keys()
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == LICENCE
    assert "## Training data\n\nlaion_11k" in card.text
    assert "| Fréchet distance | 13.05 ± 0.2 |" in card.text
    assert "reference val2014, steps 4, guidance 1.0, features inception" in card.text
    assert "mid_block" in card.text or "mid" in card.text  # the drawing of the blocks
    assert "/home/me" not in card.text
    StableDiffusionPipeline.from_pretrained(tmp_path / "hub", safety_checker=None)


def test_the_embedded_models_licence_holds_on(done: Run, tmp_path: Path) -> None:
    done("prune", "emoji", "--recipe", "tiny", "--out", tmp_path / "tiny")
    words = ["--repo", "me/tiny", "--out", tmp_path / "hub", "--dry_run", "--json"]
    assert done("push", tmp_path / "tiny", *words).json["license"] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("model", "folder"), [("xl_exported_model", "unet"), ("z_folder", "transformer"), ("klein_folder", "transformer")]
)
def test_the_card_draws_with_the_pipeline_of_the_family(
    model: str, folder: str, done: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In its own size, too, where a pipeline would draw 1024 pixels whatever it has to draw with."""
    teacher = request.getfixturevalue(model)
    done("prune", teacher, "--recipe", "base" if folder == "unet" else "half", "--out", tmp_path / "student")
    words = ["--repo", "me/less", "--license", "openrail++", "--out", tmp_path / "hub", "--dry_run", "--json"]
    pushed = done("push", tmp_path / "student", *words).json
    assert f"{folder}/diffusion_pytorch_model.safetensors" in pushed["files"]
    pipeline = load_pipeline(teacher)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert family_of_pipeline(pipeline).tag in card.data.tags
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    picture = tmp_path / "picture.png"
    code = code.replace("PATH_OF_THIS_FOLDER", str(tmp_path / "hub")).replace("picture.png", str(picture))
    exec(code.replace('prompt="..."', 'prompt="a cat", num_inference_steps=1'), {})
    with Image.open(picture) as drawn:
        assert drawn.size == image_size(pipeline)[::-1]


def test_without_the_hub_the_folder_stays_and_one_line_says_so(run: Run, run_folder: Path, tmp_path: Path) -> None:
    outcome = run("push", run_folder / "student", "--repo", "me/small-sd", "--out", tmp_path / "hub")
    assert outcome.code == 2
    assert len(outcome.said) == 1
    assert "the Hub did not take me/small-sd" in outcome.said[0]
    assert (tmp_path / "hub" / "model_index.json").is_file()


def test_the_same_command_writes_the_folder_again(run_folder: Path, tmp_path: Path) -> None:
    given = PushOptions(str(run_folder / "student"), "me/small-sd", str(tmp_path / "hub"), dry_run=True)
    assert push(given) == push(given)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"repo": "no name at all"}, "is no name on the Hub"),
        ({"model": "nowhere"}, "model nowhere is not a folder"),
        ({"scores": "nowhere.json"}, r"scores nowhere\.json is no scores\.json"),
    ],
)
def test_what_cannot_go_there_is_refused(run_folder: Path, tmp_path: Path, more: dict, message: str) -> None:
    given = {"model": str(run_folder / "student"), "repo": "me/small", "out": str(tmp_path / "hub"), "dry_run": True}
    with pytest.raises(InputError, match=message):
        push(PushOptions(**given | more))
    assert not (tmp_path / "hub").exists()


def test_a_licence_that_nobody_knows_is_asked_for(run_folder: Path, tmp_path: Path) -> None:
    given = PushOptions(str(run_folder / "student"), "me/small", str(tmp_path / "hub"), dry_run=True)
    (tmp_path / "teacher" / "README.md").unlink()
    with pytest.raises(InputError, match=r"licence of .* is not known.*--license"):
        push(given)


def test_other_files_and_paths_of_this_machine_stay_at_home(run_folder: Path, tmp_path: Path) -> None:
    given = PushOptions(str(run_folder / "student"), "me/small", str(tmp_path / "hub"), dry_run=True)
    stray = run_folder / "student" / "notes.pkl"
    stray.write_bytes(b"x")
    with pytest.raises(InputError, match=r"notes\.pkl is no file of a model"):
        push(given)
    stray.unlink()
    (run_folder / "student" / "notes.txt").write_text("made in /home/me/work")
    with pytest.raises(InputError, match=r"notes\.txt names a path of this machine, /home/me/work"):
        push(given)
    assert not (tmp_path / "hub").exists()


def test_a_full_folder_of_others_is_not_replaced(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty and holds nothing that bksdm push wrote"):
        push(PushOptions(str(run_folder / "student"), "me/small", str(tmp_path / "hub"), dry_run=True))
    assert (tmp_path / "hub" / "thesis.txt").exists()
