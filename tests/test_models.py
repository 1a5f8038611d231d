"""Models from folders: what loads, and every way in which a folder is refused, with its words."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bksdm.common.errors import InputError
from bksdm.models.configs import load_denoiser_config
from bksdm.models.folders import check_folder
from bksdm.models.pipelines import image_size, load_pipeline, save_pipeline, tokenizing
from tiny_models import CAPTIONS, CONTEXT, LATENT, MAX_TOKENS, PICTURE, age

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
WEIGHTS = [UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


# What loads


@pytest.mark.parametrize("form", [str, Path])
def test_a_folder_loads_as_it_was_saved(v1_folder: Path, v1_teacher: StableDiffusionPipeline, form: type) -> None:
    pipeline = load_pipeline(form(v1_folder))
    assert isinstance(pipeline, StableDiffusionPipeline)
    for name in ("unet", "vae", "text_encoder"):
        network, wanted = pipeline.components[name], v1_teacher.components[name].state_dict()
        assert not network.training
        assert network.device == torch.device("cpu")
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in network.state_dict().items())
    assert pipeline.scheduler.config.skip_prk_steps


def test_a_v2_folder_keeps_its_prediction_type(v2_folder: Path) -> None:
    assert load_pipeline(v2_folder).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_networks_load_in_the_number_format_that_was_asked_for(v1_folder: Path, dtype: torch.dtype) -> None:
    pipeline = load_pipeline(v1_folder, dtype)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {dtype}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_loading_uses_nothing_that_diffusers_will_remove(v1_folder: Path) -> None:
    load_pipeline(v1_folder)


def test_a_home_directory_is_found(v1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(v1_folder.parent))
    assert load_denoiser_config("~/teacher") == load_denoiser_config(v1_folder)


def test_a_pipeline_without_the_prefix_of_older_tools_loads_too(folder: Path) -> None:
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(folder / TEXT_WEIGHTS).items()}
    save_file(tensors, folder / TEXT_WEIGHTS, metadata={"format": "pt"})
    assert load_pipeline(folder).text_encoder.device == torch.device("cpu")


def test_a_folder_as_sd_1_4_has_it_loads(folder: Path, v1_teacher: StableDiffusionPipeline) -> None:
    pipeline = load_pipeline(age(folder))
    for name in ("unet", "vae", "text_encoder"):
        wanted = v1_teacher.components[name].state_dict()
        assert pipeline.components[name].state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in pipeline.components[name].state_dict().items())
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert pipeline.safety_checker is not None
    for text in [*CAPTIONS, "", "Grün, été & 文字"]:
        assert torch.equal(tokenizing(pipeline.tokenizer)(text), tokenizing(v1_teacher.tokenizer)(text))


def test_pickles_beside_safetensors_are_not_touched(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle at all")
    load_pipeline(folder)


def test_the_size_of_pictures(v1_teacher: StableDiffusionPipeline) -> None:
    assert image_size(v1_teacher) == (PICTURE, PICTURE)


@pytest.mark.parametrize("text", [*CAPTIONS, "", "a caption that has far more words than the encoder takes"])
def test_captions_become_tokens_of_one_length(v1_teacher: StableDiffusionPipeline, text: str) -> None:
    ids = tokenizing(v1_teacher.tokenizer)(text)
    assert ids.shape == (MAX_TOKENS,)
    assert ids[0] == v1_teacher.tokenizer.bos_token_id
    assert ids[-1] == v1_teacher.tokenizer.eos_token_id
    assert v1_teacher.text_encoder(ids[None]).last_hidden_state.shape == (1, MAX_TOKENS, CONTEXT)


# The name of a model


@pytest.mark.parametrize("load", [load_pipeline, load_denoiser_config])
@pytest.mark.parametrize("name", ["no-such", "/no/such", "./no/such", "a/b/c", "~/no-such-model"])
def test_a_name_that_stands_for_nothing(load: Callable[[str], object], name: str) -> None:
    message = refusal(lambda: load(name))
    assert message.endswith("give a folder, a .safetensors file, a hub id (OWNER/NAME) or 'emoji'")
    assert "does not exist" in message
    assert name.removeprefix("./") in message


@pytest.mark.parametrize("load", [load_pipeline, load_denoiser_config])
def test_a_hub_id_that_cannot_be_reached(load: Callable[[str], object]) -> None:
    assert "model nobody/nothing" in refusal(lambda: load("nobody/nothing"))


@pytest.mark.parametrize("load", [load_pipeline, load_denoiser_config])
def test_a_file_that_is_not_safetensors_by_name(tmp_path: Path, load: Callable[[Path], object]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    assert "model.onnx is not a .safetensors file or a folder" in refusal(lambda: load(tmp_path / "model.onnx"))


@pytest.mark.parametrize("load", [load_pipeline, load_denoiser_config])
@pytest.mark.parametrize("content", [b"", b"hello", b"<html>not found</html>", bytes(1000)])
def test_a_file_that_is_not_safetensors_inside(tmp_path: Path, load: Callable[[Path], object], content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors is cut short or damaged" in refusal(lambda: load(tmp_path / "model.safetensors"))


# Folders


@pytest.mark.parametrize("name", ["model_index.json", "unet", "anything"])
def test_a_folder_that_is_not_a_pipeline(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    message = refusal(lambda: load_pipeline(tmp_path))
    assert message == f"{tmp_path} is not a diffusers pipeline (no model_index.json); give the folder of a pipeline"


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "(no model_index.json)" in refusal(lambda: load_pipeline(tmp_path))
    assert "has no unet/config.json" in refusal(lambda: load_denoiser_config(tmp_path))


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", None])
def test_a_pipeline_of_another_class(folder: Path, name: str | None) -> None:
    change_json(folder / "model_index.json", _class_name=name)
    message = refusal(lambda: load_pipeline(folder))
    assert message.startswith(f"{folder} holds a {name}; give one of FluxPipeline, ")
    assert message.endswith("StableDiffusionXLPipeline, StableDiffusionPipeline")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_one_of_its_parts(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    assert f"has no folder {name}, which its model_index.json names" in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_pipeline_that_was_saved_without_a_part(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    change_json(folder / "model_index.json", **{name: [None, None]})
    assert f"has no folder {name}; give a whole pipeline" in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_part_without_weights(folder: Path, weights: str) -> None:
    (folder / weights).unlink()
    message = refusal(lambda: load_pipeline(folder))
    assert message == f"{(folder / weights).parent} has no weights (*.safetensors); copy the whole pipeline"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_weights_that_are_only_a_pickle(folder: Path, weights: str, suffix: str) -> None:
    name = weights.replace("/model", "/pytorch_model") if suffix == ".bin" else weights
    pickled = (folder / name).with_suffix(suffix)
    (folder / weights).rename(pickled)
    message = refusal(lambda: load_pipeline(folder))
    convert = f"convert it, once, by bksdm export {folder} --to diffusers --unpickle --out NEW"
    mend = convert if suffix == ".bin" else "convert it to safetensors"
    assert message == f"{pickled} is a pickle, which can run code and is not loaded; {mend}"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_weights_that_are_cut_short(folder: Path, weights: str, share: float) -> None:
    cut(folder / weights, int(share * (folder / weights).stat().st_size))
    message = refusal(lambda: load_pipeline(folder))
    assert f"{folder / weights} is cut short or damaged" in message
    assert message.endswith("copy or make it again")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_lack_a_tensor(folder: Path, weights: str) -> None:
    tensors = load_file(folder / weights)
    del tensors[min(tensors)]
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    assert str(folder) in refusal(lambda: load_pipeline(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    change_json(folder / "unet" / "config.json", cross_attention_dim=CONTEXT // 2)
    assert f"model {folder} cannot be loaded: " in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize("library", ["os", "pipeline_of_mine", "my.module", "torch"])
def test_a_part_that_wants_code_of_its_own(folder: Path, library: str) -> None:
    change_json(folder / "model_index.json", unet=[library, "UNet2DConditionModel"])
    message = refusal(lambda: load_pipeline(folder))
    assert message == f"{folder} wants code of its own for unet ({library}), which is never run"


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    (folder / "pipeline.py").write_text("raise SystemExit('it ran')")
    (folder / "unet" / "unet.py").write_text("raise SystemExit('it ran')")
    load_pipeline(folder)


@pytest.mark.parametrize("part", [[], ["diffusers"], ["diffusers", "NoSuchClass"], ["diffusers", "AutoencoderKL"]])
def test_an_index_that_names_a_part_wrongly(folder: Path, part: list[str]) -> None:
    change_json(folder / "model_index.json", unet=part)
    assert str(folder) in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"_class_name": "StableDiff'])
def test_an_index_that_is_damaged(folder: Path, content: bytes) -> None:
    (folder / "model_index.json").write_bytes(content)
    assert f"{folder / 'model_index.json'} is not readable JSON" in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize("content", ["[]", "7", "null"])
def test_an_index_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content)
    assert f"{folder / 'model_index.json'} is not a JSON object" in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_part_with_damaged_json(folder: Path, name: str) -> None:
    cut(folder / name, 60)
    assert f"model {folder} cannot be loaded: " in refusal(lambda: load_pipeline(folder))


@pytest.mark.parametrize("name", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_part_without_its_config(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"model {folder} cannot be loaded: " in refusal(lambda: load_pipeline(folder))


def test_checking_a_whole_folder_says_nothing(v1_folder: Path) -> None:
    check_folder(v1_folder)


# Configs


def test_the_unet_config_of_a_pipeline(v1_folder: Path) -> None:
    config = load_denoiser_config(v1_folder)
    assert config["block_out_channels"] == [32, 64, 64, 64]
    assert config["sample_size"] == LATENT
    assert load_denoiser_config(str(v1_folder)) == config


def test_the_unet_config_of_a_unets_own_folder(v1_folder: Path) -> None:
    assert load_denoiser_config(v1_folder / "unet") == load_denoiser_config(v1_folder)


def test_a_unet_config_needs_no_weights(folder: Path, v1_folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    (folder / "model_index.json").unlink()
    assert load_denoiser_config(folder) == load_denoiser_config(v1_folder)


def test_a_config_of_something_else(v1_folder: Path) -> None:
    message = refusal(lambda: load_denoiser_config(v1_folder / "text_encoder"))
    assert (
        message == f"{v1_folder / 'text_encoder' / 'config.json'} is not the config of a U-Net or a transformer "
        "(it has no block_out_channels)"
    )


@pytest.mark.parametrize("content", ["", "{", "[", '{"block_out_channels"'])
def test_a_damaged_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert f"{tmp_path / 'config.json'} is not readable JSON" in refusal(lambda: load_denoiser_config(tmp_path))


# Saving


def test_saving_puts_text_files_beside_the_parts(v1_teacher: StableDiffusionPipeline, tmp_path: Path) -> None:
    save_pipeline(v1_teacher, tmp_path / "out" / "model", {"README.md": "# Grün\n"})
    assert (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8") == "# Grün\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_saving_replaces_what_was_there(v1_teacher: StableDiffusionPipeline, folder: Path) -> None:
    (folder / "stale.txt").write_text("old")
    save_pipeline(v1_teacher, folder)
    assert not (folder / "stale.txt").exists()
    load_pipeline(folder)


def test_saving_holds_no_pickle(v1_folder: Path) -> None:
    assert {path.suffix for path in v1_folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".txt"}


def test_a_place_that_cannot_be_written(v1_teacher: StableDiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refusal(lambda: save_pipeline(v1_teacher, tmp_path / "file" / "model"))
    assert f"cannot write {tmp_path / 'file' / 'model'}" in message
    assert message.endswith("choose another --out")
