// What tests/book/test_play.py asks of assets/play, in Node: JSON in, JSON out.

import {readFileSync} from "node:fs";

const {code, folder, prompts, noise, draw} = JSON.parse(readFileSync(0));
const load = (name) => import(`${code}/${name}`);
const bytes = (name) => new Uint8Array(readFileSync(`${folder}/${name}.onnx`));
const answer = {};
const facts = JSON.parse(readFileSync(`${folder}/model.json`));

const {Tokenizer} = await load("tokenizer.js");
const tokenizer = new Tokenizer(facts.tokenizer);
answer.ids = prompts.map((prompt) => tokenizer.encode(prompt).ids);

const {randn} = await load("random.js");
answer.noise = noise.map(([seed, size]) => Array.from(randn(seed, size)));

if (draw.length) {
  const ort = await load("vendor/ort.wasm.bundle.min.mjs");
  ort.env.wasm.numThreads = 1;
  const runtime = readFileSync(new URL(`${code}/vendor/ort-wasm-simd-threaded.wasm`));
  ort.env.wasm.wasmBinary = runtime;
  const {Model} = await load("model.js");
  const files = {text: bytes("text"), unet: bytes("unet"), vae: bytes("vae")};
  const model = await Model.open(ort, facts, files);
  answer.drawn = [];
  for (const {scheduler, ...request} of draw) {
    Object.assign(model.facts.scheduler, scheduler);
    let last = null;
    const x = await model.denoise(request, (seen) => void (last = seen));
    const pixels = Array.from(await model.decode(x));
    answer.drawn.push({x: Array.from(x), pixels, heard: Array.from(last.heard)});
  }
}
process.stdout.write(JSON.stringify(answer));
