/**
 * Ways from noise to picture: DDIM (arXiv 2010.02502), PLMS (2202.09778), LCM (2310.04378), DPM-Solver++ (2211.01095).
 *
 * Each is that of the same name in `bksdm/runtime`, where its equations are; a test holds every step to it.
 */

import { falling, linspace, noiseRatios, roundEven, signalShares, spaced } from "./schedule.js";

/** @typedef {import("./schedule.js").Options} Options */
/** @typedef {() => Float32Array} Draw Gives fresh standard normal numbers. */

const SIGMA_DATA = 0.5;
const FEW_STEPS = 15;
const LEAST_SHARE = 2 ** -24;
const MULTISTEP = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]];

/**
 * The way that a scheduler takes.
 *
 * @param {Options} options
 * @param {number} steps Of the whole way.
 * @param {number} [strength] Share of the way that is gone, from its middle on, in (0, 1].
 * @returns {Way}
 */
export function trajectory(options, steps, strength = 1) {
  const kind = KINDS[options._class_name];
  if (!kind) throw new Error(`the scheduler ${options._class_name} is not known here`);
  const most = options.num_train_timesteps;
  if (!(Number.isInteger(steps) && steps >= 1 && steps <= most)) {
    throw new Error(`steps is ${steps}; give a whole number from 1 to ${most}`);
  }
  if (!(strength > 0 && strength <= 1)) throw new Error(`strength is ${strength}; give more than 0 and at most 1`);
  const done = Math.min(Math.floor(steps * strength), steps);
  if (done < 1) throw new Error(`strength ${strength} of ${steps} steps leaves no step to do; give more of either`);
  return new kind(options, steps, steps - done);
}

/** One way from noise to picture: it holds what earlier steps left, and is used once. */
class Way {
  /**
   * @param {Options} options
   * @param {number} steps Of the whole way.
   * @param {number} skipped Steps that are left out at its beginning.
   */
  constructor(options, steps, skipped) {
    this.options = options;
    this.steps = steps;
    this.index = skipped;
    this.shares = signalShares(options);
    this.all = this.visited();
    this.timesteps = this.all.slice(skipped);
    /** The picture that the last step saw, of which a preview is made. @type {Float32Array} */
    this.seen = new Float32Array(0);
  }

  /**
   * All timesteps, also those that are skipped.
   *
   * @returns {number[]}
   */
  visited() {
    return spaced(this.options, this.steps).map(roundEven);
  }

  /**
   * Clean latents with the noise of the first timestep.
   *
   * @param {Float32Array} latents
   * @param {Float32Array} noise
   */
  noisy(latents, noise) {
    const [signal, spread] = this.mixture(this.timesteps[0]);
    return weighted([signal, spread], [latents, noise]);
  }

  /**
   * The sample at the next timestep.
   *
   * @abstract
   * @param {Float32Array} output What the U-Net predicts.
   * @param {Float32Array} sample Noisy latents.
   * @param {Draw} draw
   * @returns {Float32Array}
   */
  step(output, sample, draw) {
    throw new Error(`${this.constructor.name} has no step for ${output.length}, ${sample.length}, ${draw}`);
  }

  /**
   * sqrt(a_t) and sqrt(1 - a_t).
   *
   * @param {number} timestep
   * @returns {[number, number]}
   */
  mixture(timestep) {
    const share = this.shares[timestep];
    return [Math.sqrt(share), Math.sqrt(1 - share)];
  }

  /**
   * a_t, also before the first timestep.
   *
   * @param {number} timestep
   */
  share(timestep) {
    if (timestep >= 0) return this.shares[timestep];
    return this.options.set_alpha_to_one ? 1 : this.shares[0];
  }

  /**
   * x_0 for latents signal x_0 + spread e.
   *
   * @param {Float32Array} output
   * @param {Float32Array} sample
   * @param {number} signal
   * @param {number} spread
   */
  clean(output, sample, signal, spread) {
    const kind = this.options.prediction_type;
    if (kind === "sample") this.seen = output;
    else if (kind === "v_prediction") this.seen = weighted([signal, -spread], [sample, output]);
    else this.seen = weighted([1 / signal, -spread / signal], [sample, output]);
    if (this.options.clip_sample) {
      const limit = this.options.clip_sample_range ?? 1;
      this.seen = this.seen.map((value) => Math.max(-limit, Math.min(limit, value)));
    }
    return this.seen;
  }

  /**
   * e for latents signal x_0 + spread e.
   *
   * @param {Float32Array} output
   * @param {Float32Array} sample
   * @param {number} signal
   * @param {number} spread
   */
  noise(output, sample, signal, spread) {
    const kind = this.options.prediction_type;
    if (kind === "sample") return weighted([1 / spread, -signal / spread], [sample, output]);
    return kind === "v_prediction" ? weighted([signal, spread], [output, sample]) : output;
  }
}

class Ddim extends Way {
  /** @type {Way["step"]} */
  step(output, sample) {
    const timestep = this.all[this.index++];
    const [signal, spread] = this.mixture(timestep);
    const clean = this.clean(output, sample, signal, spread);
    const noise = this.noise(output, sample, signal, spread);
    const share = this.share(timestep - Math.floor(this.options.num_train_timesteps / this.steps));
    return weighted([Math.sqrt(share), Math.sqrt(1 - share)], [clean, noise]);
  }
}

/** Linear multistep without Runge and Kutta's beginning. */
class Plms extends Way {
  /** The newest first. @type {Float32Array[]} */
  outputs = [];
  /** @type {Float32Array | null} */
  first = null;
  count = 0;

  visited() {
    const once = super.visited();
    // The second timestep comes twice: a first try, and a better one from both outputs.
    return [...once.slice(0, 2), ...once.slice(1)];
  }

  /** @type {Way["step"]} */
  step(output, sample) {
    const timestep = this.all[this.index++];
    const stride = Math.floor(this.options.num_train_timesteps / this.steps);
    const again = this.count === 1;
    const here = again ? timestep + stride : timestep;
    this.clean(output, sample, ...this.mixture(timestep));
    if (again && this.first) {
      output = weighted([0.5, 0.5], [output, this.outputs[0]]);
      sample = this.first;
    } else {
      this.outputs = [output, ...this.outputs.slice(0, 3)];
      output = weighted(MULTISTEP[this.outputs.length - 1], this.outputs);
    }
    if (this.count++ === 0) this.first = sample;
    return this.transferred(output, sample, here, here - stride);
  }

  /**
   * @param {Float32Array} output
   * @param {Float32Array} sample
   * @param {number} here
   * @param {number} there
   */
  transferred(output, sample, here, there) {
    const now = this.share(here);
    const then = this.share(there);
    const noise = this.noise(output, sample, Math.sqrt(now), Math.sqrt(1 - now));
    const below = now * Math.sqrt(1 - then) + Math.sqrt(now * (1 - now) * then);
    return weighted([Math.sqrt(then / now), -(then - now) / below], [sample, noise]);
  }
}

class Lcm extends Way {
  visited() {
    const trained = this.options.num_train_timesteps;
    const original = this.options.original_inference_steps ?? 50;
    if (this.steps > original) throw new Error(`steps is ${this.steps}, and this LCM scheduler has ${original}; give no more`);
    const stride = Math.floor(trained / original);
    const chosen = Array.from({ length: this.steps }, (_, i) => Math.floor(i * (original / this.steps)));
    return chosen.map((place) => (original - place) * stride - 1);
  }

  /** @type {Way["step"]} */
  step(output, sample, draw) {
    const timestep = this.all[this.index++];
    const clean = this.clean(output, sample, ...this.mixture(timestep));
    const scaled = timestep * (this.options.timestep_scaling ?? 10);
    const distance = scaled ** 2 + SIGMA_DATA ** 2;
    const denoised = weighted([scaled / Math.sqrt(distance), SIGMA_DATA ** 2 / distance], [clean, sample]);
    if (this.index === this.steps) return denoised;
    return weighted(this.mixture(this.all[this.index]), [denoised, draw()]);
  }
}

class DpmSolver extends Way {
  /** The newest first. @type {Float32Array[]} */
  predicted = [];
  /** One for each timestep, and the last one. @type {number[]} */
  sigmas = this.levels();

  /** Noise over signal at the timesteps that are visited. */
  levels() {
    if (this.options.rescale_betas_zero_snr) this.shares[this.shares.length - 1] = LEAST_SHARE;
    const ratios = noiseRatios(this.shares);
    const last = this.options.final_sigmas_type === "sigma_min" ? ratios[0] : 0;
    return [...this.all.map((timestep) => ratios[timestep]), last];
  }

  visited() {
    const { num_train_timesteps: trained, timestep_spacing: spacing, steps_offset: offset } = this.options;
    const most = trained - this.clipped();
    if (spacing === "linspace") return linspace(0, most - 1, this.steps + 1).map(roundEven).reverse().slice(0, -1);
    if (spacing === "leading") {
      const stride = Math.floor(most / (this.steps + 1));
      return Array.from({ length: this.steps }, (_, i) => (this.steps - i) * stride + offset);
    }
    return falling(most, trained / this.steps);
  }

  /** Timesteps at the noisy end that are left out because their signal is too small. */
  clipped() {
    const least = this.options.lambda_min_clipped ?? -Infinity;
    return this.shares.filter((share) => Math.log(Math.sqrt(share)) - Math.log(Math.sqrt(1 - share)) < least).length;
  }

  /** @type {Way["noisy"]} */
  noisy(latents, noise) {
    return weighted(parts(this.sigmas[this.index]), [latents, noise]);
  }

  /** @type {Way["step"]} */
  step(output, sample, draw) {
    const [signal, spread] = parts(this.sigmas[this.index]);
    this.predicted = [this.clean(output, sample, signal, spread), ...this.predicted.slice(0, 2)];
    const [signalThen, spreadThen] = parts(this.sigmas[this.index + 1]);
    const width = this.log(this.index + 1) - this.log(this.index);
    const kept = Math.exp(-width);
    const noisy = this.options.algorithm_type === "sde-dpmsolver++";
    const integral = this.integral(width, noisy ? 2 * width : width);
    this.index += 1;
    const made = weighted([(spreadThen / spread) * (noisy ? kept : 1), signalThen], [sample, integral]);
    return noisy ? weighted([1, spreadThen * Math.sqrt(1 - kept ** 2)], [made, draw()]) : made;
  }

  /**
   * Of exp(l - l_t) x_0 over a step, where x_0 is a polynomial in l through the last pictures.
   *
   * @param {number} width Of the step in l.
   * @param {number} double The same, or twice it for the equation with noise.
   */
  integral(width, double) {
    const [now, before, first] = this.predicted;
    const order = Math.min(this.order(), this.predicted.length);
    const whole = 1 - Math.exp(-double);
    if (order === 1) return weighted([whole], [now]);
    const back = [0, 1].map((step) => this.log(this.index - step) - this.log(this.index - step - 1));
    const slope = weighted([width / back[0], -width / back[0]], [now, before]);
    if (order === 2) {
      const midpoint = this.options.solver_type === "midpoint";
      return weighted([whole, midpoint ? 0.5 * whole : 1 - whole / double], [now, slope]);
    }
    const earlier = weighted([width / back[1], -width / back[1]], [before, first]);
    const share = width / (back[0] + back[1]);
    const bend = weighted([share, -share], [slope, earlier]);
    const bent = weighted([1, back[0] / width], [slope, bend]);
    return weighted([whole, 1 - whole / width, 0.5 - (width - whole) / width ** 2], [now, bent, bend]);
  }

  /** Lower at the end, where it has to be or the steps are few. */
  order() {
    const order = this.options.solver_order ?? 2;
    const left = this.all.length - this.index;
    const low = this.options.lower_order_final && this.all.length < FEW_STEPS;
    if (left === 1 && (low || this.options.euler_at_final || this.options.final_sigmas_type === "zero")) return 1;
    return low ? Math.min(order, left) : order;
  }

  /**
   * log(signal / noise) at one of the sigmas, infinite where it is zero.
   *
   * @param {number} index
   */
  log(index) {
    return -Math.log(this.sigmas[index]);
  }
}

/** @type {Record<string, typeof Way>} */
const KINDS = {
  DDIMScheduler: Ddim,
  PNDMScheduler: Plms,
  LCMScheduler: Lcm,
  DPMSolverMultistepScheduler: DpmSolver,
};

/**
 * Signal and noise, whose squares add to one, of their ratio, noise over signal.
 *
 * @param {number} ratio
 * @returns {[number, number]}
 */
function parts(ratio) {
  const signal = 1 / Math.sqrt(ratio ** 2 + 1);
  return [signal, ratio * signal];
}

/**
 * A weighted sum of latents.
 *
 * @param {number[]} weights
 * @param {Float32Array[]} latents
 */
export function weighted(weights, latents) {
  return Float32Array.from(latents[0], (_, i) => {
    let sum = 0;
    for (let part = 0; part < latents.length; part++) sum += weights[part] * latents[part][i];
    return sum;
  });
}
