/**
 * The noise schedule of a diffusion model and the timesteps that a sampler visits, as in `bksdm/runtime/noise_schedule.py`.
 *
 * Options are those of scheduler_config.json, all of which the export writes out. Numbers are float32 where they are in
 * diffusers.
 */

/**
 * @typedef {object} Options What a sampler reads of a scheduler's options.
 * @property {string} _class_name
 * @property {number} num_train_timesteps
 * @property {number} beta_start
 * @property {number} beta_end
 * @property {string} beta_schedule
 * @property {number[] | null} trained_betas
 * @property {string} prediction_type
 * @property {number} steps_offset
 * @property {string} [timestep_spacing]
 * @property {boolean} [rescale_betas_zero_snr]
 * @property {boolean} [set_alpha_to_one]
 * @property {boolean} [clip_sample]
 * @property {number} [clip_sample_range]
 * @property {number} [original_inference_steps]
 * @property {number} [timestep_scaling]
 * @property {number} [solver_order]
 * @property {string} [solver_type]
 * @property {string} [algorithm_type]
 * @property {boolean} [lower_order_final]
 * @property {boolean} [euler_at_final]
 * @property {string} [final_sigmas_type]
 * @property {number} [lambda_min_clipped]
 */

const LARGEST_BETA = 0.999;
const { fround, sqrt } = Math;

/**
 * a_t, the share of the signal, for every timestep.
 *
 * @param {Options} options
 */
export function signalShares(options) {
  let betas = Float32Array.from(betasOf(options));
  if (options.rescale_betas_zero_snr) betas = withoutLastSignal(betas);
  return Float64Array.from(products(betas));
}

/**
 * Noise over signal, sqrt((1 - a_t) / a_t).
 *
 * @param {Float64Array} shares
 */
export function noiseRatios(shares) {
  return Float64Array.from(shares, (share) => fround(sqrt(fround(fround(1 - fround(share)) / fround(share)))));
}

/**
 * Timesteps from noise to picture; "linspace" gives fractions.
 *
 * @param {Options} options
 * @param {number} steps
 */
export function spaced(options, steps) {
  const count = options.num_train_timesteps;
  if (options.timestep_spacing === "linspace") return linspace(0, count - 1, steps).reverse();
  if (options.timestep_spacing === "leading") {
    return linspace(steps - 1, 0, steps).map((step) => step * Math.floor(count / steps) + options.steps_offset);
  }
  return falling(count, count / steps);
}

/**
 * Evenly spaced numbers, with both ends.
 *
 * @param {number} start
 * @param {number} end
 * @param {number} count
 */
export function linspace(start, end, count) {
  const step = (end - start) / (count - 1);
  return Array.from({ length: count }, (_, i) => (i > 0 && i === count - 1 ? end : start + (i && i * step)));
}

/**
 * Whole numbers from `start` down to zero in steps of `width`, less one: the spacing "trailing".
 *
 * @param {number} start
 * @param {number} width
 */
export function falling(start, width) {
  const step = start - width - start; // as numpy adds it up
  return Array.from({ length: Math.ceil(start / width) }, (_, i) => roundEven(start + i * step) - 1);
}

/**
 * The nearest whole number, the even one of two that are as near.
 *
 * @param {number} value
 */
export function roundEven(value) {
  const low = Math.floor(value);
  if (value - low !== 0.5) return Math.round(value);
  return low % 2 ? low + 1 : low;
}

/**
 * @param {Options} options
 * @returns {number[]}
 */
function betasOf(options) {
  const { beta_start: start, beta_end: end, num_train_timesteps: count } = options;
  if (options.trained_betas) return options.trained_betas;
  if (options.beta_schedule === "linear") return linspace(start, end, count);
  if (options.beta_schedule === "scaled_linear") return linspace(sqrt(start), sqrt(end), count).map((root) => root ** 2);
  const share = (/** @type {number} */ step) => Math.cos((((step / count + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  return Array.from({ length: count }, (_, i) => Math.min(1 - share(i + 1) / share(i), LARGEST_BETA));
}

/**
 * Products of 1 - beta up to every timestep.
 *
 * @param {Float32Array} betas
 */
function products(betas) {
  let product = 1;
  return betas.map((beta) => (product *= fround(1 - beta)));
}

/**
 * sqrt(a_t) is moved to zero at the end and stretched, so that it stays what it is at the beginning.
 *
 * @param {Float32Array} betas
 */
function withoutLastSignal(betas) {
  const signal = products(betas).map(sqrt);
  const first = signal[0];
  const last = signal[signal.length - 1];
  const stretch = fround(first / fround(first - last));
  const shares = signal.map((value) => fround(fround(value - last) * stretch) ** 2);
  return shares.map((share, i) => 1 - (i ? fround(share / shares[i - 1]) : share));
}
