/**
 * A model that draws in the browser:
 *
 *     import { open } from "./bksdm.js";
 *     const model = await open();
 *     const picture = await model.draw({ prompt: "red apple, noto style", seed: 3 });
 *     document.body.append(Object.assign(new Image(), { src: URL.createObjectURL(picture.png) }));
 *     model.close();
 */

/** @typedef {import("./bksdm/worker.js").Wish} Wish */
/** @typedef {import("./bksdm/worker.js").Manifest} Manifest */
/** @typedef {import("./bksdm/pipeline.js").Pixels} Pixels */

/**
 * @typedef {object} Opened What is known of a model.
 * @property {Manifest} manifest
 * @property {"webgpu" | "wasm"} provider What computes.
 * @property {number} threads
 * @property {number} bytes Of its networks, as they were fetched.
 */

/**
 * @typedef {object} Picture
 * @property {Pixels} pixels
 * @property {Blob} png The file, with its parameters inside.
 * @property {number} seed
 * @property {number} seconds
 * @property {string} lost The end of the prompt, which the model does not see.
 */

/**
 * @typedef {object} Told What is told meanwhile.
 * @property {{name: string, done: number, all: number}} [fetching] In bytes.
 * @property {{done: number, all: number, preview: Pixels | null}} [step]
 */

/** @typedef {Told & {id: number, result?: any, error?: string, cancelled?: boolean}} Answer */

/**
 * Open the model of a folder that `bksdm export --to web` wrote.
 *
 * @param {object} [how]
 * @param {string | URL} [how.base] The folder; the one of this file by default.
 * @param {boolean} [how.gpu] Whether WebGPU is taken where the browser has it; so by default.
 * @param {(told: Told) => void} [how.onProgress] Told what is fetched.
 * @param {AbortSignal} [how.signal] Cancels at once.
 * @throws {Error} Its message says what to mend; its name is AbortError where it was cancelled.
 */
export async function open({ base = new URL(".", import.meta.url), gpu = true, onProgress = () => {}, signal } = {}) {
  signal?.throwIfAborted();
  const talk = new Talk();
  const cancel = () => talk.end();
  signal?.addEventListener("abort", cancel);
  try {
    const about = await talk.ask({ open: { base: new URL(base, document.baseURI).href, gpu } }, onProgress);
    return new Model(talk, about);
  } catch (error) {
    talk.end();
    throw error;
  } finally {
    signal?.removeEventListener("abort", cancel);
  }
}

/** A model that is open. */
class Model {
  /**
   * @param {Talk} talk
   * @param {Opened} about
   */
  constructor(talk, about) {
    this.talk = talk;
    this.about = about;
  }

  /**
   * Draw a picture; one is drawn at a time.
   *
   * @param {Wish} wish
   * @param {object} [how]
   * @param {(told: Told) => void} [how.onProgress] Told of every step, and of what is fetched.
   * @param {AbortSignal} [how.signal] Cancels between two steps.
   * @returns {Promise<Picture>}
   * @throws {Error} Its message says what to mend; its name is AbortError where it was cancelled.
   */
  async draw(wish, { onProgress = () => {}, signal } = {}) {
    signal?.throwIfAborted();
    const cancel = () => this.talk.cancel();
    signal?.addEventListener("abort", cancel);
    try {
      return await this.talk.ask({ draw: wish }, onProgress);
    } finally {
      signal?.removeEventListener("abort", cancel);
    }
  }

  /** Give its memory back; what it draws is cancelled. */
  close() {
    this.talk.end();
  }
}

/** Questions to the worker, and its answers. */
class Talk {
  constructor() {
    this.worker = started(new URL("./bksdm/worker.js", import.meta.url));
    this.count = 0;
    this.ending = new AbortController();
  }

  /**
   * @param {object} question
   * @param {(told: Told) => void} onProgress
   * @returns {Promise<any>}
   */
  ask(question, onProgress) {
    const id = this.count++;
    if (this.ending.signal.aborted) return Promise.reject(new Error("the model is closed; open it again"));
    const answered = new AbortController();
    const until = { signal: answered.signal };
    const answer = new Promise((resolve, reject) => {
      const heard = (/** @type {MessageEvent<Answer>} */ { data }) => {
        if (data.id !== id) return;
        if (data.fetching || data.step) return onProgress(data);
        if (data.error === undefined) resolve(data.result);
        else reject(data.cancelled ? new DOMException(data.error, "AbortError") : new Error(data.error));
      };
      const broken = (/** @type {ErrorEvent} */ { message }) =>
        reject(new Error(message || "the worker's script cannot be fetched; upload the whole folder again"));
      const closed = () => reject(new DOMException("the model was closed", "AbortError"));
      this.worker.addEventListener("message", heard, until);
      this.worker.addEventListener("error", broken, until);
      this.ending.signal.addEventListener("abort", closed, until);
      this.worker.postMessage({ id, ...question });
    });
    return answer.finally(() => answered.abort());
  }

  cancel() {
    this.worker.postMessage({ id: -1, cancel: true });
  }

  end() {
    this.worker.terminate();
    this.ending.abort();
  }
}

/**
 * A worker of a script, which may lie on another server.
 *
 * @param {URL} url
 */
function started(url) {
  if (url.origin === location.origin) return new Worker(url, { type: "module" });
  const script = new Blob([`import ${JSON.stringify(url.href)};`], { type: "text/javascript" });
  return new Worker(URL.createObjectURL(script), { type: "module" });
}
