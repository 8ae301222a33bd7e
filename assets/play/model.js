// The model: three ONNX files, and the loop of chapter 9 around them.
//
// `ort` is ONNX Runtime, `facts` is model.json; `bytesOf` gives a network's file, and is
// asked for one after the other, so that no two are in memory.
// It runs wherever ONNX Runtime does: in a page's worker, and in Node for the tests.

import {randn} from "./random.js";
import {SAMPLERS} from "./samplers.js";
import {Tokenizer} from "./tokenizer.js";

// Classifier-free guidance: walk from the answer without the prompt past the one with.
export function guide(without, withPrompt, scale) {
  return without.map((v, k) => v + scale * (withPrompt[k] - v));
}

// Pixels in [-1, 1], (3, h, w), as bytes of red, green, blue and opacity.
export function toBytes(pixels) {
  const n = pixels.length / 3, bytes = new Uint8ClampedArray(4 * n).fill(255);
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) {
      bytes[4 * i + c] = Math.round((pixels[c * n + i] / 2 + 0.5) * 255);
    }
  }
  return bytes;
}

export class Model {
  static async open(ort, facts, bytesOf) {
    const model = new Model();
    Object.assign(model, {ort, facts, tokenizer: new Tokenizer(facts.tokenizer)});
    for (const name of ["text", "unet", "vae"]) {
      // Without the arena, which takes memory in large steps, it is as fast.
      const options = {enableCpuMemArena: false};
      model[name] = await ort.InferenceSession.create(await bytesOf(name), options);
    }
    return model;
  }

  tensor(values, ...shape) {
    const type = values instanceof BigInt64Array ? "int64" : "float32";
    return new this.ort.Tensor(type, values, shape);
  }

  // Two texts to their two contexts, one row of numbers after the other.
  async encode(first, second) {
    const rows = [first, second].map((text) => this.tokenizer.encode(text).ids);
    const ids = BigInt64Array.from(rows.flat(), BigInt);
    const input = {ids: this.tensor(ids, 2, this.tokenizer.length)};
    return (await this.text.run(input)).context.data;
  }

  // The UNet's answers at timestep t, {without, withPrompt, heard}. `heard` says for each
  // token where in the picture it is listened to: (tokens, h, w), 0 to 1.
  async predict(x, t, context) {
    const {latent, width} = this.facts;
    const {answers, heard} = await this.unet.run({
      x: this.tensor(x, 1, ...latent),
      t: this.tensor(Float32Array.of(t), 1),
      context: this.tensor(context, 2, this.tokenizer.length, width),
    });
    const [without, withPrompt] = [0, 1].map(
      (k) => answers.data.slice(k * x.length, (k + 1) * x.length));
    return {without, withPrompt, heard: heard.data};
  }

  // Latents, as the UNet sees them, to the bytes of a picture.
  async decode(latents) {
    const z = latents.map((v) => v / this.facts.scaling_factor);
    const {pixels} = await this.vae.run({z: this.tensor(z, 1, ...this.facts.latent)});
    return toBytes(pixels.data);
  }

  // From noise to latents. `onStep({step, steps, t, x, clean, heard})` is called after
  // each step and may wait; if it says false, the drawing is given up, and null comes back.
  async denoise({prompt, negative = "", seed = 0, steps = 25, guidance = 3,
                 sampler = "ddim"}, onStep = () => true) {
    const context = await this.encode(negative, prompt);
    const way = new SAMPLERS[sampler](this.facts.scheduler, steps);
    const size = this.facts.latent.reduce((a, b) => a * b);
    let x = randn(seed, size).map((v) => v * way.start);
    for (const [i, t] of way.timesteps.entries()) {
      const answer = await this.predict(way.input(x, i), t, context);
      const {without, withPrompt, heard} = answer;
      // As in the package, a scale of 1 or less means no guidance.
      const output = guidance > 1 ? guide(without, withPrompt, guidance) : withPrompt;
      x = way.step(output, x, i);
      const seen = {step: i + 1, steps: way.timesteps.length, t, x, clean: way.clean};
      if ((await onStep({...seen, heard})) === false) return null;
    }
    return x;
  }
}
