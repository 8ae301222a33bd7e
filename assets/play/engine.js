// The page's side of the model: loads it when it is first asked for, and talks to the
// worker. All live parts of a page share one engine.

const SECONDS = {read: 60, open: 120, draw: 120}; // then something is stuck
const MODULES = ["judge.js", "model.js", "random.js", "samplers.js", "tokenizer.js"];
const RUNTIME = "vendor/ort.wasm.bundle.min.mjs";

let shared = null;

// The engine of this page; another one after a failure, so that one can try again.
// `facts`: {version, files: {name: bytes to load}}.
export function engineOf(facts) {
  if (!shared || shared.failure) shared = new Engine(facts);
  return shared;
}

class Engine {
  constructor(facts) {
    Object.assign(this, {facts, failure: null, ready: false, waiting: new Map(), last: 0});
    this.bytes = Object.values(facts.files).reduce((a, b) => a + b, 0);
  }

  // Load everything, once. `onLoad(share)` is told how much is here, 0 to 1.
  load(onLoad = () => {}) {
    this.loading ??= this.start(onLoad).catch((error) => {
      this.fail(error);
      throw this.failure;
    });
    return this.loading;
  }

  async start(onLoad) {
    let read = 0;
    const more = (bytes) => onLoad(Math.min((read += bytes) / this.bytes, 1));
    const files = {};
    for (const name of Object.keys(this.facts.files)) {
      files[name] = await this.read(name, more);
    }
    const texts = {};
    for (const name of [...MODULES, RUNTIME, "worker.js"]) texts[name] = await text(name);
    const code = `const link = ${window.sdbookPlay.link};\n${texts["worker.js"]}`;
    const blob = new Blob([code], {type: "text/javascript"});
    this.worker = new Worker(URL.createObjectURL(blob));
    // May come at any time, also before anybody waits: hence the flag `failure`.
    this.worker.onerror = (event) => {
      this.fail(new Error(event.message || "this browser starts no worker"));
    };
    this.worker.onmessage = ({data}) => this.hear(data);
    await this.call("open", {texts, files});
    this.ready = true;
  }

  // A file of the folder pack/, as bytes of gzip.
  async read(name, more) {
    const {here, asFile, kept, script} = window.sdbookPlay;
    if (asFile) {
      await script(`pack/${name}.js`);
      const packed = await fetch(`data:application/gzip;base64,${kept[name]}`);
      delete kept[name];
      const bytes = new Uint8Array(await packed.arrayBuffer());
      more(bytes.length);
      return bytes;
    }
    const stop = new AbortController();
    let watch = null;
    const alive = () => {
      clearTimeout(watch);
      watch = setTimeout(() => stop.abort(), SECONDS.read * 1000);
    };
    alive();
    try {
      // The version is part of the address, so what the browser has kept is right.
      const url = `${here}pack/${name}.gz?${this.facts.version}`;
      const answer = await fetch(url, {cache: "force-cache", signal: stop.signal});
      if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
      const parts = [];
      const reader = answer.body.getReader();
      for (;;) {
        const {done, value} = await reader.read();
        if (done) break;
        alive();
        parts.push(value);
        more(value.length);
      }
      return new Uint8Array(await new Blob(parts).arrayBuffer());
    } catch (error) {
      throw stop.signal.aborted ? new Error("the connection is silent") : error;
    } finally {
      clearTimeout(watch);
    }
  }

  fail(error) {
    this.failure ??= error;
    this.worker?.terminate();
    for (const {fail} of this.waiting.values()) fail(this.failure);
    this.waiting.clear();
  }

  hear({id, event, result, error}) {
    const call = this.waiting.get(id);
    if (!call) return;
    if (event !== undefined) return call.onEvent(event);
    this.waiting.delete(id);
    if (error !== undefined) call.fail(new Error(error));
    else call.done(result);
  }

  // Have the worker do something of `calls` in worker.js; `onEvent` hears of it meanwhile.
  call(name, args, onEvent = () => {}) {
    if (this.failure) return Promise.reject(this.failure);
    const id = ++this.last;
    return new Promise((done, fail) => {
      const late = () => this.fail(new Error(`no answer in ${SECONDS[name]} seconds`));
      const watch = setTimeout(late, SECONDS[name] * 1000);
      const end = (then) => (value) => (clearTimeout(watch), then(value));
      this.waiting.set(id, {done: end(done), fail: end(fail), onEvent});
      // Files are handed over, not copied.
      const own = Object.values(args.files ?? {}).map((bytes) => bytes.buffer);
      this.worker.postMessage({id, call: name, args}, own);
    });
  }

  // What was asked for up to now is not wanted any more.
  stop() {
    this.worker?.postMessage({id: this.last, call: "stop"});
  }
}

// The text of a module beside this one.
async function text(name) {
  const {here, asFile, kept} = window.sdbookPlay;
  if (asFile) return kept[name];
  const answer = await fetch(here + name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer.text();
}
