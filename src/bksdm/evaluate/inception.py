"""Inception-v3 as the Fréchet distance and the Inception Score know it.

The network of arXiv 1512.00567 that learnt ImageNet in December 2015, with 1008 classes; its pooled features and its
logits are what the published scores are made of. It differs from the Inception-v3 of other libraries: average pools
leave the padding out, and the last block pools by maximum. Weights: the file of github.com/mseitzer/pytorch-fid.
"""

import hashlib
import io
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from bksdm.common.errors import InputError, one_line
from bksdm.common.randomness import generator

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FEATURES, CLASSES, SIDE = 2048, 1008, 299
Resize = Literal["pytorch-fid", "torch-fidelity"]

# pytorch-fid and torch-fidelity leave the same file under two names.
_CACHED_AS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_COUNTER = "num_batches_tracked"  # only training reads it; a file may have it or not


@dataclass(frozen=True)
class Outputs:
    """What the network says of B pictures.

    Attributes:
        features: Means over the last feature maps, with shape (B, 2048).
        logits: Scores of the classes without the classifier's bias, with shape (B, 1008).
    """

    features: Tensor
    logits: Tensor


class Inception(nn.Module):
    """The network, frozen and in eval mode; `load` and `random` make one.

    Attributes:
        digest: SHA-256 of the file that the weights are from, or how they were drawn.
    """

    digest: str

    def __init__(self) -> None:
        """The layers alone, on the meta device: they have shapes and no weights."""
        super().__init__()
        with torch.device("meta"):
            self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2, padding="valid")
            self.Conv2d_2a_3x3 = _Unit(32, 32, 3, padding="valid")
            self.Conv2d_2b_3x3 = _Unit(32, 64, 3)
            self.Conv2d_3b_1x1 = _Unit(64, 80)
            self.Conv2d_4a_3x3 = _Unit(80, 192, 3, padding="valid")
            self.Mixed_5b = _mixed_35(192, pooled=32)
            self.Mixed_5c = _mixed_35(256, pooled=64)
            self.Mixed_5d = _mixed_35(288, pooled=64)
            self.Mixed_6a = _to_17(288)
            self.Mixed_6b = _mixed_17(128)
            self.Mixed_6c = _mixed_17(160)
            self.Mixed_6d = _mixed_17(160)
            self.Mixed_6e = _mixed_17(192)
            self.Mixed_7a = _to_8(768)
            self.Mixed_7b = _mixed_8(1280, _average())
            self.Mixed_7c = _mixed_8(2048, nn.MaxPool2d(3, stride=1, padding=1))
            self.fc = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path | None = None) -> "Inception":
        """The published network, from a file, or downloaded once.

        Arguments:
            source: The published .pth, or its weights as .safetensors. A .pth is unpickled only if its SHA-256 is the
                published one. A .safetensors may be anyone's conversion, so only names and shapes are checked;
                `digest` says which file it was. None: `published_file`.

        Raises:
            InputError: There is no such file, it holds something else, or the download failed.
        """
        path = published_file() if source is None else Path(source)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"Inception's weights {path} cannot be read: {error.strerror}; {_mend()}") from error
        digest = hashlib.sha256(content).hexdigest()
        if path.suffix == ".safetensors":
            return cls._of(_from_safetensors(content, path), digest, path)
        if digest != SHA256:
            raise InputError(f"{path} is not the published Inception (its SHA-256 is {digest[:8]}...); {_mend()}")
        return cls._of(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), digest, path)

    @classmethod
    def random(cls, seed: int = 0) -> "Inception":
        """A network with random weights for work without the published file: its features neither vanish nor explode.

        Its scores mean nothing beside published ones.
        """
        weights = {name: _drawn(name, shape, seed) for name, shape in cls().shapes().items()}
        return cls._of(weights, f"random, seed {seed}", "random weights")

    @classmethod
    def _of(cls, weights: Mapping[str, Tensor], digest: str, source: object) -> "Inception":
        network = cls()
        weights = {name: tensor.float() for name, tensor in weights.items() if not name.endswith(_COUNTER)}
        _check_fit(weights, network.shapes(), source)
        network.load_state_dict(weights, assign=True)
        network.digest = digest
        return network.requires_grad_(False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights and running statistics, as in the published file."""
        return {name: tuple(value.shape) for name, value in self.state_dict().items() if not name.endswith(_COUNTER)}

    def forward(self, pixels: Tensor, resize: Resize = "pytorch-fid") -> Outputs:
        """Features and logits of pictures of any size.

        Arguments:
            pixels: Whole numbers from 0 to 255, dtype uint8, with shape (B, 3, H, W).
            resize: Whose way to 299 x 299 pixels. "pytorch-fid" is PyTorch's bilinear one without antialiasing, which
                published Fréchet distances use; "torch-fidelity" is that of TensorFlow 1, which published Inception
                Scores use.

        Raises:
            InputError: The pixels have another dtype or shape, or the resize is unknown.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels are {pixels.dtype} with shape {tuple(pixels.shape)}; give uint8, (B, 3, H, W)")
        if resize not in _RESIZES:
            raise InputError(f"resize {resize!r} is unknown; choose one of: {', '.join(_RESIZES)}")
        features = self._features(_RESIZES[resize](pixels.to(self.fc.weight.dtype)))
        return Outputs(features, F.linear(features, self.fc.weight))

    def _features(self, x: Tensor) -> Tensor:
        """Features of pixels in [-1, 1] with shape (B, 3, 299, 299)."""
        if x.device.type == "cpu":  # with channels innermost it takes half as long there (docs/log.md)
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def published_file() -> Path:
    """Where the published weights lie in torch.hub's cache, downloaded if they do not yet.

    Several processes may ask at once: the file takes its name when it is whole and its SHA-256 is right.

    Raises:
        InputError: It cannot be downloaded.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in _CACHED_AS:
        if (folder / name).is_file():
            return folder / name
    target = folder / _CACHED_AS[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(target), hash_prefix=SHA256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network or no room; another checksum
        reason = one_line(error, None)
        raise InputError(f"Inception's weights cannot be downloaded to {target} ({reason}); {_mend()}") from error
    return target


def _mend() -> str:
    return f"download {URL} and give its path, or put it into {Path(torch.hub.get_dir()) / 'checkpoints'}"


class _Unit(nn.Module):
    """A convolution, batch normalisation and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padding: str = "same"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Branches beside one another, their channels stacked.

    A branch is a chain of steps by name; where neighbours' names differ in a last letter a or b, it forks.
    """

    def __init__(self, *branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._branches: list[list[list[str]]] = []
        for branch in branches:
            for name, step in branch.items():
                self.add_module(name, step)
            forks = itertools.groupby(branch, key=lambda name: name.rstrip("ab"))
            self._branches.append([list(names) for _, names in forks])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(branch, x) for branch in self._branches], dim=1)

    def _along(self, branch: list[list[str]], x: Tensor) -> Tensor:
        for names in branch:
            outputs = [self.get_submodule(name)(x) for name in names]
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return x


def _average() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _mixed_35(width: int, pooled: int) -> nn.Module:
    """At 35 x 35; a 5 x 5 field by one kernel and by two."""
    return _Mixed(
        {"branch1x1": _Unit(width, 64)},
        {"branch5x5_1": _Unit(width, 48), "branch5x5_2": _Unit(48, 64, 5)},
        {"branch3x3dbl_1": _Unit(width, 64), "branch3x3dbl_2": _Unit(64, 96, 3), "branch3x3dbl_3": _Unit(96, 96, 3)},
        {"pool": _average(), "branch_pool": _Unit(width, pooled)},
    )


def _to_17(width: int) -> nn.Module:
    """From 35 x 35 to 17 x 17."""
    return _Mixed(
        {"branch3x3": _Unit(width, 384, 3, stride=2, padding="valid")},
        {
            "branch3x3dbl_1": _Unit(width, 64),
            "branch3x3dbl_2": _Unit(64, 96, 3),
            "branch3x3dbl_3": _Unit(96, 96, 3, stride=2, padding="valid"),
        },
        {"pool": nn.MaxPool2d(3, stride=2)},
    )


def _mixed_17(inner: int, width: int = 768) -> nn.Module:
    """At 17 x 17; fields of 7 x 7 and 13 x 13 by kernels that lie and stand."""
    lying, standing = (1, 7), (7, 1)
    return _Mixed(
        {"branch1x1": _Unit(width, 192)},
        {
            "branch7x7_1": _Unit(width, inner),
            "branch7x7_2": _Unit(inner, inner, lying),
            "branch7x7_3": _Unit(inner, 192, standing),
        },
        {
            "branch7x7dbl_1": _Unit(width, inner),
            "branch7x7dbl_2": _Unit(inner, inner, standing),
            "branch7x7dbl_3": _Unit(inner, inner, lying),
            "branch7x7dbl_4": _Unit(inner, inner, standing),
            "branch7x7dbl_5": _Unit(inner, 192, lying),
        },
        {"pool": _average(), "branch_pool": _Unit(width, 192)},
    )


def _to_8(width: int) -> nn.Module:
    """From 17 x 17 to 8 x 8."""
    return _Mixed(
        {"branch3x3_1": _Unit(width, 192), "branch3x3_2": _Unit(192, 320, 3, stride=2, padding="valid")},
        {
            "branch7x7x3_1": _Unit(width, 192),
            "branch7x7x3_2": _Unit(192, 192, (1, 7)),
            "branch7x7x3_3": _Unit(192, 192, (7, 1)),
            "branch7x7x3_4": _Unit(192, 192, 3, stride=2, padding="valid"),
        },
        {"pool": nn.MaxPool2d(3, stride=2)},
    )


def _mixed_8(width: int, pool: nn.Module) -> nn.Module:
    """At 8 x 8; a kernel that lies and one that stands, side by side."""
    lying, standing = (1, 3), (3, 1)
    return _Mixed(
        {"branch1x1": _Unit(width, 320)},
        {
            "branch3x3_1": _Unit(width, 384),
            "branch3x3_2a": _Unit(384, 384, lying),
            "branch3x3_2b": _Unit(384, 384, standing),
        },
        {
            "branch3x3dbl_1": _Unit(width, 448),
            "branch3x3dbl_2": _Unit(448, 384, 3),
            "branch3x3dbl_3a": _Unit(384, 384, lying),
            "branch3x3dbl_3b": _Unit(384, 384, standing),
        },
        {"pool": pool, "branch_pool": _Unit(width, 192)},
    )


def _like_pytorch_fid(pixels: Tensor) -> Tensor:
    """Pixels in [0, 255] as those in [-1, 1] at 299 x 299; output j is from (j + 1/2) * in / out - 1/2."""
    return 2 * F.interpolate(pixels / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def _like_torch_fidelity(pixels: Tensor) -> Tensor:
    """Pixels in [0, 255] as those in [-1, 1) at 299 x 299; output j is from j * in / out."""
    return (_stretched(_stretched(pixels, dim=3), dim=2) - 128) / 128


def _stretched(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation along one axis, positions in float32 as TensorFlow 1 has them."""
    size = x.shape[dim]
    scale = torch.tensor(size / SIDE, dtype=torch.float32, device=x.device)
    position = torch.arange(SIDE, dtype=torch.float32, device=x.device) * scale
    below = position.long()
    share = (position - below).to(x.dtype).view([-1 if axis == dim else 1 for axis in range(x.ndim)])
    low = x.index_select(dim, below)
    return low + (x.index_select(dim, (below + 1).clamp(max=size - 1)) - low) * share


_RESIZES = {"pytorch-fid": _like_pytorch_fid, "torch-fidelity": _like_torch_fidelity}


def _from_safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({error}); {_mend()}") from error


def _check_fit(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Refuse weights of another network, naming the first that does not fit."""
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*shapes, *there]:
        if there.get(name) != shapes.get(name):
            raise InputError(
                f"{source} is not the Inception of the scores ({name}: {there.get(name, 'nothing')} there, "
                f"{shapes.get(name, 'nothing')} wanted); {_mend()}"
            )


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random weights that keep the scale: He's for convolutions, normalisation near the identity."""
    noise = torch.randn(shape, generator=generator(seed, f"inception {name}"))
    if name.endswith("running_var"):
        return (0.2 * noise).exp()
    if len(shape) == 1:  # normalisation and the classifier's bias
        return (1.0 if name.endswith("bn.weight") else 0.0) + 0.1 * noise
    return noise * math.sqrt(2 / noise[0].numel())
