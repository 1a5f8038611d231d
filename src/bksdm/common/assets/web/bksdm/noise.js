/**
 * PyTorch's random numbers of the CPU: a seed means the picture that it means in Python.
 *
 * What `bksdm/runtime/noise.py` says of the Mersenne Twister and of Box and Muller's pairs holds here too.
 */

const STATE = 624;
const AHEAD = 397;
const BLOCK = 16;
const HALF = BLOCK / 2;

/** The Mersenne Twister, seeded by one number. */
class Twister {
  /** @param {number} seed Its lowest 32 bits count. */
  constructor(seed) {
    this.state = new Uint32Array(STATE);
    this.state[0] = seed >>> 0;
    for (let i = 1; i < STATE; i++) {
      const before = this.state[i - 1];
      this.state[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
    }
    this.index = STATE;
  }

  /** @returns {number} 32 bits. */
  next() {
    if (this.index === STATE) this.turn();
    let bits = this.state[this.index++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  }

  /** Make the next 624 numbers. */
  turn() {
    const state = this.state;
    for (let i = 0; i < STATE; i++) {
      const bits = (state[i] & 0x80000000) | (state[(i + 1) % STATE] & 0x7fffffff);
      state[i] = state[(i + AHEAD) % STATE] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
    }
    this.index = 0;
  }
}

/** The random numbers of `torch.Generator().manual_seed(seed)`; draws go on where the last one ended. */
export class Generator {
  /** @param {number} seed A whole number. */
  constructor(seed) {
    this.twister = new Twister(seed % 2 ** 32);
    /** @type {number | null} */
    this.kept = null;
  }

  /**
   * Standard normal numbers, those of `torch.randn` but for the last bits.
   *
   * @param {number} count How many.
   */
  normal(count) {
    return count < BLOCK ? Float32Array.from({ length: count }, () => this.one()) : this.blocks(count);
  }

  /** @param {number} count At least 16. */
  blocks(count) {
    const uniform = Float64Array.from({ length: count }, () => this.uniform());
    const normal = new Float32Array(count);
    for (let start = 0; start + BLOCK <= count; start += BLOCK) pairs(uniform.subarray(start, start + BLOCK), normal, start);
    if (count % BLOCK) {
      const last = Float64Array.from({ length: BLOCK }, () => this.uniform());
      pairs(last, normal, count - BLOCK);
    }
    return normal;
  }

  /** A number in [0, 1) of 24 bits. */
  uniform() {
    return (this.twister.next() & 0xffffff) * 2 ** -24;
  }

  /** One normal number; the second of a pair is kept for the next call. */
  one() {
    if (this.kept !== null) {
      const kept = this.kept;
      this.kept = null;
      return kept;
    }
    const angle = this.double();
    const length = Math.sqrt(-2 * Math.log1p(-this.double()));
    this.kept = length * Math.sin(2 * Math.PI * angle);
    return length * Math.cos(2 * Math.PI * angle);
  }

  /** A number in [0, 1) of 53 bits. */
  double() {
    const high = this.twister.next() & 0x1fffff;
    return (high * 2 ** 32 + this.twister.next()) * 2 ** -53;
  }
}

/**
 * Sixteen normal numbers, of which the first eight uniform ones give lengths and the others angles.
 *
 * @param {Float64Array} uniform Sixteen.
 * @param {Float32Array} normal Where they go.
 * @param {number} start From where on.
 */
function pairs(uniform, normal, start) {
  for (let i = 0; i < HALF; i++) {
    const length = Math.sqrt(-2 * Math.log(1 - uniform[i]));
    const angle = 2 * Math.PI * uniform[i + HALF];
    normal[start + i] = length * Math.cos(angle);
    normal[start + i + HALF] = length * Math.sin(angle);
  }
}
