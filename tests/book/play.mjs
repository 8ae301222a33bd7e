// What tests/book/test_play.py asks of assets/play, in Node: JSON in, JSON out.

import {readFileSync} from "node:fs";

const {code, folder, prompts, captions, noise, draw, pictures} = JSON.parse(readFileSync(0));
const load = (name) => import(`${code}/${name}`);
const bytes = (name) => new Uint8Array(readFileSync(`${folder}/${name}.onnx`));
const answer = {};
const facts = JSON.parse(readFileSync(`${folder}/model.json`));

const {Tokenizer} = await load("tokenizer.js");
const tokenizer = new Tokenizer(facts.tokenizer);
answer.ids = prompts.map((prompt) => tokenizer.encode(prompt).ids);

const {read, say, strangers, take} = await load("words.js");
answer.requests = captions.map((caption) => read(caption, facts.world));
answer.said = answer.requests.map((request) => say(request, facts.world).text);
answer.strange = prompts.map((prompt) => strangers(prompt, facts.world));
answer.taken = {};
if (captions.length) {
  const start = read("a red star above a blue house", facts.world);
  const takes = [[1, "colour", "orange"], [0, "count", 3], [0, "colour", "red"],
    [1, "relation", "left of"], [0, "relation", "above"], [1, "place", "at dusk"]];
  for (const [at, kind, value] of takes) {
    const text = say(take(start, at, kind, value, facts.world), facts.world).text;
    answer.taken[`${at} ${value}`] = text;
  }
}

const {randn} = await load("random.js");
answer.noise = noise.map(([seed, size]) => Array.from(randn(seed, size)));

const {Judge, satisfies, tell} = await load("judge.js");
const judge = new Judge(JSON.parse(readFileSync(`${folder}/judge.json`)));
answer.judged = pictures.map(([picture, caption]) => {
  const seen = judge.read(new Uint8Array(Buffer.from(picture, "base64")));
  const right = satisfies(seen, read(caption, facts.world), facts.world);
  return {...seen, right, text: tell(seen, facts.world)};
});

if (draw.length) {
  const ort = await load("vendor/ort.wasm.bundle.min.mjs");
  ort.env.wasm.numThreads = 1;
  const runtime = readFileSync(new URL(`${code}/vendor/ort-wasm-simd-threaded.wasm`));
  ort.env.wasm.wasmBinary = runtime;
  const {Model} = await load("model.js");
  const model = await Model.open(ort, facts, bytes);
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
