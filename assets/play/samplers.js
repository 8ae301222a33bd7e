// The way back from noise, as chapters 7 and 10 do it: DDIM, Euler, DPM-Solver++(2M).
//
// A sampler has `timesteps`, noisiest first, `start` (the spread of the first x),
// `input(x, i)`, what the network sees of x at step i, and `step(output, x, i)`, which
// gives the next x. `clean` is then the guess of the finished latents. Everything comes
// from the model's own scheduler_config.json, `config`.

// alpha_bar[t], the signal power that is left at timestep t.
export function alphaBars(config) {
  const n = config.num_train_timesteps;
  const [start, end] = [config.beta_start, config.beta_end];
  const line = (a, b, i) => Math.fround(a + ((b - a) * i) / (n - 1));
  const cosine = (u) => Math.cos(((u + 0.008) / 1.008) * (Math.PI / 2)) ** 2;
  const beta = {
    linear: (i) => line(start, end, i),
    scaled_linear: (i) => line(start ** 0.5, end ** 0.5, i) ** 2,
    squaredcos_cap_v2: (i) =>
      Math.min(1 - cosine((i + 1) / n) / cosine(i / n), 0.999),
  }[config.beta_schedule];
  const bars = new Float64Array(n);
  for (let i = 0, power = 1; i < n; i++) {
    bars[i] = power *= 1 - Math.fround(beta(i));
  }
  if (!config.rescale_betas_zero_snr) return bars;
  // Lin et al. (2024): shift and stretch the roots, so that they end at 0.
  const first = Math.sqrt(bars[0]), last = Math.sqrt(bars[n - 1]);
  return bars.map((bar) => ((Math.sqrt(bar) - last) * (first / (first - last))) ** 2);
}

// NumPy's rounding: a half goes to the even neighbour.
const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// `steps` of `total` timesteps, noisiest first: of `points` of them, the noisiest.
function spaced(spacing, steps, total, offset, points = steps) {
  if (spacing === "linspace") {
    const at = (i) => ((points - 1 - i) * (total - 1)) / (points - 1);
    return Array.from({length: steps}, (_, i) => (points > 1 ? at(i) : 0));
  }
  if (spacing === "leading") {
    const count = Math.min(points, total), stride = Math.floor(total / count);
    const at = (i) => (count - 1 - i) * stride + offset;
    return Array.from({length: Math.min(steps, count)}, (_, i) => at(i));
  }
  return Array.from({length: steps}, (_, i) => round(total - (i * total) / steps) - 1);
}

// Values between the numbers of a table, as np.interp has them.
function between(table, t) {
  const low = Math.min(Math.max(Math.floor(t), 0), table.length - 1);
  const high = Math.min(low + 1, table.length - 1);
  return table[low] + (table[high] - table[low]) * Math.min(Math.max(t - low, 0), 1);
}

// {clean, noise}: what the network's output says of x = signal * clean + spread * noise.
function split(config, output, x, signal, spread) {
  const size = Math.hypot(signal, spread); // the network saw x / size
  if (config.prediction_type === "epsilon") {
    return {noise: output, clean: x.map((v, k) => (v - spread * output[k]) / signal)};
  }
  if (config.prediction_type === "sample") {
    return {clean: output, noise: x.map((v, k) => (v - signal * output[k]) / spread)};
  }
  return {
    clean: x.map((v, k) => ((signal * v) / size - spread * output[k]) / size),
    noise: x.map((v, k) => (signal * output[k] + (spread * v) / size) / size),
  };
}

// A model of pixels may ask that its guesses keep to their range.
function clip(config, clean) {
  const limit = config.clip_sample ? config.clip_sample_range : Infinity;
  return clean.map((v) => Math.min(Math.max(v, -limit), limit));
}

export class DDIM {
  constructor(config, steps) {
    const total = config.num_train_timesteps;
    const all = spaced(config.timestep_spacing, steps, total, config.steps_offset);
    const over = Math.max(0, round(all[0]) - (total - 1));
    this.timesteps = all.map((t) => round(t) - over);
    this.stride = Math.floor(total / steps);
    this.bars = alphaBars(config);
    this.last = config.set_alpha_to_one ? 1 : this.bars[0];
    this.config = config;
    this.start = 1;
  }

  input(x) {
    return x;
  }

  step(output, x, i) {
    const t = this.timesteps[i], after = t - this.stride;
    const bar = this.bars[t], next = after < 0 ? this.last : this.bars[after];
    const [signal, spread] = [Math.sqrt(bar), Math.sqrt(1 - bar)];
    const {clean, noise} = split(this.config, output, x, signal, spread);
    this.clean = clip(this.config, clean);
    return x.map((_, k) =>
      Math.sqrt(next) * this.clean[k] + Math.sqrt(1 - next) * noise[k]);
  }
}

// What the samplers that walk down a table of sigma have in common.
class Sigmas {
  constructor(config, steps, varianceOne) {
    const total = config.num_train_timesteps, spacing = config.timestep_spacing;
    const bars = alphaBars(config);
    if (config.rescale_betas_zero_snr) bars[total - 1] = 2 ** -24; // as in diffusers
    const table = bars.map((bar) => Math.sqrt((1 - bar) / bar));
    const points = steps + (varianceOne ? 1 : 0);
    const all = spaced(spacing, steps, total, config.steps_offset, points);
    this.timesteps = all.map(varianceOne ? round : Math.fround);
    this.sigmas = [...this.timesteps.map((t) => between(table, t)), 0];
    this.config = config;
  }
}

export class Euler extends Sigmas {
  constructor(config, steps) {
    super(config, steps, false);
    const leading = config.timestep_spacing === "leading";
    this.start = Math.sqrt(Math.max(...this.sigmas) ** 2 + (leading ? 1 : 0));
  }

  // Networks are trained on x of variance 1; here x is x0 + sigma * noise.
  input(x, i) {
    return x.map((v) => v / Math.hypot(this.sigmas[i], 1));
  }

  step(output, x, i) {
    const [sigma, next] = this.sigmas.slice(i, i + 2);
    this.clean = clip(this.config, split(this.config, output, x, 1, sigma).clean);
    return x.map((v, k) => v + (next - sigma) * ((v - this.clean[k]) / sigma));
  }
}

export class DPMSolver extends Sigmas {
  constructor(config, steps) {
    super(config, steps, true);
    this.start = 1;
    this.before = null; // the log-SNR and the guess of the step before this one
  }

  input(x) {
    return x;
  }

  // x0 goes on as it went, and the rest is solved exactly (Lu et al., 2022b).
  step(output, x, i) {
    const [sigma, next] = this.sigmas.slice(i, i + 2);
    const signal = 1 / Math.hypot(1, sigma), spread = sigma * signal;
    const nextSignal = 1 / Math.hypot(1, next), nextSpread = next * nextSignal;
    const h = Math.log(sigma) - Math.log(next), now = -Math.log(sigma);
    const {clean} = split(this.config, output, x, signal, spread);
    let x0 = (this.clean = clip(this.config, clean));
    const {before} = this;
    if (before && next > 0) {
      const weight = h / (2 * (now - before.now));
      x0 = x0.map((v, k) => v + weight * (v - before.x0[k]));
    }
    this.before = {now, x0: this.clean};
    return x.map((v, k) =>
      (nextSpread / spread) * v - nextSignal * Math.expm1(-h) * x0[k]);
  }
}

export const SAMPLERS = {ddim: DDIM, euler: Euler, dpmpp_2m: DPMSolver};
