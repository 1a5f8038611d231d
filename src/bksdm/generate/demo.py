"""`bksdm demo`: a page on which a prompt is drawn, by one model or by two from the same seed.

The page is Gradio's. Nothing on it comes from the network, and it is served to this machine alone unless another
address is asked for. One picture is drawn at a time; others wait in a queue of limited length.
"""

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from bksdm.common.devices import choose_device, choose_precision
from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.data.pictures import open_picture
from bksdm.generate.requests import Request
from bksdm.generate.run import save_picture
from bksdm.generate.sampling import is_flagged, sample
from bksdm.models.configs import check_ready
from bksdm.models.decoder import load_model
from bksdm.models.drawing import drawing
from bksdm.models.pipelines import (
    called,
    check_text_to_image,
    cutting,
    denoiser,
    image_size,
    scheduler_config,
    text_encoders,
)
from bksdm.options.generate import DemoOptions
from bksdm.pruning.cost import unet_cost
from bksdm.runtime.defaults import Defaults

_MOST_STEPS, _MOST_GUIDANCE = 100, 20
_ALIKE = 1.05  # ratio of two times that nobody would call different
_HISTORY = 24
_HEIGHT = 360  # of a picture on the page, in pixels
_SEEDS = 2**32
_CSS = """
.gradio-container { max-width: 68rem !important; margin: auto; }
#pictures { gap: 1rem; }
#pictures img { width: 100%; height: 100%; object-fit: contain !important; }
@media (max-width: 640px) { #pictures { flex-direction: column; } }
"""
_INTRODUCTION = """# bksdm

{sentence} A picture is drawn by the press of the button; the same seed gives the same picture again.
"""


@dataclass(frozen=True)
class Drawer:
    """A model on the page.

    Attributes:
        name: What it is called there.
        pipeline: On its device.
        how: The steps and the guidance that it begins with.
        about: Its size and its cost, in a line.
    """

    name: str
    pipeline: DiffusionPipeline
    how: Defaults
    about: str

    @classmethod
    def load(cls, model: str, how: Defaults, options: DemoOptions) -> "Drawer":
        """A MODEL as the options ask for it.

        Raises:
            InputError: There is no such model, or it does not draw from prompts.
        """
        device = choose_device(options.device)
        dtype = choose_precision(options.precision, device, training=False)
        pipeline = load_model(model, dtype, options.decoder)
        check_text_to_image(pipeline, model)
        encoders = text_encoders(pipeline)
        networks = (*encoders, denoiser(pipeline), pipeline.vae)
        tensors = [p for network in networks for p in network.parameters()]
        cost = unet_cost(denoiser(pipeline).config, tokens=encoders[0].config.max_position_embeddings)
        about = (
            f"U-Net: {cost.params / 1e6:.1f} M parameters, {cost.gmacs_all:.2f} GMACs a step; "
            f"whole model: {sum(p.numel() * p.element_size() for p in tensors) / 2**20:.0f} MiB"
        )
        return cls(called(model), pipeline.to(device), how, about)


@dataclass(frozen=True)
class Wish:
    """What is to be drawn."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    image: Image.Image | None
    strength: float


@dataclass(frozen=True)
class Made:
    """How long a picture took, where it lies with its parameters inside, and what there is to say of it."""

    seconds: float
    file: Path
    notes: Sequence[str] = ()


def demo(options: DemoOptions) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: An option or a model is unfit, Gradio is not installed, or the port is in use.
    """
    serve(options, wait=True)


def serve(options: DemoOptions, *, wait: bool) -> Any:
    """Load the models and open the page.

    Arguments:
        options: Of the verb.
        wait: Whether to serve until interrupted; else the page's `gradio.Blocks` is returned, whose `close` ends it.

    Raises:
        InputError: An option or a model is unfit, Gradio is not installed, or the port is in use.
    """
    _check(options)
    _check_port(options)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: PLC0415
    except ImportError as error:
        raise InputError("demo needs Gradio; run pip install 'bksdm[demo]'") from error
    models = [options.model, *([options.compare] if options.compare else [])]
    check_ready("demo", *models, options={"pool_keys": options.pool_keys})
    ways = [drawing(model, options.steps, options.guidance, options.spared()) for model in models]
    drawers = [Drawer.load(model, how, options) for model, how in zip(models, ways, strict=True)]
    folder = Path(tempfile.mkdtemp(prefix="bksdm-demo-"))
    page = _page(gradio, drawers, folder)
    page.queue(default_concurrency_limit=1, max_size=options.waiting).launch(
        server_name=options.host,
        server_port=options.port,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        footer_links=[],
        allowed_paths=[str(folder)],
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
    )
    say(f"http://{options.host}:{options.port} (Ctrl-C ends it)")
    if wait:
        page.block_thread()
        shutil.rmtree(folder, ignore_errors=True)
    return page


def draw(drawer: Drawer, wish: Wish, folder: Path, stepped: Callable[[], None]) -> Made:
    """Draw with one model.

    Raises:
        InputError: Its numbers are not finite.
    """
    height, width = image_size(drawer.pipeline)
    image = ImageOps.fit(wish.image, (width, height), Image.Resampling.BICUBIC) if wish.image else None
    began = time.perf_counter()
    ((picture,),) = sample(
        drawer.pipeline,
        [Request(wish.prompt, wish.seed)],
        steps=wish.steps,
        guidance=wish.guidance,
        spared=drawer.how.spared,
        image=image,
        strength=wish.strength,
        stepped=stepped,
    )
    seconds = time.perf_counter() - began
    file = folder / f"{drawer.name}-{wish.seed}-{secrets.token_hex(4)}.png"
    about = {"prompt": wish.prompt, "seed": wish.seed, "model": drawer.name, "steps": wish.steps}
    about |= {"guidance": wish.guidance, "strength": wish.strength if wish.image else None}
    save_picture(picture, file, about, scheduler_config(drawer.pipeline.scheduler))
    notes = ["the model's safety checker has made it black"] if is_flagged(picture) else []
    if lost := cutting(drawer.pipeline)(wish.prompt):
        notes.append(f"the prompt is longer than the model reads; cut off: {lost}")
    return Made(seconds, file, notes)


def wish_of(prompt: str, seed: float | None, steps: float, guidance: float, image: str | None, strength: float) -> Wish:
    """What a person asks for, checked; without a seed, one is drawn.

    Raises:
        InputError: Saying what to mend.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; say what the picture shows")
    if seed is not None and not 0 <= seed < _SEEDS:
        raise InputError(f"the seed is {seed:.0f}; give 0 or more, and less than 2^32")
    opened = open_picture(Path(image), "the picture to start from") if image else None
    if opened and steps * strength < 1:
        raise InputError(f"strength {strength} of {steps:.0f} steps leaves no step to do; give more of either")
    chosen = secrets.randbelow(_SEEDS) if seed is None else int(seed)
    return Wish(prompt.strip(), chosen, int(steps), float(guidance), opened, float(strength))


def _page(gradio: Any, drawers: list[Drawer], folder: Path) -> Any:
    names = " and ".join(f"`{drawer.name}`" for drawer in drawers)
    sentence = f"{names} {'draw the same side by side' if len(drawers) > 1 else 'draws'}."
    with gradio.Blocks(title="bksdm") as page:
        gradio.Markdown(_INTRODUCTION.format(sentence=sentence))
        prompt = gradio.Textbox(label="Prompt", placeholder="red apple, noto style", elem_id="prompt")
        with gradio.Row():
            seed = gradio.Number(label="Seed (empty for a new one)", value=None, precision=0, elem_id="seed")
            ways = _sliders(gradio, drawers)
        with gradio.Accordion("Start from a picture", open=False):
            image = gradio.File(label="Picture", elem_id="image")
            strength = gradio.Slider(0.05, 1, 0.8, step=0.05, label="Strength: how much is drawn anew")
        press = gradio.Button("Draw", variant="primary", elem_id="draw")
        pictures, notes = [], []
        with gradio.Row(elem_id="pictures"):
            for number, drawer in enumerate(drawers):
                with gradio.Column(min_width=240):
                    pictures.append(
                        gradio.Image(
                            label=drawer.name,
                            interactive=False,
                            format="png",
                            height=_HEIGHT,
                            buttons=["download", "fullscreen"],
                            elem_id=f"picture-{number}",
                        )
                    )
                    notes.append(gradio.Markdown(drawer.about, elem_id=f"note-{number}"))
        files = gradio.File(label="Pictures with their parameters inside", file_count="multiple", elem_id="files")
        history = gradio.Gallery(label="Before", columns=6, height="auto", elem_id="history")
        earlier = gradio.State([])

        def run(*given: Any, progress: Any = gradio.Progress()) -> Iterator[tuple[Any, ...]]:  # noqa: B008
            prompt, seed, image, strength, seen, *numbers = given
            seed = secrets.randbelow(_SEEDS) if seed is None else seed
            shown: list[Any] = [None] * len(drawers)
            told = [drawer.about for drawer in drawers]
            made: list[Made] = []
            try:
                wishes = [wish_of(prompt, seed, *way, image, strength) for way in _pairs(numbers, len(drawers))]
                for number, (drawer, wish) in enumerate(zip(drawers, wishes, strict=True)):
                    made.append(draw(drawer, wish, folder, _counting(progress, drawer.name, wish)))
                    # A file: a picture in memory is written anew at every yield, also while the browser reads it.
                    shown[number] = str(made[-1].file)
                    told[number] = _told(drawer, made, wish)
                    yield (*shown, *told, None, gradio.skip(), gradio.skip())
            except InputError as error:
                raise gradio.Error(str(error), print_exception=False) from error
            captions = [f"{drawer.name}: {wishes[0].prompt}, seed {wishes[0].seed}" for drawer in drawers]
            seen = [*((str(one.file), text) for one, text in zip(made, captions, strict=True)), *seen][:_HISTORY]
            yield (*shown, *told, [str(one.file) for one in made], seen, seen)

        wanted = [prompt, seed, image, strength, earlier, *ways]
        given = [*pictures, *notes, files, history, earlier]
        gradio.on([press.click, prompt.submit], run, wanted, given, concurrency_limit=1, concurrency_id="draw")
    return page


def _sliders(gradio: Any, drawers: list[Drawer]) -> list[Any]:
    """Steps and guidance, of all models at once where they begin with the same, else of each."""
    alike = len({drawer.how for drawer in drawers}) == 1
    found = []
    for drawer in drawers[:1] if alike else drawers:
        whose, how = "" if alike else f" of {drawer.name}", drawer.how
        steps, guidance = max(_MOST_STEPS, how.steps), max(_MOST_GUIDANCE, how.guidance)
        found.append(gradio.Slider(1, steps, how.steps, step=1, label=f"Steps{whose}"))
        found.append(gradio.Slider(1, guidance, max(1, how.guidance), step=0.5, label=f"Guidance{whose}"))
    return found


def _pairs(numbers: Sequence[float], count: int) -> list[tuple[float, float]]:
    """Steps and guidance of each of `count` models, from what the sliders say."""
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    return pairs if len(pairs) == count else pairs * count


def _counting(progress: Any, name: str, wish: Wish) -> Callable[[], None]:
    """Moves the bar on the page at every step."""
    total = max(1, int(wish.steps * wish.strength)) if wish.image else wish.steps
    done = 0

    def stepped() -> None:
        nonlocal done
        done += 1
        progress((min(done, total), total), desc=name, unit="steps")

    return stepped


def _told(drawer: Drawer, made: list[Made], wish: Wish) -> str:
    """What stands under a picture: its time, beside the first model's."""
    seconds = made[-1].seconds
    times = f" ({pace(made[0].seconds / seconds)})" if len(made) > 1 else ""
    return "\n\n".join([f"**{seconds:.2f} s**{times}, seed {wish.seed}", *made[-1].notes, drawer.about])


def pace(ratio: float) -> str:
    """How fast the second model is, in words, from the seconds of the first over its own."""
    if _ALIKE > ratio > 1 / _ALIKE:
        return "as fast as the first"
    words = f"{ratio:.1f} times as fast as" if ratio > 1 else f"{1 / ratio:.1f} times slower than"
    return f"{words} the first"


def _check(options: DemoOptions) -> None:
    if options.waiting < 1:
        raise InputError(f"waiting is {options.waiting}; give at least 1")
    if options.steps is not None and not 1 <= options.steps <= _MOST_STEPS:
        raise InputError(f"steps is {options.steps}; give 1 to {_MOST_STEPS}")
    if options.guidance is not None and not 1 <= options.guidance <= _MOST_GUIDANCE:
        raise InputError(f"guidance is {options.guidance}; give 1 to {_MOST_GUIDANCE}")
    if not 1 <= options.port < 2**16:
        raise InputError(f"port is {options.port}; give 1 to {2**16 - 1}")


def _check_port(options: DemoOptions) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise InputError(
                f"cannot listen at {options.host}:{options.port} ({error.strerror}); give another --port"
            ) from error
