"""What a student costs in the browser: download, seconds a picture beside native onnxruntime, and memory of the tab.

    bksdm export STUDENT --to web --out runs/web
    python benchmarks/web.py runs/web                                # 4 steps, both ways in turns
    python benchmarks/web.py --full runs/web_full                    # writes BK-SDM-Tiny, random, in 8 and 4 bits
    python benchmarks/web.py runs/web_full/int8 runs/web_full/int4 --threads 1 --steps 1 --rounds 1

Headless Chromium draws by WebAssembly, and native onnxruntime from the same files with as many threads. Seconds of the
processors tell more than the clock where a machine does other things besides; with several threads both wait by
spinning, so that one thread is what to compare. Memory is the most that the tab's process held. A step is the median
over those of a picture, of which the first has the text encoder in it.
"""

import argparse
import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

import psutil
from diffusers import AutoencoderTiny
from full_size import stable_diffusion
from playwright.sync_api import Page, sync_playwright

from bksdm.common.runs import provenance
from bksdm.export import to_onnx, to_web
from bksdm.export.formats import Source
from bksdm.families.recipe import load_recipe
from bksdm.generate.web import Files, server
from bksdm.models.decoder import with_autoencoder
from bksdm.pruning.inherit import prune_unet, with_denoiser
from bksdm.runtime.folder import open_folder

PROMPT = "red apple, noto style"
MIB = 2**20
BITS = {"int8": 8, "int4": 4}
SIDE = 512
OPEN = """async () => {
    const { open } = await import("/bksdm.js");
    const began = performance.now();
    globalThis.model = await open({ base: "/", gpu: false });
    return (performance.now() - began) / 1000;
}"""
DRAW = """async (wish) => {
    const times = [performance.now()];
    const { seconds } = await model.draw(wish, { onProgress: ({ step }) => step && times.push(performance.now()) });
    return { seconds, steps: times.slice(1).map((time, i) => (time - times[i]) / 1000) };
}"""


def write_full(out: Path) -> None:
    """BK-SDM-Tiny at full size, random, with a decoder of TAESD's size, as the export writes it; it is not compared."""
    teacher = stable_diffusion()
    tiny = with_denoiser(teacher, prune_unet(teacher.unet, load_recipe("tiny"))[0])
    source = Source("tiny", with_autoencoder(tiny, AutoencoderTiny().eval()), None, "fp32", SIDE, SIDE)
    print(f"memory, as the export says it: {to_web.memory(source) / MIB:.0f} MiB", flush=True)
    (out / "onnx").mkdir(parents=True)
    to_onnx.write_networks(source, out / "onnx")
    for precision, bits in BITS.items():
        folder = Path(shutil.copytree(out / "onnx", out / precision))
        for file in folder.rglob(to_onnx.MODEL_FILE):
            to_onnx.to_integers(file, bits)
        made = dataclasses.replace(source, precision=precision)
        to_web.add_page(made, folder)
        to_web.add_manifest(made, folder)
        print(precision, "written", flush=True)


@dataclass(frozen=True)
class Turn:
    """A picture: seconds by the clock, of the processors, and of a step."""

    seconds: float
    worked: float
    step: float = 0.0


def measure(folder: Path, threads: int, steps: int, guidance: float, rounds: int) -> str:
    """A row of the table."""
    manifest = json.loads((folder / "manifest.json").read_text())
    networks = [network for name, network in manifest["networks"].items() if name != "vae_encoder"]
    files = [entry["bytes"] for network in networks for entry in (network["graph"], *network["weights"])]
    wish = {"prompt": PROMPT, "seed": 0, "steps": steps, "guidance": guidance, "preview": False}
    native = native_drawer(folder, threads, steps, guidance)
    with tab(folder, threads) as (page, watch):
        opening = page.evaluate(OPEN)
        if rounds > 1:  # warms up
            page.evaluate(DRAW, wish)
            native()
        turns = [(drawn(page, watch, wish), native()) for _ in range(rounds)]
    numbers = [
        sum(files) / MIB,
        manifest["runtime"]["wasm"] / MIB,
        max(files) / MIB,
        opening,
        *(median(getattr(turn, name) for turn, _ in turns) for name in ("seconds", "step", "worked")),
        median(alone.seconds for _, alone in turns),
        median(alone.worked for _, alone in turns),
        median(turn.seconds / alone.seconds for turn, alone in turns),
        median(turn.worked / alone.worked for turn, alone in turns),
    ]
    head = f"{manifest['precision']}, {manifest['shape']['width']} px, {threads} threads"
    return f"| {head} | {' | '.join(f'{number:.2f}' for number in numbers)} | {watch.most / MIB:.0f} |"


def drawn(page: Page, watch: "Watch", wish: dict[str, object]) -> Turn:
    """A picture in the tab."""
    before = watch.worked()
    found = page.evaluate(DRAW, wish)
    return Turn(found["seconds"], watch.worked() - before, median(found["steps"]))


def native_drawer(folder: Path, threads: int, steps: int, guidance: float) -> Callable[[], Turn]:
    """Draws the same by onnxruntime."""
    pipeline = open_folder(folder, threads=threads)

    def draw() -> Turn:
        began, before = time.perf_counter(), time.process_time()
        list(pipeline.sample([PROMPT], [0], steps=steps, guidance=guidance))
        return Turn(time.perf_counter() - began, time.process_time() - before)

    return draw


class Bare(Files):
    """Without the headers, so that the page has one thread."""

    headers_sent: ClassVar[dict[str, str]] = {}


@contextmanager
def tab(folder: Path, threads: int) -> Iterator[tuple[Page, "Watch"]]:
    """A page of the folder's address in Chromium, and what watches its process."""
    kind = Bare if threads == 1 else Files
    with server(str(folder), "127.0.0.1", 0, kind) as opened, sync_playwright() as started:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(0)
        page.goto(f"http://127.0.0.1:{opened.server_port}/manifest.json")
        watch = Watch()
        yield page, watch
        watch.end()
        browser.close()
        opened.shutdown()


class Watch:
    """The memory and the work of the tabs' processes.

    Attributes:
        most: Bytes that one of them held at most.
    """

    def __init__(self) -> None:
        self.most, self._over = 0, threading.Event()
        self._tabs = [process for process in psutil.Process().children(recursive=True) if _is_tab(process)]
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def worked(self) -> float:
        """Seconds of the processors so far."""
        return sum(sum(tab.cpu_times()[:2]) for tab in self._tabs)

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, *(tab.memory_info().rss for tab in self._tabs))


def _is_tab(process: psutil.Process) -> bool:
    try:
        return "--type=renderer" in process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--full", type=Path, help="where BK-SDM-Tiny is written")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.full:
        write_full(given.full)
    if not given.folders:
        return
    columns = [
        "weights, MiB",
        "runtime",
        "largest file",
        "opened, s",
        "a picture, s",
        "a step",
        "of processors",
        "native, s",
    ]
    columns += ["of processors", "ratio", "of processors", "tab, MiB"]
    print(f"| export | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for folder in given.folders:
        print(measure(folder, given.threads, given.steps, given.guidance, given.rounds), flush=True)
    about = provenance()
    print(f"\n{about['processor']}, {os.cpu_count()} cores, {about['started'][:10]}; onnxruntime-web 1.30.0.")


if __name__ == "__main__":
    main()
