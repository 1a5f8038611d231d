/**
 * Text-to-image and image-to-image, as `bksdm/runtime/pipeline.py` has them for one picture.
 *
 * Noise, guidance and the order of random numbers are those of diffusers' pipelines with a generator on the CPU.
 */

import { Generator } from "./noise.js";
import { trajectory, weighted } from "./samplers.js";

/** @typedef {import("./networks.js").Networks} Networks */
/** @typedef {import("./networks.js").Tensor} Tensor */
/** @typedef {import("./tokens.js").Tokenizer} Tokenizer */
/** @typedef {import("./schedule.js").Options} Options */

/**
 * @typedef {object} Shape How the model's pictures and latents are.
 * @property {number} channels Of the latents.
 * @property {number} factor Pixels along a side of one latent.
 * @property {number} multiple Of which heights and widths in pixels are multiples.
 * @property {number} height In pixels, where none is asked for.
 * @property {number} width In pixels, where none is asked for.
 * @property {number} scaling By which the VAE's latents are multiplied.
 * @property {number} shift What is taken off before.
 */

/**
 * @typedef {object} Pixels
 * @property {Uint8ClampedArray<ArrayBuffer>} data RGBA.
 * @property {number} width
 * @property {number} height
 */

/**
 * @typedef {object} Request What is to be drawn.
 * @property {string} prompt
 * @property {string} negative What to keep away from, under guidance.
 * @property {number} seed
 * @property {number} steps
 * @property {number} guidance 1 or less for none, which halves the work.
 * @property {Options} scheduler
 * @property {number} height
 * @property {number} width
 * @property {Pixels | null} image To start from, of this height and width.
 * @property {number} strength Share of the denoising that is done anew with `image`.
 */

/**
 * @typedef {object} Step What is told after a step.
 * @property {number} done
 * @property {number} all
 * @property {() => Promise<Pixels>} preview Decodes the picture that the step saw.
 */

const LOG_VARIANCE = [-30, 20];
const SEEDS = 2 ** 32;

export class Pipeline {
  /**
   * @param {Networks} networks
   * @param {Tokenizer} tokenizer
   * @param {Shape} shape
   */
  constructor(networks, tokenizer, shape) {
    this.networks = networks;
    this.tokenizer = tokenizer;
    this.shape = shape;
  }

  /**
   * The picture, and what of the prompt the model does not see.
   *
   * @param {Request} request
   * @param {(step: Step) => Promise<void>} onStep Ends the drawing by throwing.
   * @returns {Promise<{pixels: Pixels, lost: string}>}
   */
  async draw(request, onStep) {
    this.check(request);
    const sides = [request.height / this.shape.factor, request.width / this.shape.factor];
    const latents = [1, this.shape.channels, ...sides];
    const size = latents.reduce((product, side) => product * side);
    const generator = new Generator(request.seed);
    const draw = () => generator.normal(size);
    const guided = request.guidance > 1;
    const prompts = guided ? [request.negative, request.prompt] : [request.prompt];
    const tokens = prompts.map((prompt) => this.tokenizer.encode(prompt));
    const way = trajectory(request.scheduler, request.steps, request.image ? request.strength : 1);
    const context = await this.networks.encode(tokens.map(({ ids }) => ids));
    /** @type {Float32Array} */
    let sample = request.image ? way.noisy(await this.latents(request.image, draw), draw()) : draw();
    for (const [number, timestep] of way.timesteps.entries()) {
      const output = guided
        ? await this.guided(sample, latents, timestep, context, request.guidance)
        : await this.networks.predict(sample, latents, timestep, context);
      sample = way.step(output, sample, draw);
      await onStep({ done: number + 1, all: way.timesteps.length, preview: () => this.decoded(way.seen, latents) });
    }
    return { pixels: await this.decoded(sample, latents), lost: tokens[tokens.length - 1].lost };
  }

  /**
   * e_0 + g (e_c - e_0), by one call for both.
   *
   * @param {Float32Array} sample
   * @param {number[]} shape
   * @param {number} timestep
   * @param {Tensor} context
   * @param {number} scale
   */
  async guided(sample, shape, timestep, context, scale) {
    const twice = new Float32Array(2 * sample.length);
    twice.set(sample);
    twice.set(sample, sample.length);
    const both = await this.networks.predict(twice, [2, ...shape.slice(1)], timestep, context);
    return weighted([1 - scale, scale], [both.subarray(0, sample.length), both.subarray(sample.length)]);
  }

  /**
   * The picture of latents as the U-Net has them.
   *
   * @param {Float32Array} sample
   * @param {number[]} shape
   */
  async decoded(sample, shape) {
    const { scaling, shift, factor } = this.shape;
    const pixels = await this.networks.decode(sample.map((value) => value / scaling + shift), shape);
    if (!pixels.every(Number.isFinite)) {
      throw new Error("the model gives numbers that are not finite, as half precision does where it overflows; export it with --precision int8");
    }
    return toBytes(pixels, shape[2] * factor, shape[3] * factor);
  }

  /**
   * Draws from the VAE's posterior for a picture, scaled for the U-Net.
   *
   * @param {Pixels} image
   * @param {() => Float32Array} draw
   */
  async latents(image, draw) {
    const moments = await this.networks.moments(fromBytes(image), [1, 3, image.height, image.width]);
    const half = moments.length / 2;
    const noise = draw();
    const [least, most] = LOG_VARIANCE;
    return Float32Array.from(noise, (value, i) => {
      const spread = Math.exp(0.5 * Math.max(least, Math.min(most, moments[half + i])));
      return (moments[i] + spread * value - this.shape.shift) * this.shape.scaling;
    });
  }

  /** @param {Request} request */
  check({ prompt, negative, seed, guidance, height, width, image }) {
    for (const [name, text] of Object.entries({ prompt, "negative prompt": negative })) {
      if (typeof text !== "string") throw new Error(`the ${name} is ${text}; give a text`);
    }
    if (!prompt.trim()) throw new Error("the prompt is empty; say what the picture shows");
    if (!(Number.isInteger(seed) && seed >= 0 && seed < SEEDS)) {
      throw new Error(`the seed is ${seed}; give a whole number from 0, and less than 2^32`);
    }
    if (!(guidance >= 0 && guidance < Infinity)) throw new Error(`guidance is ${guidance}; give a number from 0`);
    for (const [name, value] of Object.entries({ height, width })) {
      if (!(value >= 1 && value % this.shape.multiple === 0)) {
        throw new Error(`${name} is ${value}; give a multiple of ${this.shape.multiple}`);
      }
    }
    if (image && !(image.width === width && image.height === height && image.data?.length === 4 * width * height)) {
      const given = `${image.data?.length} bytes for ${image.width} x ${image.height} pixels`;
      throw new Error(`the image has ${given}; give it as ImageData has it, in RGBA, ${width} x ${height}`);
    }
  }
}

/**
 * RGBA of pixels (1, 3, H, W), about -1 to 1.
 *
 * @param {Float32Array} pixels
 * @param {number} height
 * @param {number} width
 * @returns {Pixels}
 */
export function toBytes(pixels, height, width) {
  const area = height * width;
  const data = new Uint8ClampedArray(4 * area).fill(255); // it rounds halves to even and cuts off, as numpy does here
  for (let i = 0; i < area; i++) {
    for (let channel = 0; channel < 3; channel++) data[4 * i + channel] = (pixels[channel * area + i] * 0.5 + 0.5) * 255;
  }
  return { data, width, height };
}

/**
 * Pixels (1, 3, H, W), -1 to 1, of RGBA.
 *
 * @param {Pixels} image
 */
export function fromBytes({ data, width, height }) {
  const area = height * width;
  const pixels = new Float32Array(3 * area);
  for (let i = 0; i < area; i++) {
    for (let channel = 0; channel < 3; channel++) pixels[channel * area + i] = (data[4 * i + channel] / 255) * 2 - 1;
  }
  return pixels;
}
