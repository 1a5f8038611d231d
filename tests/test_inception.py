"""The Inception of the scores: names of the published file, features by another route, both ways to 299 pixels."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.evaluate import inception
from bksdm.evaluate.inception import Inception, Resize

PARAMETERS = json.loads((Path(__file__).parent / "data" / "inception_parameters.json").read_text())


@pytest.fixture(scope="module")
def network() -> Inception:
    return Inception.random(0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch.hub keeps files, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def publish(file: Path, weights: object, monkeypatch: pytest.MonkeyPatch, **how: bool) -> str:
    """Write weights as .pth and let that file be the published one; its SHA-256."""
    torch.save(weights, file, **how)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest)
    monkeypatch.setattr(inception, "URL", file.as_uri())
    return digest


def pictures(height: int, width: int, count: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(count, 3, 7, 5, generator=rng)
    fine = torch.rand(count, 3, height, width, generator=rng)
    return (255 * (0.6 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) + 0.4 * fine)).byte()


def by_name(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of pixels in [-1, 1] at 299 x 299, from parameters by name: the network written once more."""

    def unit(x: Tensor, name: str, stride: int = 1, valid: bool = False) -> Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = (0, 0) if valid else (kernel.shape[2] // 2, kernel.shape[3] // 2)
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        normal = (weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *normal, eps=1e-3))

    def chain(x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = unit(x, f"{block}.{name}")
        return x

    def average(x: Tensor) -> Tensor:
        """Of the three by three around each place, as far as they lie inside."""
        ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
        sums = F.conv2d(x, ones, padding=1, groups=x.shape[1])
        return sums / F.conv2d(torch.ones_like(x), ones, padding=1, groups=x.shape[1])

    def largest(x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3).view(*x.shape[:2], 9, *x.shape[2:]).amax(dim=2)

    x = unit(x, "Conv2d_1a_3x3", stride=2, valid=True)
    x = unit(unit(x, "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
    x = unit(unit(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", valid=True)
    x = F.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        fives = chain(x, block, "branch5x5_1", "branch5x5_2")
        threes = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        x = torch.cat([chain(x, block, "branch1x1"), fives, threes, chain(average(x), block, "branch_pool")], 1)
    threes = unit(chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2"), "Mixed_6a.branch3x3dbl_3", 2, valid=True)
    x = torch.cat([unit(x, "Mixed_6a.branch3x3", 2, valid=True), threes, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        sevens = chain(x, block, *(f"branch7x7_{step}" for step in range(1, 4)))
        twice = chain(x, block, *(f"branch7x7dbl_{step}" for step in range(1, 6)))
        x = torch.cat([chain(x, block, "branch1x1"), sevens, twice, chain(average(x), block, "branch_pool")], 1)
    threes = unit(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, valid=True)
    sevens = chain(x, "Mixed_7a", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    sevens = unit(sevens, "Mixed_7a.branch7x7x3_4", 2, valid=True)
    x = torch.cat([threes, sevens, F.max_pool2d(x, 3, 2)], 1)
    for block, pool in (("Mixed_7b", average), ("Mixed_7c", largest)):
        threes = chain(x, block, "branch3x3_1")
        twice = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        forks = [chain(threes, block, f"branch3x3_2{end}") for end in "ab"]
        forks += [chain(twice, block, f"branch3x3dbl_3{end}") for end in "ab"]
        x = torch.cat([chain(x, block, "branch1x1"), *forks, chain(pool(x), block, "branch_pool")], 1)
    features = x.flatten(2).mean(dim=2)
    return features, features @ weights["fc.weight"].T


def tensorflow_place(picture: Tensor, i: int, j: int, side: int = 299) -> Tensor:
    """Output (i, j) is from (i * H / 299, j * W / 299): the four pixels around it by their shares."""
    _, height, width = picture.shape
    y, x = i * height / side, j * width / side
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    a, b = y - top, x - left
    upper = (1 - b) * picture[:, top, left] + b * picture[:, top, right]
    lower = (1 - b) * picture[:, bottom, left] + b * picture[:, bottom, right]
    return (1 - a) * upper + a * lower


def resized_like_pytorch(pixels: Tensor, side: int = 299) -> Tensor:
    """As two matrices: output j from (j + 1/2) * in / 299 - 1/2, and the border repeats."""

    def matrix(size: int) -> Tensor:
        place = ((torch.arange(side, dtype=torch.float64) + 0.5) * size / side - 0.5).clamp(min=0)
        return (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0) + F.pad(
            (place[:, None] - (size - 1)).clamp(min=0), (size - 1, 0)
        )

    return matrix(pixels.shape[2]) @ pixels @ matrix(pixels.shape[3]).T


def test_names_and_shapes_are_those_of_the_published_file(network: Inception) -> None:
    assert {name: list(shape) for name, shape in network.shapes().items()} == PARAMETERS


def test_the_network_has_24_million_parameters(network: Inception) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    assert sum(math.prod(shape) for shape in network.shapes().values()) == 23_885_392  # with running statistics


def test_the_network_is_frozen(network: Inception) -> None:
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


SIZES = [(64, 80), (340, 299), (299, 299), (1, 2)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_torch_fidelity_resizes_as_tensorflow_1_does(height: int, width: int) -> None:
    pixels = pictures(height, width)
    resized = inception._RESIZES["torch-fidelity"](pixels.float())
    assert resized.shape == (1, 3, 299, 299)
    for i, j in itertools.product([*range(0, 299, 23), 298], repeat=2):
        expected = (tensorflow_place(pixels[0].double(), i, j) - 128) / 128
        assert torch.allclose(resized[0, :, i, j].double(), expected, atol=1e-4), (i, j)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pytorch_fid_resizes_between_the_centres_of_pixels(height: int, width: int) -> None:
    pixels = pictures(height, width)
    expected = 2 * resized_like_pytorch(pixels.double() / 255) - 1
    assert torch.allclose(inception._RESIZES["pytorch-fid"](pixels.float()).double(), expected, atol=1e-4)


@pytest.mark.parametrize("resize", ["pytorch-fid", "torch-fidelity"])
def test_features_are_those_of_the_network_written_once_more_in_float64(network: Inception, resize: Resize) -> None:
    pixels = pictures(120, 90)
    outputs = network(pixels, resize=resize)
    assert outputs.features.shape == (1, 2048)
    assert outputs.logits.shape == (1, 1008)
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}
    features, logits = by_name(weights, inception._RESIZES[resize](pixels.double()))
    assert features.std() > 0.1, "features that vanish would equal anything"
    assert torch.allclose(outputs.features.double(), features, rtol=1e-4, atol=1e-5)
    assert torch.allclose(outputs.logits.double(), logits, rtol=1e-4, atol=1e-4)


def test_the_two_ways_to_299_pixels_give_other_features(network: Inception) -> None:
    pixels = pictures(120, 90)
    one, other = (network(pixels, resize=resize).features for resize in ("pytorch-fid", "torch-fidelity"))
    assert (one - other).abs().max() > 1e-3


def test_features_tell_pictures_apart(network: Inception) -> None:
    dark, light = torch.full((1, 3, 64, 64), 20).byte(), torch.full((1, 3, 64, 64), 220).byte()
    features = network(torch.cat([dark, light, pictures(64, 64)])).features
    assert torch.pdist(features).min() > 0.1 * features.norm(dim=1).min()


def test_random_weights_follow_from_the_seed_and_leave_torchs_own_numbers_alone(network: Inception) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again, other = Inception.random(0), Inception.random(1)
    assert torch.equal(torch.rand(3), expected)
    name = "Mixed_6b.branch7x7_2.conv.weight"
    assert torch.equal(again.state_dict()[name], network.state_dict()[name])
    assert not torch.equal(other.state_dict()[name], network.state_dict()[name])


def test_the_published_file_may_be_old_and_without_counters(
    network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = network.state_dict()
    weights = {name: nn.Parameter(state[name]) for name in PARAMETERS}
    digest = publish(tmp_path / "weights.pth", weights, monkeypatch, _use_new_zipfile_serialization=False)
    loaded = Inception.load(tmp_path / "weights.pth")
    assert loaded.digest == digest
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items() if name in PARAMETERS)


def test_safetensors_are_known_by_names_and_shapes(network: Inception, tmp_path: Path) -> None:
    file = tmp_path / "inception.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    loaded = Inception.load(str(file))
    assert loaded.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    pixels = pictures(32, 32)
    assert torch.equal(loaded(pixels).features, network(pixels).features)


def test_without_a_file_the_published_one_is_downloaded_once(
    network: Inception, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = network.state_dict()
    assert any(name.endswith("num_batches_tracked") for name in weights), "counters in a file do no harm"
    digest = publish(tmp_path / "there.pth", weights, monkeypatch)
    assert Inception.load().digest == digest
    (tmp_path / "there.pth").unlink()
    assert Inception.load().digest == digest
    assert [file.name for file in hub.iterdir()] == ["pt_inception-2015-12-05-6726825d.pth"]


def test_the_file_that_torch_fidelity_left_is_taken(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "URL", "file:///nowhere")
    hub.mkdir(parents=True)
    (hub / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert inception.published_file() == hub / "weights-inception-2015-12-05-6726825d.pth"


def complaint(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, once it is one line that says where the file is from and where to put it."""
    message = str(error.value)
    assert "\n" not in message
    assert f"download {inception.URL} and give its path" in message
    return message


def test_without_a_network_the_message_says_where_to_get_the_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "URL", (hub / "nothing.pth").as_uri())
    with pytest.raises(InputError) as error:
        Inception.load()
    assert "cannot be downloaded" in complaint(error)
    assert str(hub) in complaint(error)


def test_a_download_of_something_else_leaves_nothing_behind(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.html").write_text("not found")
    monkeypatch.setattr(inception, "URL", (tmp_path / "page.html").as_uri())
    with pytest.raises(InputError) as error:
        Inception.load()
    assert "hash" in complaint(error)
    assert not list(hub.iterdir())


def test_a_pth_with_another_checksum_is_not_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(InputError, match="is not the published Inception") as error:
        Inception.load(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:8] in complaint(error)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pth cannot be read: No such file") as error:
        Inception.load(tmp_path / "gone.pth")
    complaint(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc\.weight: \(1000, 2048\) there, \(1008, 2048\) wanted"),
        ({"fc.bias": None}, r"fc\.bias: nothing there, \(1008,\) wanted"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, r"AuxLogits\.fc\.bias: \(1,\) there, nothing wanted"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    weights = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in PARAMETERS.items()} | change
    file = tmp_path / "other.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
    with pytest.raises(InputError, match=message) as error:
        Inception.load(file)
    complaint(error)


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="is not a safetensors file") as error:
        Inception.load(tmp_path / "weights.safetensors")
    complaint(error)


@pytest.mark.parametrize("pixels", [torch.rand(1, 3, 8, 8), pictures(8, 8)[0], pictures(8, 8)[:, :1]])
def test_pixels_are_bytes_in_batches(network: Inception, pixels: Tensor) -> None:
    with pytest.raises(InputError, match=r"give uint8, \(B, 3, H, W\)"):
        network(pixels)


def test_an_unknown_resize_is_refused_with_the_known_ones(network: Inception) -> None:
    with pytest.raises(InputError, match="choose one of: pytorch-fid, torch-fidelity"):
        network(pictures(8, 8), resize="bicubic")
