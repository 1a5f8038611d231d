/** The networks of the folder, computed by onnxruntime-web; each is fetched and loaded when it is first asked for. */

import { files } from "./files.js";

/**
 * @typedef {object} Tensor
 * @property {Float32Array} data
 * @property {number[]} dims
 */

/**
 * @typedef {object} Session
 * @property {(inputs: Record<string, Tensor>, outputs: string[]) => Promise<Record<string, Tensor>>} run
 */

/**
 * @typedef {object} Ort What is used here of onnxruntime-web.
 * @property {{wasm: {wasmPaths: string, numThreads: number}, logLevel: string}} env
 * @property {{create: (graph: Uint8Array, options: object) => Promise<Session>}} InferenceSession
 * @property {new (type: string, data: Float32Array | BigInt64Array, dims: number[]) => Tensor} Tensor
 */

/**
 * @typedef {object} NetworkFiles A network in the manifest.
 * @property {import("./files.js").Entry} graph
 * @property {import("./files.js").Entry[]} weights
 */

const MOST_THREADS = 8;

/** Whether the browser has a GPU for pages. */
export async function hasGpu() {
  const { gpu } = /** @type {{gpu?: {requestAdapter: () => Promise<object | null>}}} */ (navigator);
  return Boolean(await gpu?.requestAdapter().catch(() => null));
}

/**
 * onnxruntime-web, with the number of threads that the page may have.
 *
 * @param {URL} folder Of its files.
 * @param {boolean} gpu Whether its build with WebGPU is wanted, which is larger.
 * @returns {Promise<Ort>}
 */
export async function runtime(folder, gpu) {
  const ort = await import(new URL(`ort.${gpu ? "webgpu" : "wasm"}.min.mjs`, folder).href);
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  ort.env.logLevel = "error";
  return ort;
}

export class Networks {
  /**
   * @param {URL} base The folder.
   * @param {Record<string, NetworkFiles>} manifest By name.
   * @param {Ort} ort
   * @param {"webgpu" | "wasm"} provider
   * @param {(name: string, done: number, all: number) => void} progress Of what is fetched, in bytes.
   */
  constructor(base, manifest, ort, provider, progress) {
    this.base = base;
    this.manifest = manifest;
    this.ort = ort;
    this.provider = provider;
    this.progress = progress;
    /** @type {Record<string, Session>} */
    this.held = {};
  }

  /**
   * Hidden states (B, L, C) of tokens (B, L).
   *
   * @param {number[][]} ids
   */
  encode(ids) {
    const flat = BigInt64Array.from(ids.flat(), BigInt);
    return this.run("text_encoder", { input_ids: new this.ort.Tensor("int64", flat, [ids.length, ids[0].length]) }, "last_hidden_state");
  }

  /**
   * What the U-Net predicts of noisy latents (B, C, h, w) at a timestep.
   *
   * @param {Float32Array} latents
   * @param {number[]} shape
   * @param {number} timestep
   * @param {Tensor} context
   */
  async predict(latents, shape, timestep, context) {
    const sample = new this.ort.Tensor("float32", latents, shape);
    const at = new this.ort.Tensor("float32", Float32Array.of(timestep), [1]);
    return (await this.run("unet", { sample, timestep: at, encoder_hidden_states: context }, "out_sample")).data;
  }

  /**
   * Pixels (1, 3, H, W), about -1 to 1, of latents (1, C, h, w) of the VAE.
   *
   * @param {Float32Array} latents
   * @param {number[]} shape
   */
  async decode(latents, shape) {
    const given = { latent_sample: new this.ort.Tensor("float32", latents, shape) };
    return (await this.run("vae_decoder", given, "sample")).data;
  }

  /**
   * Means and log-variances of latents (1, 2 C, h, w), of pixels (1, 3, H, W).
   *
   * @param {Float32Array} pixels
   * @param {number[]} shape
   */
  async moments(pixels, shape) {
    const given = { sample: new this.ort.Tensor("float32", pixels, shape) };
    return (await this.run("vae_encoder", given, "latent_parameters")).data;
  }

  /**
   * @param {string} name
   * @param {Record<string, Tensor>} inputs
   * @param {string} output
   */
  async run(name, inputs, output) {
    const session = await this.load(name);
    return (await session.run(inputs, [output]))[output];
  }

  /**
   * Fetch and load a network, once.
   *
   * @param {string} name
   */
  async load(name) {
    if (!this.held[name]) {
      const { graph, weights } = this.manifest[name];
      const [first, ...rest] = await files(this.base, [graph, ...weights], (done, all) => this.progress(name, done, all));
      const externalData = rest.map((data, i) => ({ path: weights[i].path.split("/").pop(), data }));
      this.held[name] = await this.ort.InferenceSession.create(first, {
        executionProviders: [this.provider],
        externalData,
        logSeverityLevel: 3, // errors alone
        // Weights of convolutions are made floats once, when the network is loaded, and not in every step.
        extra: { session: { disable_quant_qdq: "1" } },
      });
    }
    return this.held[name];
  }
}
