/** The worker in which a model draws, so that the page never freezes; `../bksdm.js` speaks with it. */

import { answer, files } from "./files.js";
import { hasGpu, Networks, runtime } from "./networks.js";
import { Pipeline } from "./pipeline.js";
import { encode, texts } from "./png.js";
import { Tokenizer } from "./tokens.js";

/** @typedef {import("./schedule.js").Options} Options */

/**
 * @typedef {object} Manifest What the export says of the folder.
 * @property {string} model
 * @property {string} precision
 * @property {{steps: number, guidance: number}} defaults
 * @property {{options: Options, sampler: string}[]} schedulers The model's own first.
 * @property {import("./pipeline.js").Shape} shape
 * @property {import("./tokens.js").Captions} captions
 * @property {{tokenizer: import("./files.js").Entry, config: import("./files.js").Entry}} tokenizer
 * @property {Record<string, import("./networks.js").NetworkFiles>} networks
 * @property {{wasm: number, webgpu: number}} runtime Bytes of each build of onnxruntime-web.
 * @property {number} memory Bytes that drawing takes, about.
 */

/**
 * @typedef {object} Wish What a page asks for; all but the prompt has a default.
 * @property {string} prompt
 * @property {string} [negative]
 * @property {number} [seed]
 * @property {number} [steps]
 * @property {number} [guidance]
 * @property {string} [scheduler]
 * @property {number} [height]
 * @property {number} [width]
 * @property {import("./pipeline.js").Pixels} [image]
 * @property {number} [strength]
 * @property {boolean} [preview]
 */

/** @typedef {{id: number, open?: {base: string, gpu: boolean}, draw?: Wish, cancel?: boolean}} Message */

class Cancelled extends Error {}

const NEEDED = ["text_encoder", "unet", "vae_decoder"];

/** @type {{manifest: Manifest, pipeline: Pipeline} | null} */
let opened = null;
let cancelled = false;

/** @param {MessageEvent<Message>} event */
self.onmessage = async ({ data: { id, open, draw, cancel } }) => {
  if (cancel) {
    cancelled = true;
    return;
  }
  try {
    const result = open ? await begin(id, new URL(open.base), open.gpu) : await make(id, /** @type {Wish} */ (draw));
    self.postMessage({ id, result });
  } catch (error) {
    self.postMessage({ id, cancelled: error instanceof Cancelled, error: explained(error) });
  }
};

/**
 * Read the manifest, and fetch and load what every picture needs.
 *
 * @param {number} id Of the message.
 * @param {URL} base
 * @param {boolean} gpu
 */
async function begin(id, base, gpu) {
  if (!self.isSecureContext) throw new Error("this page came by http, which gives pages no digests and no threads; serve it by https");
  /** @type {Manifest} */
  const manifest = await (await answer(new URL("manifest.json", base), "manifest.json")).json();
  const provider = gpu && (await hasGpu()) ? "webgpu" : "wasm";
  const ort = await runtime(new URL("vendor/onnxruntime-web/", base), provider === "webgpu");
  const sizes = Object.fromEntries(NEEDED.map((name) => [name, size(manifest.networks[name])]));
  const all = Object.values(sizes).reduce((sum, bytes) => sum + bytes);
  /** @type {Record<string, number>} */
  const there = {};
  const networks = new Networks(base, manifest.networks, ort, provider, (name, done, own) => {
    there[name] = done;
    const needed = name in sizes;
    const sum = Object.entries(there).reduce((found, [of, bytes]) => found + (of in sizes ? bytes : 0), 0);
    self.postMessage({ id, fetching: { name, done: needed ? sum : done, all: needed ? all : own } });
  });
  const tokenizer = await readTokenizer(base, manifest);
  for (const name of NEEDED) await networks.load(name);
  opened = { manifest, pipeline: new Pipeline(networks, tokenizer, manifest.shape) };
  return { manifest, provider, threads: ort.env.wasm.numThreads, bytes: all };
}

/**
 * @param {URL} base
 * @param {Manifest} manifest
 */
async function readTokenizer(base, manifest) {
  const { Tokenizer: Library } = await import(new URL("vendor/tokenizers/tokenizers.min.mjs", base).href);
  const entries = [manifest.tokenizer.tokenizer, manifest.tokenizer.config];
  const contents = await files(base, entries, () => {});
  const [tokenizer, config] = contents.map((content) => JSON.parse(new TextDecoder().decode(content)));
  return new Tokenizer(new Library(tokenizer, config), manifest.captions);
}

/**
 * A picture, as pixels and as a file.
 *
 * @param {number} id Of the message.
 * @param {Wish} wish
 */
async function make(id, wish) {
  if (!opened) throw new Error("no model is open; open one first");
  const { manifest, pipeline } = opened;
  const { scheduler, ...request } = completed(wish, manifest);
  cancelled = false;
  const began = performance.now();
  let decoding = 0;
  let last = began;
  const { pixels, lost } = await pipeline.draw({ ...request, scheduler: scheduler.options }, async ({ done, all, preview }) => {
    const now = performance.now();
    // A preview is for waiting less, so that one that takes longer than a step is not made again.
    const shown = request.preview && done < all && decoding <= now - last ? await preview() : null;
    if (shown) decoding = performance.now() - now;
    self.postMessage({ id, step: { done, all, preview: shown } });
    await new Promise((resolve) => setTimeout(resolve)); // so that a message to cancel is heard
    if (cancelled) throw new Cancelled("cancelled");
    last = performance.now();
  });
  const seconds = (performance.now() - began) / 1000;
  const strength = request.image ? request.strength : null;
  const about = { ...request, model: manifest.model, scheduler: scheduler.options._class_name, sampler: scheduler.sampler, strength };
  const { width, height } = pixels;
  return { pixels, lost, seconds, seed: request.seed, png: await encode(pixels, texts(about, width, height)) };
}

/**
 * A wish with the model's own where nothing is asked for; without a seed, one is drawn.
 *
 * @param {Wish} wish
 * @param {Manifest} manifest
 */
function completed(wish, manifest) {
  const scheduler = manifest.schedulers.find(({ options }) => !wish.scheduler || options._class_name === wish.scheduler);
  if (!scheduler) {
    const known = manifest.schedulers.map(({ options }) => options._class_name).join(", ");
    throw new Error(`the scheduler ${wish.scheduler} is not known here; give one of ${known}`);
  }
  const { height, width } = wish.image ?? manifest.shape;
  return {
    prompt: wish.prompt,
    negative: wish.negative ?? "",
    seed: wish.seed ?? crypto.getRandomValues(new Uint32Array(1))[0],
    steps: wish.steps ?? manifest.defaults.steps,
    guidance: wish.guidance ?? manifest.defaults.guidance,
    scheduler,
    height: wish.height ?? height,
    width: wish.width ?? width,
    image: wish.image ?? null,
    strength: wish.strength ?? 0.8,
    preview: wish.preview ?? true,
  };
}

/** @param {import("./networks.js").NetworkFiles} network */
function size({ graph, weights }) {
  return [graph, ...weights].reduce((sum, { bytes }) => sum + bytes, 0);
}

/**
 * What went wrong, in a line.
 *
 * @param {unknown} error
 */
function explained(error) {
  const text = error instanceof Error ? error.message : String(error);
  if (!/memory|bad_alloc|allocation/i.test(text) && !(error instanceof RangeError)) return text;
  return `there is not enough memory for this model (${text}); close other tabs, or take a smaller model`;
}
