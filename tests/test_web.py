"""The web: what Python exports draws in a headless Chromium as Python draws, and the page says what goes wrong."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from bksdm.common.assets import ART, asset
from bksdm.common.errors import InputError
from bksdm.export import npm, to_web
from bksdm.export.formats import Source
from bksdm.export.onnx_pieces import into_pieces
from bksdm.generate.sampling import scheduler_named
from bksdm.generate.web import Files, server
from bksdm.models.decoder import SmallDecoder, load_model, with_own_decoder
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from bksdm.runtime.folder import open_folder
from bksdm.runtime.noise import Generator
from bksdm.runtime.schedulers import trajectory
from bksdm.runtime.tokens import Tokenizer
from browsing import foreign, needs_browser, new_context
from fast import slow
from test_runtime_schedulers import CASES
from test_tokens import LONG, SAYINGS, WORDS
from tiny_models import MAX_TOKENS, PICTURE, V1_UNET, build_pipeline, build_tokenizer
from verbs import Run, told

pytest_plugins = ["verbs_fixtures", "browsing_fixtures"]

TYPESCRIPT = "typescript@7.0.2"
PROMPT = "red apple"
DRAWING = "document.querySelector('#doing').innerText.startsWith('Step')"


class Bare(Files):
    """A server that does not know which headers pages need for threads."""

    headers_sent = {}  # noqa: RUF012


@contextlib.contextmanager
def served(folder: Path, kind: type[Files] = Files) -> Iterator[str]:
    """A folder at an address."""
    with server(str(folder), "127.0.0.1", 0, kind) as opened:
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{opened.server_port}/"
        opened.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def source(exported: StableDiffusionPipeline) -> Source:
    return Source("runs/few/student", exported, None, "fp32", PICTURE, PICTURE, sampling=Defaults(3, 2.0))


@pytest.fixture(scope="module")
def folder(source: Source, onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared ONNX folder with a page. Shared: not to be changed."""
    made = tmp_path_factory.mktemp("web")
    try:
        to_web.add_page(source, made)
    except InputError as error:
        pytest.skip(str(error))
    shutil.copytree(onnx_folder, made, dirs_exist_ok=True)
    to_web.add_manifest(source, made)
    (made / SAMPLING_FILE).write_text(source.sampling.text())
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as found:
        yield found


@pytest.fixture(scope="module")
def script(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Runs JavaScript in a page of that address, which gets an argument and gives an answer."""
    tab = new_context(browser).new_page()
    tab.goto(f"{address}manifest.json")
    yield tab.evaluate
    tab.context.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """The page, read; requests to anywhere else fail the test."""
    context = new_context(browser)
    strangers: list[str] = []
    context.on("request", lambda request: strangers.append(request.url) if foreign(request.url, address) else None)
    yield visited(context.new_page(), address)
    context.close()
    assert not strangers


def visited(tab: Any, address: str) -> Any:
    """The page, once it knows what the folder holds."""
    tab.goto(address)
    tab.wait_for_function("document.querySelector('#steps').value")
    return tab


def draw(tab: Any, prompt: str = PROMPT, **fields: object) -> str:
    """Fill in the form and press the button; what stands below when something has come of it."""
    before = tab.locator("#history figure").count()
    for name, value in {"prompt": prompt, **fields}.items():
        tab.fill(f"#{name}", str(value))
    tab.click("#draw")
    tab.wait_for_function(
        f"document.querySelectorAll('#history figure').length > {before} || document.querySelector('#error').innerText"
    )
    return tab.inner_text("#error") or tab.inner_text("#doing")


# Parts of the JavaScript, each by itself


@needs_browser
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_noise_is_that_of_python(script: Callable[..., Any], seed: int) -> None:
    counts = [64, 3, 16, 37, 1, 1024]
    found = script(
        """async ([seed, counts]) => {
            const { Generator } = await import("/bksdm/noise.js");
            const generator = new Generator(seed);
            return counts.map((count) => Array.from(generator.normal(count)));
        }""",
        [seed, counts],
    )
    generator = Generator(seed)
    for count, ours in zip(counts, found, strict=True):
        np.testing.assert_allclose(ours, generator.normal([count]), rtol=0, atol=5e-7)


def known(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The config of a scheduler where the page has it."""
    if name not in to_web.SAMPLERS:
        return None
    config = {**options, "_class_name": name}
    return config if to_web.is_known(config) else None


@needs_browser
def test_ways_are_those_of_python(script: Callable[..., Any]) -> None:
    """Every scheduler of the page in every configuration, with few steps and many, from noise and from the middle."""
    configs = [config for name, options in CASES if (config := known(name, options))]
    assert {config["_class_name"] for config in configs} == {*to_web.SAMPLERS}
    rng = np.random.default_rng(0)
    outputs, noises = (rng.standard_normal((60, 8)).astype(np.float32) for _ in range(2))
    for config in configs:
        most = config.get("num_train_timesteps", 1000)
        for steps, strength in [(1, 1), (4, 1), (20, 1), (7, 0.6)]:
            if steps > most:
                continue
            way = trajectory(config, steps, strength)
            given = iter(noises[1:])
            sample, samples = way.noisy(noises[0], outputs[-1]), []
            for number in range(len(way.timesteps)):
                sample = way.step(outputs[number], sample, lambda given=given: next(given))
                samples.append(sample)
            found = script(
                """async ([options, steps, strength, outputs, noises]) => {
                    const { trajectory } = await import("/bksdm/samplers.js");
                    const arrays = (lists) => lists.map((list) => Float32Array.from(list));
                    const [made, drawn] = [arrays(outputs), arrays(noises)];
                    const way = trajectory(options, steps, strength);
                    let sample = way.noisy(drawn.shift(), made[made.length - 1]);
                    const step = (_, i) => (sample = way.step(made[i], sample, () => drawn.shift()));
                    const samples = way.timesteps.map(step).map((each) => Array.from(each));
                    return { timesteps: way.timesteps, samples };
                }""",
                [to_web.scheduler(config)["options"], steps, strength, outputs.tolist(), noises.tolist()],
            )
            assert found["timesteps"] == way.timesteps.tolist(), config
            np.testing.assert_allclose(found["samples"], samples, rtol=2e-5, atol=2e-5, err_msg=str((config, steps)))


PROMPTS = [
    "red apple, noto style",
    "",
    "  two   spaces\tand\na line  ",
    "It's 2026, isn't it? We've 3.14 (π) & 50% off!!! #1",
    "Éclair à la crème brûlée, naïve café, Straße, ΣΊΣΥΦΟΣ, İstanbul",
    "中文 日本語 한국어 🍎🚗 ½ ² ™",
    "a very long prompt about a red apple on a green table in a blue house by the yellow sea, with birds",
    "<|startoftext|> within <|endoftext|> a prompt",
]


@needs_browser
@pytest.mark.parametrize(("prompts", "words"), [(PROMPTS, False), ([*SAYINGS, LONG], True)], ids=["plain", "saved"])
def test_tokens_are_those_of_python(
    script: Callable[..., Any], tmp_path: Path, prompts: list[str], words: bool
) -> None:
    folder, length = asset(ART, "model", "tokenizer"), 16
    if words:
        folder, length = tmp_path, MAX_TOKENS
        save_speaking(folder)
    files = [json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")]
    captions = to_web.caption_facts(folder / "tokenizer.json", length, pad(files[0]))
    assert bool(captions["words"]) == words
    found = script(
        """async ([files, captions, prompts]) => {
            const library = await import("/vendor/tokenizers/tokenizers.min.mjs");
            const { Tokenizer } = await import("/bksdm/tokens.js");
            const tokenizer = new Tokenizer(new library.Tokenizer(...files), captions);
            return prompts.map((prompt) => tokenizer.encode(prompt));
        }""",
        [files, captions, prompts],
    )
    python = Tokenizer(folder, length)
    assert [each["ids"] for each in found] == python(prompts).tolist()
    assert [each["lost"] for each in found] == [python.cut_off(prompt) for prompt in prompts]


def save_speaking(folder: Path) -> None:
    """A tokenizer that knows words of several vectors."""
    tokenizer = build_tokenizer()
    for word, vectors in WORDS.items():
        tokenizer.add_tokens([word, *(f"{word}_{number}" for number in range(1, vectors))])
    tokenizer.save_pretrained(folder)


def pad(tokenizer: dict[str, Any]) -> int:
    return next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|endoftext|>")


def test_the_javascript_is_typed() -> None:
    if shutil.which("npx") is None:
        pytest.skip("needs npx, which comes with npm")
    words = [
        "npx",
        "--yes",
        "--package",
        TYPESCRIPT,
        "tsc",
        "--project",
        str(Path(__file__).with_name("jsconfig.json")),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode and "error TS" not in done.stdout:
        pytest.skip(f"{TYPESCRIPT} cannot be fetched: {done.stderr.strip()[-200:]}")
    assert done.stdout == ""


# Pictures


DRAW = """async (wishes) => {
    const { open } = await import("/bksdm.js");
    const model = await open({ base: "/", gpu: false });
    const pictures = [];
    for (const { image, ...wish } of wishes) {
        const data = image && { ...image, data: Uint8ClampedArray.from(image.data) };
        const { pixels } = await model.draw({ ...wish, ...(data ? { image: data } : {}) });
        pictures.push(Array.from(pixels.data));
    }
    model.close();
    return pictures;
}"""


def drawn(script: Callable[..., Any], wishes: list[dict[str, Any]], side: int) -> list[np.ndarray]:
    """Pictures with shape (H, W, 3) that the page's runtime draws."""
    return [np.array(data).reshape(side, side, 4)[..., :3] for data in script(DRAW, wishes)]


@needs_browser
def test_pictures_are_those_of_python(script: Callable[..., Any], folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
    rgba = np.concatenate([image, np.full((PICTURE, PICTURE, 1), 255, np.uint8)], axis=2)
    begun = {"image": {"data": rgba.flatten().tolist(), "width": PICTURE, "height": PICTURE}, "strength": 0.7}
    wishes: list[dict[str, Any]] = [
        {"prompt": "red apple", "seed": 3},
        {"prompt": "green car", "seed": 4, "guidance": 1, "steps": 2, "scheduler": "DDIMScheduler"},
        {"prompt": "a car", "seed": 5, "negative": "red", "scheduler": "DPMSolverMultistepScheduler", "steps": 5},
        {"prompt": "red car", "seed": 6, **begun},
    ]
    ours = drawn(script, wishes, PICTURE)
    for wish, picture in zip(wishes, ours, strict=True):
        pipeline = open_folder(folder, threads=1, scheduler=wish.get("scheduler"))
        told_of = {
            "steps": wish.get("steps"),
            "guidance": wish.get("guidance"),
            "negative_prompt": wish.get("negative", ""),
        }
        started = {"image": image, "strength": 0.7} if "image" in wish else {}
        ((theirs,),) = pipeline.sample([wish["prompt"]], [wish["seed"]], **told_of, **started)
        assert np.abs(picture - theirs.astype(int)).max() <= 1


@needs_browser
def test_what_cannot_be_drawn_is_refused_and_what_is_closed_is_cancelled(script: Callable[..., Any]) -> None:
    found = script(
        """async () => {
            const { open } = await import("/bksdm.js");
            const cancel = new AbortController();
            const fetching = { base: "/", gpu: false, signal: cancel.signal, onProgress: () => cancel.abort() };
            const said = [await open(fetching).catch(({ name }) => name)];
            said.push(await open(fetching).catch(({ name }) => name));
            const model = await open({ base: "/", gpu: false });
            const wishes = [{}, { prompt: 5 }, { prompt: "a car", negative: 5 }];
            for (const wish of wishes) said.push(await model.draw(wish).catch(({ message }) => message));
            const { width, height } = model.about.manifest.shape;
            const image = { data: new Uint8ClampedArray(12), width, height };
            said.push(await model.draw({ prompt: "a car", image }).catch(({ message }) => message));
            const drawing = model.draw({ prompt: "a car", steps: 900 }, { onProgress: () => model.close() });
            said.push(await drawing.catch(({ name }) => name));
            said.push(await model.draw({ prompt: "a car" }).catch(({ message }) => message));
            return said;
        }"""
    )
    assert found == [
        "AbortError",
        "AbortError",
        "the prompt is undefined; give a text",
        "the prompt is 5; give a text",
        "the negative prompt is 5; give a text",
        f"the image has 12 bytes for {PICTURE} x {PICTURE} pixels; give it as ImageData has it, in RGBA, "
        f"{PICTURE} x {PICTURE}",
        "AbortError",
        "the model is closed; open it again",
    ]


@pytest.mark.slow
@needs_browser
def test_the_embedded_student_draws_as_in_python(browser: Any, done: Run, tmp_path: Path) -> None:
    done("prune", "emoji", "--recipe", "small", "--out", tmp_path / "student")
    done("export", tmp_path / "student", "--to", "web", "--out", tmp_path / "web")
    prompts = ["red apple, noto style", "whale, flat style", "smiling face, twemoji style"]
    wishes = [{"prompt": prompt, "seed": seed, "steps": 8} for seed, prompt in enumerate(prompts)]
    with served(tmp_path / "web") as address:
        tab = new_context(browser).new_page()
        tab.goto(f"{address}manifest.json")
        ours = drawn(tab.evaluate, wishes, 64)
        tab.context.close()
    theirs = open_folder(tmp_path / "web", threads=1).sample(prompts, [0, 1, 2], steps=8)
    for picture, (made,) in zip(ours, theirs, strict=True):
        assert np.abs(picture - made.astype(int)).mean() < 2


# The page


@needs_browser
@pytest.mark.slow
def test_a_picture_is_drawn_and_kept_with_its_parameters(tab: Any) -> None:
    text = draw(tab, seed=7, negative="car")
    assert re.fullmatch(r"\d+\.\d\d s, seed 7\.", text)
    with tab.expect_download() as download:
        tab.click("#history a")
    assert download.value.suggested_filename == "red-apple-7.png"
    made = told(download.value.path())
    assert (made["prompt"], made["seed"], made["negative_prompt"]) == (PROMPT, 7, "car")
    assert (made["steps"], made["guidance"], made["model"], made["width"]) == (3, 2.0, "few", PICTURE)
    with Image.open(download.value.path()) as opened:
        opened.load()
        assert opened.size == (PICTURE, PICTURE)
        assert opened.text["parameters"].startswith("red apple\nNegative prompt: car\nSteps: 3, Sampler: ")
    assert f"seed 7, 3 steps, {PICTURE}x{PICTURE}" in tab.inner_text("#history figure")


@needs_browser
def test_the_download_that_is_told_is_that_of_the_processors_build(tab: Any, folder: Path) -> None:
    size = json.loads((folder / "manifest.json").read_text())["runtime"]["wasm"]
    tab.wait_for_function("document.querySelector('#about').innerText")
    assert f" and {size / 2**20:.1f} MiB of onnxruntime are fetched" in tab.inner_text("#about")


@needs_browser
def test_the_second_visit_needs_no_network(browser: Any, folder: Path) -> None:
    context = new_context(browser)
    with served(folder) as address:
        tab = visited(context.new_page(), address)
        first = draw(tab, seed=1)
    context.set_offline(True)
    tab.reload()
    tab.wait_for_function("document.querySelector('#steps').value")
    assert re.sub(r"\d+\.\d+ s", "", draw(tab, seed=1)) == re.sub(r"\d+\.\d+ s", "", first)
    context.close()


@needs_browser
def test_a_drawing_is_cancelled_and_the_next_one_drawn(tab: Any) -> None:
    tab.fill("#prompt", PROMPT)
    tab.fill("#steps", "900")
    tab.press("#prompt", "Enter")
    tab.wait_for_function(DRAWING)
    assert tab.is_disabled("#draw")
    tab.press("body", "Escape")
    tab.wait_for_selector("#doing >> text=Cancelled")
    assert tab.locator("#history figure").count() == 0
    assert "seed 2" in draw(tab, seed=2, steps=1)


@needs_browser
def test_bad_input_is_said_in_a_line(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert draw(tab, prompt=" ") == "The prompt is empty; say what the picture shows."
    tab.click("summary")
    tab.set_input_files("#image", tmp_path / "broken.png")
    assert draw(tab) == "Broken.png is not a picture that this browser reads; give another."


@needs_browser
@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        pytest.param(
            lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
            "its digest is not",
            id="changed",
        ),
        slow(lambda file: file.write_bytes(file.read_bytes()[:-1]), r"it has \d+ of \d+ bytes", id="cut"),
        slow(Path.unlink, r"Text_encoder/weights\.0 is missing on the server \(404\)", id="gone"),
    ],
)
def test_a_damaged_file_is_named(
    browser: Any, folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], line: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy / "text_encoder" / "weights.0")
    with served(copy) as address:
        context = new_context(browser)
        text = draw(visited(context.new_page(), address))
        context.close()
    assert re.search(line, text)
    assert text.startswith("Text_encoder/weights.0 is ")
    assert text.endswith("upload the folder again.") or text.endswith("upload the whole folder again.")


@needs_browser
def test_too_little_memory_is_said(browser: Any, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    runtime = (
        "export const env = {wasm: {}}, InferenceSession = {create() { throw new RangeError('too much memory'); }};"
    )
    (copy / "vendor" / "onnxruntime-web" / "ort.wasm.min.mjs").write_text(runtime)
    with served(copy) as address:
        context = new_context(browser)
        text = draw(visited(context.new_page(), address))
        context.close()
    assert text.startswith("There is not enough memory for this model (too much memory); close other tabs")


@needs_browser
@pytest.mark.slow
def test_a_server_without_the_headers_is_said_to_lack_them(browser: Any, folder: Path) -> None:
    with served(folder, Bare) as address:
        context = new_context(browser)
        tab = visited(context.new_page(), address)
        assert "Cross-Origin-Embedder-Policy: require-corp" in tab.inner_text("#notes")
        draw(tab, steps=1)
        assert "with 1 thread." in tab.inner_text("#notes")
        tab.reload()
        assert tab.evaluate("crossOriginIsolated")
        context.close()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser: Any, address: str, scheme: str) -> None:
    context = new_context(browser, viewport={"width": 390, "height": 844}, is_mobile=True, color_scheme=scheme)
    tab = visited(context.new_page(), address)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 128) == (scheme == "dark")
    context.close()


@needs_browser
def test_the_page_is_used_by_the_keyboard_alone(tab: Any) -> None:
    """From field to field in their order, all with names."""
    for name in ["prompt", "negative", "seed", "steps", "guidance", "scheduler"]:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.id") == name
        assert tab.evaluate("document.activeElement.labels[0].innerText.trim().length > 2")


@pytest.mark.slow
@needs_browser
def test_the_page_as_the_documents_show_it(browser: Any, tmp_path: Path) -> None:
    """The folder that BKSDM_WEB names; the picture goes to BKSDM_SCREENSHOT."""
    if "BKSDM_WEB" not in os.environ:
        pytest.skip("BKSDM_WEB names no folder of bksdm export --to web")
    with served(Path(os.environ["BKSDM_WEB"])) as address:
        context = new_context(browser, viewport={"width": 760, "height": 900}, device_scale_factor=1.5)
        tab = visited(context.new_page(), address)
        for prompt, seed in (("whale, flat style", 1), ("green apple, noto style", 0), ("red apple, noto style", 0)):
            draw(tab, prompt, seed=seed, steps=10)
        tab.screenshot(path=os.environ.get("BKSDM_SCREENSHOT", tmp_path / "web.png"), full_page=True)
        context.close()


@pytest.mark.slow
@needs_browser
def test_the_site_of_the_documents_draws(
    browser: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BKSDM_WEB", str(folder))
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(words, cwd=Path(__file__).parents[1], check=True)
    for file in (tmp_path / "live.html", tmp_path / "live" / "index.html"):
        links = re.findall(r'(?:href|src)="([^"#]+)', file.read_text())
        for link in [link for link in links if not re.match(r"[a-z]+:", link)]:
            assert (file.parent / link).exists(), link
    with served(tmp_path / "live") as address:
        context = new_context(browser)
        tab = visited(context.new_page(), address)
        assert draw(tab, seed=2, steps=1).endswith("seed 2.")
        context.close()


# The export


def test_the_embedded_models_students_take_its_small_decoder() -> None:
    assert isinstance(with_own_decoder(load_model("emoji")).vae.decoder, SmallDecoder)
    other = build_pipeline(V1_UNET)
    assert with_own_decoder(other) is other


def test_weights_lie_in_pieces_and_compute_the_same(onnx_folder: Path, tmp_path: Path) -> None:
    copy, most = Path(shutil.copytree(onnx_folder / "unet", tmp_path / "unet")), 20_000
    pieces = into_pieces(copy / "model.onnx", most, in_bytes=False)
    assert len(pieces) > 3
    assert max(piece.stat().st_size for piece in pieces) <= most
    assert {*copy.glob("weights.*")} == {*pieces}
    assert not (copy / "model.onnx.data").exists()
    np.testing.assert_allclose(answer(copy), answer(onnx_folder / "unet"), atol=1e-5)


def answer(unet: Path) -> np.ndarray:
    """What a U-Net says of fixed numbers."""
    rng = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(unet / "model.onnx")
    given = {"timestep": np.array([500], np.float32)}
    for name, shape in {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, MAX_TOKENS, 32)}.items():
        given[name] = rng.standard_normal(shape).astype(np.float32)
    return session.run(None, given)[0]


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_rows_in_sizeare_near(onnx_folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(onnx_folder / name, tmp_path / name))
    into_pieces(copy / "model.onnx", 2**20, in_bytes=True)
    ids = {"input_ids": np.arange(MAX_TOKENS)[None] % 7}
    run = answer if name == "unet" else lambda made: onnxruntime.InferenceSession(made / "model.onnx").run(None, ids)[0]
    np.testing.assert_allclose(run(copy), run(onnx_folder / name), atol=0.05)


def test_the_manifest_names_every_file_by_its_digest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == "few"
    for network in manifest["networks"].values():
        for entry in [network["graph"], *network["weights"]]:
            assert to_web.entry(folder / entry["path"], folder) == entry


@pytest.mark.slow
def test_the_folder_is_a_package_of_npm(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: /home/me\n")
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    done = subprocess.run(
        ["npm", "pack", "--dry-run", "--json"], cwd=folder, capture_output=True, text=True, check=True
    )
    (packed,) = json.loads(done.stdout)
    names = {file["path"] for file in packed["files"]}
    assert packed["name"] == "bksdm-few"
    assert names >= {"bksdm.js", "manifest.json", "unet/weights.0", "vendor/onnxruntime-web/ort.wasm.min.mjs"}
    assert not names & {"config.yaml", "export.json"}


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "EulerDiscreteScheduler",
            {},
            "EulerDiscreteScheduler is not known in the browser; give --scheduler with one of",
        ),
        ("PNDMScheduler", {"skip_prk_steps": False}, "without skip_prk_steps"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_schedulers_that_the_page_lacks_are_refused(source: Source, name: str, options: dict, line: str) -> None:
    pipeline = type(source.pipeline)(**source.pipeline.components)
    pipeline.scheduler = scheduler_named(name, pipeline.scheduler)
    pipeline.scheduler.register_to_config(**options)
    assert line in str(to_web.why_not(dataclasses.replace(source, pipeline=pipeline)))


def test_other_families_are_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("export", "emoji-flow", "--to", "web", "--out", tmp_path / "web")
    assert outcome.code == 2
    assert "the page draws by a U-Net and one text encoder; export to onnx or openvino" in outcome.said[0]


def test_a_package_that_is_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is missing; in .*, run npm pack @huggingface/tokenizers@"):
        npm.take(to_web.TOKENIZERS, str(tmp_path), tmp_path / "out")
    (tmp_path / to_web.TOKENIZERS.archive).write_bytes(b"other")
    with pytest.raises(InputError, match=r"is not @huggingface/tokenizers .* by its digest"):
        npm.take(to_web.TOKENIZERS, str(tmp_path), tmp_path / "out")


def test_demo_serves_no_other_folder(run: Run, tmp_path: Path) -> None:
    outcome = run("demo", "--web", tmp_path)
    assert outcome.code == 2
    assert "has no manifest.json; give a folder of bksdm export --to web" in outcome.said[0]


def test_demo_says_which_option_is_not_for_folders(run: Run, folder: Path) -> None:
    assert "steps is given with web" in run("demo", "--web", folder, "--steps", 3).said[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = run("demo", "--web", folder, "--port", taken.getsockname()[1])
    assert "cannot listen at 127.0.0.1" in outcome.said[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--port", 99999), "port is 99999; give one from 0, which takes a free one, to 65535"),
        (("--host", "nowhere.invalid"), "host is nowhere.invalid, which is no address here"),
    ],
)
def test_demo_says_where_nothing_can_listen(run: Run, folder: Path, words: tuple[object, ...], line: str) -> None:
    outcome = run("demo", "--web", folder, *words)
    assert outcome.code == 2
    assert line in outcome.said[0]


def test_it_listens_at_an_address_of_version_6(folder: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("has no such address")
    with server(str(folder), "::1", 0) as opened:
        assert opened.server_port > 0


def test_a_folder_for_the_web_reuses_nothing(folder: Path, tmp_path: Path) -> None:
    without = shutil.ignore_patterns("*.keeping", "*.outer")  # as `write` leaves them out
    made = Path(shutil.copytree(folder, tmp_path / "web", ignore=without))
    with pytest.raises(InputError, match="is for the web, where nothing is reused; export to onnx for that"):
        list(open_folder(made, threads=1).sample([PROMPT], [0], steps=2, reuse=2))
