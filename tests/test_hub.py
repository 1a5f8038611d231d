"""Names of models: a slip in a path is no id on the Hub, and is answered with what it may have meant."""

from pathlib import Path

import pytest

from bksdm.common.errors import InputError
from bksdm.common.hub import is_id, nearest
from bksdm.models.configs import load_denoiser_config
from bksdm.models.decoder import load_decoder
from bksdm.models.pipelines import load_pipeline
from hub_cache import in_hub_cache
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

SLIP = "runs/studnet"
NO_ID = ", and runs is a folder here, so that it is no hub id"
GIVE = "give a folder, a .safetensors file, a hub id (OWNER/NAME) or 'emoji'"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that commands are called from, with a few runs in it."""
    for run in ("runs/student", "runs/students", "runs/distill/student", "runs/.student.partial", "models"):
        (tmp_path / run).mkdir(parents=True)
    (tmp_path / "models" / "sd15.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        (SLIP, "runs/student, runs/students"),
        ("runs/distil/student", "runs/distill/student"),
        ("./runs/studnet", "runs/student, runs/students"),
        ("rnus/student/", "runs/student"),
        ("models/sd1.5.safetensors", "models/sd15.safetensors"),
        ("model/sd15.safetensors", "models/sd15.safetensors"),
        ("runs/nothing-like-it", None),
        ("./x", None),
        ("emojis", None),
        ("~/nowhere", None),
    ],
)
def test_a_slip_in_a_path_is_answered_with_what_is_near(here: Path, name: str, near: str | None) -> None:
    for load in (load_pipeline, load_denoiser_config):
        with pytest.raises(InputError) as refused:
            load(name)
        shown = f" (near it: {near})" if near else ""
        shown += NO_ID if name in (SLIP, "runs/nothing-like-it") else ""
        assert str(refused.value) == f"model {name} does not exist{shown}; {GIVE}"


def test_an_absolute_path_with_a_slip(here: Path) -> None:
    assert nearest(here / "rums" / "student") == [here / "runs" / "student"]


@pytest.mark.parametrize("name", ["nota-ai/bk-sdm-small", "CompVis/stable-diffusion-v1-4", "a/b", "rnus/student"])
def test_what_looks_like_an_id_is_looked_for_on_the_hub(here: Path, name: str) -> None:
    assert is_id(name)
    with pytest.raises(InputError, match=f"model {name} is no folder here.* and not on the hub: "):
        load_pipeline(name)


def test_what_the_hub_does_not_know_may_have_been_a_path(here: Path) -> None:
    with pytest.raises(InputError, match=r"^model rnus/student is no folder here \(near it: runs/student\) and not on"):
        load_pipeline("rnus/student")


@pytest.mark.parametrize(
    "name", ["", "a", "a/b/c", "/a/b", "./a", "../a", "~/a", "a/b.safetensors", "a/", "a//b", "a b/c", ".a/b", "a/.b"]
)
def test_what_cannot_be_an_id(here: Path, name: str) -> None:
    assert not is_id(name)


def test_a_model_in_the_hubs_cache_is_found_beside_a_folder_of_its_owners_name(
    here: Path, v1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_id("runs/teacher")
    in_hub_cache(v1_folder, "runs/teacher", here / "cache", monkeypatch)
    assert (
        load_denoiser_config("runs/teacher")["block_out_channels"]
        == load_denoiser_config(v1_folder)["block_out_channels"]
    )


def test_a_decoder_is_named_in_the_same_way(here: Path) -> None:
    (here / "runs" / "decoder").mkdir()
    with pytest.raises(InputError) as refused:
        load_decoder("runs/decodr")
    assert str(refused.value) == (
        "decoder runs/decodr does not exist (near it: runs/decoder), and runs is a folder here, so that it is no hub "
        "id; give the folder of an AutoencoderTiny, a hub id (OWNER/NAME) or 'emoji'"
    )


def test_the_command_line_says_it_in_one_line(run: Run, here: Path) -> None:
    outcome = run("generate", SLIP, "--prompt", "red", "--out", here / "out")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.said == [f"bksdm: model {SLIP} does not exist (near it: runs/student, runs/students){NO_ID}; {GIVE}"]
