"""`bksdm prepare`: what the VAE and the text encoder make of the data, computed once and kept on the disk.

The data are cut into shards. A shard appears when it is whole, so the same command goes on after a kill;
several processes share the shards, and what is in a shard does not depend on how many they are.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bksdm.common.devices import VAE_LAYOUT, choose_device, choose_precision, processors
from bksdm.common.errors import InputError
from bksdm.common.processes import processes
from bksdm.common.progress import bar, say
from bksdm.common.prompts import CutOff
from bksdm.common.runs import check_free, open_run, write_text
from bksdm.data.pictures import PictureSamples, sides
from bksdm.data.prepared import Prepared, is_prepared, write_index, write_shard
from bksdm.data.source import Source, read_source
from bksdm.data.stream import Batch
from bksdm.distill.conditions import Conditions
from bksdm.models.configs import check_ready, load_denoiser_config
from bksdm.models.digests import network_digest
from bksdm.models.pipelines import (
    caption_length,
    check_multiple,
    check_resolution,
    config_size,
    cutting,
    load_pipeline,
    pixels_a_side,
    pixels_of_a_token,
    tokenizing,
)
from bksdm.options.data import PrepareOptions

_MAY_CHANGE = ("json", "device", "workers", "max_broken")
_JUDGED_FROM = 100  # pictures; a share of fewer says little


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Encode the data; the same options again go on where the run stopped.

    Returns:
        What `prepared.json` holds: see `Prepared`, and `images_per_second` of a process beside
        `vae_images_per_second`, which the VAE alone would have reached.

    Raises:
        InputError: An option, the teacher or the data are unfit, or too many pictures cannot be read.
    """
    check_ready("prepare", options.teacher)
    _check(options)
    if is_prepared(options.data):
        raise InputError(f"data {options.data} is prepared already; give the pictures that it was made from")
    source = read_source(options.data, options.image_column, options.text_column, options.split)
    work = _Work.load(options, source)
    settings = dataclasses.asdict(options) | dataclasses.asdict(work.about)
    out, group = Path(options.out), processes()
    check_free(out, "prepare", settings, _MAY_CHANGE)
    shards = list(_shards(out, len(source.pictures), options.shard_size))
    missing = [shard for shard in shards if not shard.done]
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(out, "prepare", settings, _MAY_CHANGE, {"device": str(work.device)})
        (out / "shards").mkdir(exist_ok=True)
    group.wait()

    with bar(len(source.pictures), "pictures", sum(len(shard.rows) for shard in shards if shard.done)) as progress:
        seen, skipped = 0, list[dict[str, str]]()
        for shard, report in work.encode(group.share(missing)):
            seen, skipped = seen + len(shard.rows), skipped + report["skipped"]
            progress.advance(group.count * len(shard.rows))
            if seen >= _JUDGED_FROM:
                _judge(options, seen, skipped, out)
    group.wait()
    if group.main:
        _finish(options, work.about, shards)
    group.wait()
    return dict(json.loads((out / "prepared.json").read_text()))


@dataclass(frozen=True)
class _Shard:
    """Some rows of the data, and where their latents go; `report` appears before `file`, and tells what was skipped."""

    rows: range
    file: Path
    report: Path

    @property
    def done(self) -> bool:
        return self.file.exists() and self.report.exists()


def _shards(out: Path, pictures: int, size: int) -> Iterator[_Shard]:
    count = -(-pictures // size)
    for number in range(count):
        rows = range(number * size, min((number + 1) * size, pictures))
        yield _Shard(rows, out / f"data-{number:05d}-of-{count:05d}.arrow", out / "shards" / f"{number:05d}.json")


@dataclass(frozen=True)
class _Read:
    """A picture that was read, or the reason why it was not."""

    name: str
    text: str = ""
    pixels: Tensor | None = None
    reason: str = ""
    told: Batch = dataclasses.field(default_factory=dict)


class _Reader(Dataset[Any]):
    def __init__(self, samples: PictureSamples) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> _Read:
        picture = self.samples.pictures[index]
        try:
            told = self.samples.seen(index, flipped=False)
            return _Read(picture.name, picture.text, told.pop("pixel_values"), told=told)
        except InputError as error:
            return _Read(picture.name, reason=str(error))


@dataclass(frozen=True)
class _Work:
    """Pictures and the networks that encode them."""

    samples: PictureSamples
    conditions: Conditions
    cut_off: CutOff
    device: torch.device
    about: Prepared
    batch_size: int
    workers: int

    @classmethod
    def load(cls, options: PrepareOptions, source: Source) -> "_Work":
        device = choose_device(options.device)
        pipeline = load_pipeline(
            options.teacher, choose_precision(options.precision, device, training=False), with_denoiser=False
        )
        check_multiple(pixels_of_a_token(pipeline), resolution=options.resolution)
        conditions = Conditions.of(pipeline)
        factor, config = pixels_a_side(pipeline), load_denoiser_config(options.teacher)
        resolution = options.resolution or config_size(config, factor)
        height, width = sides(resolution)
        samples = PictureSamples(source.pictures, resolution, tokenizing(pipeline), told=conditions.of_fitted)
        shapes = conditions.family.condition_shapes(config, caption_length(pipeline))
        kept = conditions.family.of_picture + (conditions.family.of_caption if options.text_embeddings else ())
        about = Prepared(
            teacher=options.teacher,
            vae=network_digest(pipeline.vae),
            text_encoder=network_digest(*conditions.encoders) if options.text_embeddings else None,
            source=source.digest,
            resolution=resolution,
            latent_shape=(conditions.family.channels_of(pipeline.vae.config), height // factor, width // factor),
            context_shape=cast(tuple[int, int], shapes["context"]) if options.text_embeddings else None,
            flip=options.flip,
            storage=options.storage,
            told={name: shapes[name] for name in kept if name != "context"},
        )
        pipeline.to(device)
        pipeline.vae.to(memory_format=VAE_LAYOUT)
        workers = min(options.workers, processors())
        return cls(samples, conditions, cutting(pipeline), device, about, options.batch_size, workers)

    def encode(self, shards: Sequence[_Shard]) -> Iterator[tuple[_Shard, dict[str, Any]]]:
        """Write `shards`, and yield each with its report; pictures are read ahead."""
        loader: DataLoader[list[_Read]] = DataLoader(
            _Reader(self.samples),
            batch_sampler=[list(rows) for shard in shards for rows in self._batches(shard)],
            num_workers=self.workers,
            collate_fn=list,
        )
        batches = iter(loader)
        for shard in shards:
            began, in_vae, skipped, cut = time.perf_counter(), 0.0, [], 0
            with write_shard(shard.file, self.about.schema) as write:
                for _ in self._batches(shard):
                    read = next(batches)
                    skipped += [{"name": item.name, "reason": item.reason} for item in read if item.pixels is None]
                    whole = [item for item in read if item.pixels is not None]
                    cut += sum(bool(self.cut_off(item.text)) for item in whole)
                    if whole:
                        numbers, seconds = self._numbers(whole)
                        in_vae += seconds
                        names, texts = [item.name for item in whole], [item.text for item in whole]
                        write(self.about.rows(names, texts, numbers))
                report = {
                    "pictures": len(shard.rows) - len(skipped),
                    "skipped": skipped,
                    "captions_cut": cut,
                    "seconds": time.perf_counter() - began,
                    "vae_seconds": in_vae,
                }
                write_text(shard.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
            yield shard, report

    def _batches(self, shard: _Shard) -> list[range]:
        """The same in every run, so that the VAE rounds the same."""
        return [shard.rows[start : start + self.batch_size] for start in range(0, len(shard.rows), self.batch_size)]

    def _numbers(self, read: Sequence[_Read]) -> tuple[dict[str, Tensor], float]:
        """Columns of numbers, and the seconds that the VAE took."""
        began = time.perf_counter()
        pixels = torch.stack([item.pixels for item in read if item.pixels is not None]).to(self.device)
        mean, std = (part.cpu() for part in self.conditions.posterior(pixels))
        numbers = {"mean": mean, "std": std}
        if self.about.flip:
            mean, std = (part.cpu() for part in self.conditions.posterior(pixels.flip(-1)))
            numbers |= {"mean_flipped": mean, "std_flipped": std}
        seconds = time.perf_counter() - began
        numbers |= {name: torch.stack([item.told[name] for item in read]) for name in read[0].told}
        if self.about.context_shape:
            ids = torch.stack([self.samples.tokenize(item.text) for item in read]).to(self.device)
            numbers |= self.conditions.embedded(ids)
        return numbers, seconds


def _finish(options: PrepareOptions, about: Prepared, shards: Sequence[_Shard]) -> None:
    """Sum up the shards, and make one data set of them."""
    out = Path(options.out)
    reports = [json.loads(shard.report.read_text(encoding="utf-8")) for shard in shards]
    skipped = [line for report in reports for line in report["skipped"]]
    write_text(out / "skipped.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped))
    pictures = sum(report["pictures"] for report in reports)
    _judge(options, pictures + len(skipped), skipped, out)
    seconds, in_vae = (sum(report[key] for report in reports) for key in ("seconds", "vae_seconds"))
    cut = sum(report.get("captions_cut", 0) for report in reports)
    if cut:
        say(f"{cut} of {pictures} captions are longer than the text encoder reads, and are cut")
    rates = {"images_per_second": pictures / seconds, "vae_images_per_second": pictures / in_vae}
    about = dataclasses.replace(about, pictures=pictures, skipped=len(skipped))
    write_index(out, [shard.file.name for shard in shards], about, rates)


def _judge(options: PrepareOptions, seen: int, skipped: Sequence[dict[str, str]], out: Path) -> None:
    if len(skipped) > options.max_broken * seen or len(skipped) == seen:
        raise InputError(
            f"{len(skipped)} of {seen} pictures of {options.data} cannot be read, more than max_broken "
            f"{options.max_broken:g} allows; see {out / 'shards'}, mend them or allow more "
            f"(the first: {skipped[0]['reason']})"
        )


def _check(options: PrepareOptions) -> None:
    for name in ("batch_size", "shard_size"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    if options.workers < 0:
        raise InputError(f"workers is {options.workers}; give 0 or more")
    if not 0 <= options.max_broken <= 1:
        raise InputError(f"max_broken is {options.max_broken}; give a share from 0 to 1")
    check_resolution(options.resolution)
