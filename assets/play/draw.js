// "Draw with the model": a prompt, words to choose from, and the picture as it forms.

import {make, oneStop, short, show, still} from "./dom.js";
import {engineOf} from "./engine.js";
import {satisfies, tell} from "./judge.js";
import {invent, read, say, strangers, take} from "./words.js";

const CELLS = 8; // pictures in the film strip

// After which steps the film shows a picture, the last one included.
export function framesOf(steps) {
  const cells = Math.min(CELLS, steps);
  return Array.from({length: cells}, (_, k) => Math.round(((k + 1) * steps) / cells));
}

export default function draw(box, facts) {
  const view = new Draw(box, facts);
  box.classList.add("alive");
  box.append(view.root);
}

class Draw {
  constructor(box, facts) {
    Object.assign(this, {facts, world: facts.world, busy: 0, at: 0});
    const [height, width] = facts.picture;
    const canvas = (attributes) => make("canvas", {width, height, ...attributes});
    this.id = `play-${Math.random().toString(36).slice(2, 8)}`;
    this.prompt = make("input", {
      id: `${this.id}-prompt`, type: "text", value: facts.prompt, maxlength: 200,
      autocomplete: "off", autocapitalize: "off", spellcheck: "false",
      enterkeyhint: "go", "aria-describedby": `${this.id}-hint`,
      oninput: () => this.reread(), onkeyup: () => this.reread(),
      onclick: () => this.reread(), onfocus: () => this.reread(),
    });
    this.go = make("button", {type: "submit", class: "go"}, "Draw");
    this.hint = make("p", {id: `${this.id}-hint`, class: "hint", "aria-live": "polite"});
    this.verdict = make("p", {class: "verdict", "aria-live": "polite"});
    this.status = make("p", {class: "status", role: "status"});
    this.count = make("span", {class: "count", "aria-hidden": "true"});
    this.bar = make("progress", {max: 1, value: 0, "aria-label": "Progress"});
    this.code = make("code");
    this.picture = canvas({class: "picture", role: "img"});
    this.film = Array.from({length: CELLS}, () => canvas({"aria-hidden": "true"}));
    this.labels = this.film.map(() => make("span", {"aria-hidden": "true"}));
    const film = make("div", {class: "film"}, ...this.film.map((frame, k) =>
      make("div", {}, frame, this.labels[k])));
    const python = make("p", {class: "python"}, make("span", {}, "The same in Python:"),
      this.code);
    this.root = make("form", {class: "draw", "aria-label": "Draw with the model",
      onsubmit: (event) => (event.preventDefault(), this.run())},
      make("div", {class: "line"},
        make("label", {for: `${this.id}-prompt`, class: "unseen"}, "Prompt"),
        this.prompt, this.go), this.bar,
      make("div", {class: "doing"}, this.status, this.count), this.chips(), this.hint,
      make("div", {class: "stage"}, this.picture,
        make("div", {class: "side"}, film, this.verdict, this.controls(), python)));
    this.before(facts.film);
    this.reread();
    this.tell(this.size());
  }

  size() {
    const megabytes = short(engineOf(this.facts).bytes / 1e6, 0);
    return `The first drawing loads the model, ${megabytes} MB, once. Nothing that you ` +
      "type leaves this page.";
  }

  // What the package drew while the book was made, until something is drawn here.
  before(film) {
    const strip = new Image();
    strip.onload = () => {
      if (this.busy) return;
      const side = strip.naturalHeight;
      const onto = (canvas, k) =>
        canvas.getContext("2d").drawImage(strip, -k * side, 0);
      this.film.forEach(onto);
      onto(this.picture, CELLS - 1);
    };
    strip.src = `${window.sdbookPlay.here}pack/${film}`;
    this.describe(`Drawn when this page was made: ${this.facts.prompt}`);
    this.label(framesOf(this.facts.steps), this.facts.steps);
  }

  describe(text) {
    this.picture.setAttribute("aria-label", text);
  }

  label(frames, steps) {
    this.labels.forEach((label, k) => {
      label.textContent = k < frames.length ? `${frames[k]}` : "";
    });
    this.steps.output.value = steps;
  }

  // Words to choose from ------------------------------------------------------------

  chips() {
    const {things, colours, relations, places} = this.world;
    const links = ["and", ...Object.values(relations).map(([plain]) => plain)];
    const swatch = (css) => make("i", {class: "swatch", style: `background: ${css}`});
    const icon = (name) => {
      const holder = make("i", {class: "icon", "aria-hidden": "true"});
      holder.innerHTML = this.facts.icons[name]; // of our own making
      return holder;
    };
    this.buttons = [];
    const row = (kind, label, entries) => {
      const buttons = entries.map(([value, text, ...mark]) => {
        const button = make("button", {type: "button", class: "chip",
          "aria-pressed": "false", onclick: () => this.choose(kind, value)}, ...mark, text);
        this.buttons.push({button, kind, value});
        return button;
      });
      oneStop(buttons);
      return make("div", {class: "row", role: "toolbar", "aria-label": label},
        make("span", {class: "name", "aria-hidden": "true"}, label),
        make("div", {class: "chips"}, ...buttons));
    };
    const surprise = make("button", {type: "button", class: "chip surprise",
      onclick: () => this.surprise()}, "surprise me");
    const rows = make("div", {class: "words"},
      row("count", "number", [[1, "one"], [2, "two"], [3, "three"]]),
      row("colour", "colour", Object.entries(colours).map(
        ([name, css]) => [name, name, swatch(css)])),
      row("thing", "thing", Object.keys(things).map((name) => [name, name, icon(name)])),
      row("relation", "where", links.map((name) => [name, name])),
      row("place", "ground", Object.entries(places).map(
        ([name, text]) => [text, text, swatch(this.facts.grounds[name])])));
    rows.firstChild.lastChild.append(surprise);
    return rows;
  }

  // Look at the prompt again: which thing the chips are about, which words are strange.
  reread() {
    const text = this.prompt.value, request = read(text, this.world);
    this.request = request;
    if (request) {
      const caret = this.prompt.selectionStart ?? text.length;
      const {ends} = say(request, this.world);
      this.at = request.groups.length > 1 && caret > ends[0] ? 1 : 0;
    }
    const group = request?.groups[this.at] ?? {};
    for (const {button, kind, value} of this.buttons) {
      const now = kind === "relation" || kind === "place" ? request?.[kind] : group[kind];
      button.setAttribute("aria-pressed", String(now === value));
    }
    this.root.style.setProperty("--ink", this.world.colours[group.colour] ?? "");
    const hint = this.advice(text, request);
    if (this.hint.textContent !== hint) this.hint.textContent = hint;
    this.python();
  }

  advice(text, request) {
    const strange = strangers(text, this.world);
    if (strange.length) {
      const [{word, near}] = strange;
      if (near) return `Did you mean “${near}”? The model has never met “${word}”.`;
      const {things, colours} = this.world;
      return `The model has never met “${word}”: its world has ` +
        `${Object.keys(things).length} things, in ${Object.keys(colours).length} ` +
        "colours. It will draw something all the same.";
    }
    if (request?.groups.length === 2) {
      const {colour, thing} = request.groups[this.at];
      const name = [colour, thing].filter(Boolean).join(" ");
      return `These words are about the ${name}. For the other thing, click on it in ` +
        "the prompt.";
    }
    return "";
  }

  choose(kind, value) {
    const request = this.request ?? invent(this.world);
    const next = take(request, Math.min(this.at, request.groups.length - 1), kind, value,
      this.world);
    if (next.groups.length > request.groups.length) this.at = 1;
    this.write(next);
  }

  surprise() {
    this.at = 0;
    this.write(invent(this.world));
  }

  // Put a request into the prompt, the caret behind the thing that it is about.
  write(request) {
    const {text, ends} = say(request, this.world);
    this.prompt.value = text;
    const caret = ends[Math.min(this.at, ends.length - 1)];
    this.prompt.setSelectionRange(caret, caret);
    this.reread();
    this.later();
  }

  // Numbers -------------------------------------------------------------------------

  controls() {
    const number = (name, label, attributes, text = (value) => value) => {
      const id = `${this.id}-${name}`;
      const output = make("output", {for: id});
      const input = make("input", {id, ...attributes, value: this.facts[name],
        oninput: () => ((output.value = text(input.value)), this.python()),
        onchange: () => this.later()});
      output.value = text(input.value);
      this[name] = {input, output};
      const shown = attributes.type === "range" ? [output] : [];
      return make("div", {class: "number"}, make("label", {for: id}, label), input, ...shown);
    };
    const dice = make("button", {type: "button", class: "chip", onclick: () => {
      this.seed.input.value = Math.floor(Math.random() * 1000);
      this.python();
      this.run();
    }}, "another");
    const seed = number("seed", "seed", {type: "number", min: 0, max: 4294967295});
    seed.append(dice);
    return make("div", {class: "numbers"}, seed,
      number("guidance", "guidance", {type: "range", min: 1, max: 9, step: 0.5},
        (value) => short(+value)),
      number("steps", "steps", {type: "range", min: 4, max: 50}));
  }

  wish() {
    const value = (name) => Number(this[name].input.value);
    return {prompt: this.prompt.value, seed: value("seed") >>> 0,
      guidance: value("guidance"), steps: value("steps")};
  }

  python() {
    const {prompt, seed, guidance, steps} = this.wish();
    const said = [JSON.stringify(prompt), `seed=${seed}`];
    if (guidance !== 3) said.push(`guidance_scale=${guidance}`); // as the package has it
    if (steps !== 25) said.push(`num_inference_steps=${steps}`);
    this.code.textContent = `pipe(${said.join(", ")})`;
  }

  // Drawing -------------------------------------------------------------------------

  // After a change: by itself once the model is here, but not at every touch.
  later() {
    clearTimeout(this.timer);
    if (engineOf(this.facts).ready) this.timer = setTimeout(() => this.run(), 300);
  }

  tell(text) {
    this.status.textContent = text;
  }

  doing(share, text) {
    this.bar.value = share;
    this.count.textContent = text;
  }

  async run() {
    clearTimeout(this.timer);
    const engine = engineOf(this.facts), turn = ++this.busy;
    this.root.classList.add("busy");
    try {
      if (!engine.ready) {
        this.tell(`Loading the model, ${short(engine.bytes / 1e6, 0)} MB …`);
        this.go.disabled = true;
        await engine.load((share) => this.doing(share, share < 1
          ? `${short(share * engine.bytes / 1e6)} MB` : "getting ready"));
      }
      this.go.disabled = false;
      if (turn === this.busy) await this.paint(engine, turn);
    } catch (error) {
      this.go.disabled = false;
      if (turn !== this.busy) return;
      this.tell(`The model could not be started here (${error.message}). The picture ` +
        "below was drawn when this page was made; “Draw” tries again.");
      this.doing(0, "");
    }
    if (turn === this.busy) this.root.classList.remove("busy");
  }

  async paint(engine, turn) {
    engine.stop();
    const wish = this.wish(), frames = framesOf(wish.steps), quiet = still();
    this.tell("Drawing …");
    this.verdict.replaceChildren();
    this.label(frames, wish.steps);
    if (!quiet) for (const canvas of this.film) clear(canvas);
    const kept = [];
    const drawn = await engine.call("draw", {...wish, frames}, (event) => {
      if (turn !== this.busy) return;
      this.doing(event.step / event.steps, `step ${event.step} of ${event.steps}`);
      if (!event.picture) return;
      kept.push(event.picture);
      if (quiet) return;
      show(this.film[kept.length - 1], event.picture);
      show(this.picture, event.picture);
    });
    if (drawn === null || turn !== this.busy) return;
    kept.push(drawn.picture);
    this.film.forEach((canvas, k) => (kept[k] ? show(canvas, kept[k]) : clear(canvas)));
    show(this.picture, drawn.picture);
    this.describe(`Drawn here, now: ${wish.prompt || "nothing in particular"}`);
    this.doing(1, "");
    this.tell(`Drawn on your machine in ${short(drawn.seconds)} seconds.`);
    this.judge(drawn.seen, read(wish.prompt, this.world));
  }

  // What the judge of chapter 11 sees, and whether it was asked for.
  judge(seen, request) {
    const right = request && satisfies(seen, request, this.world);
    const end = !request ? "" : right ? " Right!" : " That is not what you asked for.";
    this.verdict.dataset.right = String(Boolean(right));
    this.verdict.replaceChildren(make("b", {}, "The judge sees "),
      `${tell(seen, this.world)}.${end}`);
  }
}

function clear(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}
