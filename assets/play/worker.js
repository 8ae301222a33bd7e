// What works beside the page, so that the page stays quick: ONNX Runtime and the model.
//
// A classic worker, made of a blob: a page that was opened as a file may start no other.
// It gets all files from the page, as bytes, and asks nobody. engine.js writes `link`
// (see play.js) before this text.
//
// In comes {id, call, args}; out go {id, event} while it works, and at the end {id,
// result} or {id, error}.

let model = null, judge = null;
let given_up = 0; // calls up to this number are not wanted any more

async function unpack(bytes) {
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(plain).arrayBuffer());
}

// Messages of the page are heard only between two tasks, and a loop is one task.
const breath = new MessageChannel();
const listen = () =>
  new Promise((done) => {
    breath.port1.onmessage = done;
    breath.port2.postMessage(0);
  });

const calls = {
  // `texts`: modules by name; `files`: the rest by name, as gzip.
  async open({texts, files}) {
    const address = link(texts);
    const {Model} = await import(address("model.js"));
    const ort = await import(address("vendor/ort.wasm.bundle.min.mjs"));
    ort.env.wasm.numThreads = 1; // more would need a page with headers for isolation
    ort.env.wasm.wasmBinary = await unpack(files["ort.wasm"]);
    ort.env.logLevel = "error";
    const read = async (name) =>
      JSON.parse(new TextDecoder().decode(await unpack(files[name])));
    const {Judge} = await import(address("judge.js"));
    judge = new Judge(await read("judge.json"));
    const network = (name) => unpack(files[`${name}.onnx`]);
    model = await Model.open(ort, await read("model.json"), network);
    ort.env.wasm.wasmBinary = undefined; // it is compiled by now
    await model.decode(await model.denoise({prompt: "", steps: 1})); // the slow first time
  },

  // Draw a request of model.js. Tells of every step, and shows the picture at those that
  // `frames` lists. At the end {picture, latents, seconds, seen}, or null if it was given
  // up. `seen` is what the judge sees.
  async draw({frames = [], ...request}, say, id) {
    const start = performance.now();
    const latents = await model.denoise(request, async ({step, steps, x, heard}) => {
      const picture = frames.includes(step) && step < steps && (await model.decode(x));
      say({step, steps, picture, heard});
      await listen();
      return id > given_up;
    });
    if (latents === null) return null;
    const picture = await model.decode(latents);
    const seconds = (performance.now() - start) / 1000;
    return {picture, latents, seconds, seen: judge.read(picture)};
  },
};

onmessage = async ({data: {id, call, args}}) => {
  if (call === "stop") return void (given_up = id);
  const say = (event) => postMessage({id, event});
  try {
    postMessage({id, result: await calls[call](args, say, id)});
  } catch (error) {
    postMessage({id, error: String(error?.message ?? error)});
  }
};
