/** The page: what is typed there is drawn, shown while it is drawn, and kept below with its file. */

import { open } from "./bksdm.js";
import { hasGpu } from "./bksdm/networks.js";

/** @typedef {import("./bksdm.js").Picture} Picture */
/** @typedef {import("./bksdm.js").Told} Told */
/** @typedef {import("./bksdm.js").Wish} Wish */
/** @typedef {import("./bksdm/worker.js").Manifest} Manifest */
/** @typedef {import("./bksdm/pipeline.js").Pixels} Pixels */
/** @typedef {Awaited<ReturnType<typeof open>>} Model */

const MIB = 2 ** 20;
const HISTORY = 24;
const HEADERS =
  "This server does not send the headers that pages need for threads (Cross-Origin-Opener-Policy: same-origin, " +
  "Cross-Origin-Embedder-Policy: require-corp), so one thread draws. Load the page once more: it then adds them itself.";

const form = element("form", HTMLFormElement);
const [prompt, negative, seed, steps, guidance, image, strength] = [
  "prompt", "negative", "seed", "steps", "guidance", "image", "strength",
].map((id) => element(id, HTMLInputElement));
const scheduler = element("scheduler", HTMLSelectElement);
const button = element("draw", HTMLButtonElement);
const cancel = element("cancel", HTMLButtonElement);
const progress = element("progress", HTMLProgressElement);
const canvas = element("picture", HTMLCanvasElement);

/** @type {Promise<Model> | null} */
let model = null;
let drawing = new AbortController();

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!button.disabled) attempt(draw);
});
cancel.addEventListener("click", () => drawing.abort());
document.addEventListener("keydown", ({ key }) => key === "Escape" && drawing.abort());
const manifest = attempt(begin);

/** Show what the folder holds, and have the page work without a network from now on. */
async function begin() {
  const registered = navigator.serviceWorker?.register("service.js").catch(() => null);
  const response = await fetch("manifest.json").catch(() => null);
  if (!response?.ok) throw new Error("manifest.json is missing on the server; upload the whole folder again");
  /** @type {Manifest} */
  const read = await response.json();
  element("model", HTMLElement).textContent = document.title = read.model;
  steps.value = String(read.defaults.steps);
  guidance.value = String(read.defaults.guidance);
  scheduler.append(...read.schedulers.map(({ options, sampler }) => new Option(sampler, options._class_name)));
  [canvas.width, canvas.height] = [read.shape.width, read.shape.height];
  const { text_encoder, unet, vae_decoder } = read.networks;
  const bytes = [text_encoder, unet, vae_decoder].flatMap(({ graph, weights }) => [graph, ...weights]);
  const sum = bytes.reduce((found, entry) => found + entry.bytes, 0);
  const runtime = mib((await hasGpu()) ? read.runtime.webgpu : read.runtime.wasm);
  say("about", `${mib(sum)} of ${read.precision} weights and ${runtime} of onnxruntime are fetched once, and kept. Nothing is sent anywhere.`);
  if (!globalThis.crossOriginIsolated && globalThis.isSecureContext) note(HEADERS);
  const { deviceMemory } = /** @type {{deviceMemory?: number}} */ (navigator);
  if (deviceMemory && read.memory > (deviceMemory * 2 ** 30) / 2) {
    note(`Drawing takes about ${mib(read.memory)} of memory, and this device has ${deviceMemory} GiB or little more.`);
  }
  await registered;
  return read;
}

/** Draw what the form asks for. */
async function draw() {
  const { shape } = (await manifest) ?? fail("the folder cannot be read; load the page again");
  busy(true);
  drawing = new AbortController();
  try {
    const wish = await wished(shape.width, shape.height);
    model ??= opened(drawing.signal);
    const picture = await (await model).draw(wish, { onProgress: show, signal: drawing.signal });
    paint(picture.pixels);
    keep(wish, picture);
    const lost = picture.lost && ` The model reads no more than the beginning of the prompt; cut off: ${picture.lost}`;
    say("doing", `${picture.seconds.toFixed(2)} s, seed ${picture.seed}.${lost}`);
  } catch (error) {
    say("doing", "");
    throw error;
  } finally {
    busy(false);
  }
}

/**
 * @param {AbortSignal} signal
 * @returns {Promise<Model>}
 */
async function opened(signal) {
  try {
    if (await navigator.serviceWorker?.getRegistration()) await navigator.serviceWorker.ready;
    const found = await open({ onProgress: show, signal });
    const { provider, threads } = found.about;
    const gpu = provider === "webgpu";
    note(gpu ? "WebGPU draws." : `There is no WebGPU here, so the processor draws, with ${threads} ${threads > 1 ? "threads" : "thread"}.`);
    return found;
  } catch (error) {
    model = null;
    throw error;
  }
}

/**
 * @param {number} width
 * @param {number} height
 * @returns {Promise<Wish>}
 */
async function wished(width, height) {
  if (!prompt.value.trim()) throw new Error("the prompt is empty; say what the picture shows");
  const file = image.files?.[0];
  return {
    prompt: prompt.value.trim(),
    negative: negative.value.trim(),
    ...(seed.value ? { seed: Number(seed.value) } : {}),
    steps: Number(steps.value),
    guidance: Number(guidance.value),
    scheduler: scheduler.value,
    ...(file ? { image: await read(file, width, height), strength: Number(strength.value) } : {}),
  };
}

/**
 * A picture file, cut and resized to the model's size.
 *
 * @param {File} file
 * @param {number} width
 * @param {number} height
 * @returns {Promise<Pixels>}
 */
async function read(file, width, height) {
  const bitmap = await createImageBitmap(file).catch(() => fail(`${file.name} is not a picture that this browser reads; give another`));
  const context = new OffscreenCanvas(width, height).getContext("2d") ?? fail("this browser gives no canvas");
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [wide, high] = [bitmap.width * scale, bitmap.height * scale];
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - wide) / 2, (height - high) / 2, wide, high);
  return { data: context.getImageData(0, 0, width, height).data, width, height };
}

/** @param {Told} told */
function show({ fetching, step }) {
  const { done, all } = fetching ?? step ?? { done: 0, all: 1 };
  [progress.value, progress.max] = [done, all];
  if (fetching) say("doing", done < all ? `Fetching the model: ${mib(done)} of ${mib(all)}.` : "Loading the model.");
  if (step) say("doing", `Step ${done} of ${all}.`);
  if (step?.preview) paint(step.preview);
}

/** @param {Pixels} pixels */
function paint({ data, width, height }) {
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d")?.putImageData(new ImageData(data, width, height), 0, 0);
}

/**
 * A picture among those that were drawn, with its file.
 *
 * @param {Wish} wish
 * @param {Picture} picture
 */
function keep(wish, { png, pixels, seed, seconds }) {
  const url = URL.createObjectURL(png);
  const figure = document.createElement("figure");
  const link = Object.assign(document.createElement("a"), { href: url, download: `${slug(wish.prompt)}-${seed}.png` });
  link.textContent = "Download";
  const { width, height } = pixels;
  const text = `${wish.prompt}, seed ${seed}, ${wish.steps} steps, ${width}x${height}, ${seconds.toFixed(2)} s. `;
  figure.append(Object.assign(new Image(width, height), { src: url, alt: wish.prompt }), text, link);
  const history = element("history", HTMLElement);
  history.prepend(figure);
  for (const old of [...history.children].slice(HISTORY)) {
    URL.revokeObjectURL(/** @type {HTMLAnchorElement} */ (old.querySelector("a")).href);
    old.remove();
  }
}

/** @param {string} text */
function slug(text) {
  return text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "picture";
}

/**
 * Say what goes wrong in a line.
 *
 * @template T
 * @param {() => Promise<T>} work
 */
async function attempt(work) {
  say("error", "");
  try {
    return await work();
  } catch (error) {
    const { name, message } = /** @type {Error} */ (error);
    if (name === "AbortError") say("doing", "Cancelled.");
    else say("error", `${message[0].toUpperCase()}${message.slice(1)}.`);
    return null;
  }
}

/**
 * @param {string} message
 * @returns {never}
 */
function fail(message) {
  throw new Error(message);
}

/** @param {boolean} yes */
function busy(yes) {
  [button.disabled, cancel.disabled] = [yes, !yes];
  [progress.value, progress.max] = [0, 1];
}

/** @param {string} text */
function note(text) {
  const item = document.createElement("li");
  item.textContent = text;
  element("notes", HTMLElement).append(item);
}

/**
 * @param {string} id
 * @param {string} text
 */
function say(id, text) {
  element(id, HTMLElement).textContent = text;
}

/** @param {number} bytes */
function mib(bytes) {
  return `${(bytes / MIB).toFixed(1)} MiB`;
}

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}
