"""The page, in a real browser: a prompt is typed, a button pressed, and two pictures appear with their times."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bksdm.common.errors import InputError
from bksdm.generate.demo import Wish, pace, serve, wish_of
from bksdm.models.configs import load_denoiser_config
from bksdm.options.generate import DemoOptions
from bksdm.pruning.cost import unet_cost
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from browsing import foreign, needs_browser, new_context
from tiny_models import MAX_TOKENS, PICTURE
from verbs import Run, told

pytest_plugins = ["verbs_fixtures", "browsing_fixtures"]

gradio = pytest.importorskip("gradio", reason="needs Gradio: pip install 'bksdm[demo]'")
gradio_client = pytest.importorskip("gradio_client")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address(exported_model: Path, exported_student: Path) -> Iterator[str]:
    """The page with a student and its teacher."""
    port = free_port()
    page = serve(DemoOptions(str(exported_student), str(exported_model), steps=3, guidance=2.0, port=port), wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """The page, loaded; requests to anywhere else fail the test."""
    context = new_context(browser, viewport={"width": 1100, "height": 1100})
    opened = context.new_page()
    strangers: list[str] = []
    opened.on("request", lambda request: strangers.append(request.url) if foreign(request.url, address) else None)
    opened.goto(address)
    opened.wait_for_selector("#draw")
    yield opened
    context.close()
    assert not strangers


@needs_browser
def test_a_prompt_becomes_two_pictures_with_their_times(tab: Any) -> None:
    tab.fill("#prompt textarea", "red apple")
    tab.fill("#seed input", "7")
    tab.click("#draw")
    for number in range(2):
        tab.wait_for_selector(f"#picture-{number} img")
        tab.wait_for_function(f"document.querySelector('#picture-{number} img').naturalWidth === {PICTURE}")
        assert re.search(r"-7-[0-9a-f]{8}\.png$", tab.get_attribute(f"#picture-{number} img", "src"))  # the saved file
        tab.wait_for_selector(f"#note-{number} >> text=seed 7")
        note = tab.inner_text(f"#note-{number}")
        assert float(re.search(r"([\d.]+) s", note).group(1)) > 0
        assert "seed 7" in note
        assert "M parameters" in note
        assert "GMACs a step" in note
    assert re.search(r"(as fast as|slower than) the first", tab.inner_text("#note-1"))
    tab.wait_for_selector("#history img")
    with tab.expect_download() as download:
        tab.locator("#files a[download]").first.click()
    made = told(download.value.path())
    assert (made["prompt"], made["seed"]) == ("red apple", 7)


@pytest.mark.slow
@needs_browser
def test_the_page_as_the_documents_show_it(browser: Any, exported_model: Path, tmp_path: Path) -> None:
    """The embedded model beside a student, named by BKSDM_STUDENT; the picture goes to BKSDM_SCREENSHOT."""
    port, student = free_port(), os.environ.get("BKSDM_STUDENT", "emoji")
    page = serve(DemoOptions(student, "emoji", guidance=2.5, port=port), wait=False)
    context = new_context(browser, viewport={"width": 1000, "height": 1000}, device_scale_factor=1.5)
    tab = context.new_page()
    tab.goto(f"http://127.0.0.1:{port}")
    for prompt, seed in (("red apple, noto style", 3), ("whale, flat style", 4)):
        tab.fill("#prompt textarea", prompt)
        tab.fill("#seed input", str(seed))
        tab.click("#draw")
        tab.wait_for_function(f"document.querySelector('#note-1').innerText.includes('seed {seed}')")
    tab.wait_for_function("document.querySelectorAll('#history img').length >= 4")
    tab.wait_for_timeout(1000)  # pictures fade in
    tab.screenshot(path=os.environ.get("BKSDM_SCREENSHOT", tmp_path / "demo.png"), full_page=True)
    context.close()
    page.close()


@needs_browser
def test_a_bad_picture_is_said_to_be_one(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tab.click("text=Start from a picture")
    with tab.expect_response("**/upload?*"):
        tab.locator("#image input[type=file]").set_input_files(tmp_path / "broken.png")
    tab.wait_for_selector("#image button[aria-label=Clear]")  # shown once the page holds the file
    tab.fill("#prompt textarea", "red apple")
    tab.click("#draw")
    tab.wait_for_selector("text=is not a readable picture")


@needs_browser
def test_two_people_both_get_their_pictures_and_nothing_is_wider_than_a_phone(browser: Any, address: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}
    tabs = [new_context(browser, **held).new_page() for held in ({}, phone)]
    for number, tab in enumerate(tabs):
        tab.goto(address)
        tab.wait_for_selector("#draw")
        tab.fill("#prompt textarea", "red apple")
        tab.fill("#seed input", str(number))
    for tab in tabs:
        tab.click("#draw")
    for number, tab in enumerate(tabs):
        tab.wait_for_selector("#note-1 >> text=the first")
        assert f"seed {number}" in tab.inner_text("#note-1")
    assert tabs[1].evaluate("document.documentElement.scrollWidth") <= 390
    for tab in tabs:
        tab.context.close()


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (2.44, "2.4 times as fast as the first"),
        (0.61, "1.6 times slower than the first"),
        (1.02, "as fast as the first"),
        (0.97, "as fast as the first"),
    ],
)
def test_a_pace_is_said_as_people_say_it(ratio: float, words: str) -> None:
    assert pace(ratio) == words


def sliders(page: Any) -> list[tuple[str, float]]:
    """Names and values of those for steps and guidance."""
    found = [(block.label, block.value) for block in page.blocks.values() if isinstance(block, gradio.Slider)]
    return [slider for slider in found if slider[0].startswith(("Steps", "Guidance"))]


def test_models_that_draw_best_alike_share_sliders(exported_model: Path, exported_student: Path) -> None:
    page = serve(DemoOptions(str(exported_model), str(exported_student), port=free_port()), wait=False)
    page.close()
    assert sliders(page) == [("Steps", 25), ("Guidance", 7.5)]


def test_others_have_their_own_and_draw_by_them(exported_model: Path, folder: Path) -> None:
    few, port = folder.rename(folder.with_name("few")), free_port()
    (few / SAMPLING_FILE).write_text(Defaults(4, 1.0).text())
    page = serve(DemoOptions(str(exported_model), str(few), port=port), wait=False)
    found = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False).predict(
        "red car", 7, None, 0.8, 3, 2.0, 2, 1.0, api_name="/run"
    )
    page.close()
    names = [f"{name} of {model}" for model in (exported_model.name, "few") for name in ("Steps", "Guidance")]
    assert sliders(page) == list(zip(names, [25, 7.5, 4, 1.0], strict=True))
    made = [told(Path(file)) for file in found[4]]
    assert [(one["steps"], one["guidance"], one["seed"]) for one in made] == [(3, 2.0, 7), (2, 1.0, 7)]
    assert re.search(r"\((as fast as|\d+\.\d times (as fast as|slower than)) the first\)", found[3])


def test_models_of_two_families_draw_side_by_side(exported_model: Path, shallow_xl_folder: Path) -> None:
    port = free_port()
    page = serve(DemoOptions(str(exported_model), str(shallow_xl_folder), port=port), wait=False)
    client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
    found = client.predict("red car", 7, None, 0.8, 2, 3.0, api_name="/run")
    page.close()
    costs = [unet_cost(load_denoiser_config(model), tokens=MAX_TOKENS) for model in (exported_model, shallow_xl_folder)]
    for note, cost in zip(found[2:4], costs, strict=True):
        assert f"U-Net: {cost.params / 1e6:.1f} M parameters, {cost.gmacs_all:.2f} GMACs a step" in note
    assert [told(Path(file))["width"] for file in found[4]] == [PICTURE, PICTURE]


def test_what_a_model_says_may_be_beyond_the_usual_sliders(exported_model: Path, folder: Path) -> None:
    (folder / SAMPLING_FILE).write_text(Defaults(150, 0.0).text())
    page = serve(DemoOptions(str(folder), port=free_port()), wait=False)
    page.close()
    assert sliders(page) == [("Steps", 150), ("Guidance", 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((" ", 1, 5, 2, None, 0.8), "the prompt is empty"),
        (("red", -1, 5, 2, None, 0.8), "the seed is -1"),
    ],
)
def test_wishes_that_cannot_be_are_refused(words: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wish_of(*words)


def test_a_picture_and_its_strength_go_together(pictures: Path) -> None:
    with pytest.raises(InputError, match=r"strength 0\.1 of 5 steps leaves no step to do"):
        wish_of("red", 1, 5, 2, str(pictures / "0.png"), 0.1)
    wish = wish_of(" red ", None, 5, 2, str(pictures / "0.png"), 0.5)
    assert isinstance(wish, Wish)
    assert wish.prompt == "red"
    assert 0 <= wish.seed < 2**32


def test_a_port_in_use_is_named(run: Run, exported_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = run("demo", exported_model, "--port", port)
    assert outcome.code == 2
    assert f"cannot listen at 127.0.0.1:{port}" in outcome.said[0]
    assert "give another --port" in outcome.said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--steps", 0), "steps is 0"), (("--waiting", 0), "waiting is 0"), (("--port", 0), "port is 0")],
)
def test_options_that_cannot_be_are_refused(run: Run, exported_model: Path, words: tuple, message: str) -> None:
    outcome = run("demo", exported_model, *words)
    assert (outcome.code, len(outcome.said)) == (2, 1)
    assert message in outcome.said[0]
