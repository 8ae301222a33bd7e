// The judge of chapter 11: it reads a picture of the small world by drawing it again.
//
// `facts` is judge.json: the five grounds as columns of colours, and every thing in every
// colour and size, drawn once, with the middle of what can be seen of it.

const WINDOW = 32; // pixels: the largest thing, 24, with room around it
const CONTRAST = 36, SMALLEST = 12, TOLERANCE = 0.15;

export class Judge {
  constructor(facts) {
    this.side = facts.side;
    this.grounds = facts.grounds;
    const bytes = Uint8Array.from(atob(facts.sprites), (c) => c.charCodeAt(0));
    let start = 0;
    this.templates = facts.things.map(({shape, colour, size, side, middle}) => {
      const sprite = bytes.subarray(start, (start += 4 * side * side));
      const drawn = new Float32Array(4 * WINDOW * WINDOW);
      const [top, left] = middle.map((m) => WINDOW / 2 - m);
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          for (let c = 0; c < 4; c++) {
            const there = 4 * ((top + y) * WINDOW + left + x) + c;
            drawn[there] = sprite[4 * (y * side + x) + c] / 255;
          }
        }
      }
      let area = 0;
      for (let k = 3; k < drawn.length; k += 4) area += drawn[k];
      const offset = middle.map((m) => side / 2 - m);
      return {name: {shape, colour, size}, drawn, area, offset};
    });
  }

  // How far each pixel is from an empty ground's, in colour values.
  difference(picture, ground) {
    const n = this.side, column = this.grounds[ground];
    return Float32Array.from({length: n * n}, (_, i) => {
      const empty = column[Math.floor(i / n)];
      return Math.hypot(...empty.map((value, c) => picture[4 * i + c] - value));
    });
  }

  // The ground whose median difference from the picture is smallest.
  findGround(picture) {
    const median = (name) => {
      const sorted = this.difference(picture, name).sort();
      return (sorted[sorted.length / 2 - 1] + sorted[sorted.length / 2]) / 2;
    };
    const names = Object.keys(this.grounds), medians = names.map(median);
    return names[medians.indexOf(Math.min(...medians))];
  }

  // Lists of pixels that hang together, corners included, and stand out from the ground.
  findBlobs(picture, ground) {
    const n = this.side;
    const out = this.difference(picture, ground).map((d) => Number(d > CONTRAST));
    const blobs = [];
    for (let first = 0; first < n * n; first++) {
      if (!out[first]) continue;
      const blob = [first];
      out[first] = 0;
      for (let k = 0; k < blob.length; k++) {
        for (const next of neighbours(blob[k], n, true)) {
          if (out[next]) {
            out[next] = 0;
            blob.push(next);
          }
        }
      }
      if (blob.length >= SMALLEST) blobs.push(blob);
    }
    return blobs;
  }

  // What is seen near a blob, and the empty ground, in a window that starts at (top,
  // left); outside of the picture both are black.
  cut(picture, ground, near, top, left) {
    const n = this.side, column = this.grounds[ground];
    const seen = new Float32Array(3 * WINDOW * WINDOW), behind = seen.slice();
    for (let y = 0; y < WINDOW; y++) {
      for (let x = 0; x < WINDOW; x++) {
        const [row, place] = [top + y, left + x];
        if (row < 0 || row >= n || place < 0 || place >= n) continue;
        for (let c = 0; c < 3; c++) {
          const there = 3 * (y * WINDOW + x) + c, pixel = row * n + place;
          behind[there] = column[row][c] / 255;
          seen[there] = near.has(pixel) ? picture[4 * pixel + c] / 255 : behind[there];
        }
      }
    }
    return {seen, behind};
  }

  // The thing whose drawing is closest to a blob, or null if none is close.
  nameBlob(picture, ground, blob) {
    const n = this.side;
    const box = [blob.map((i) => Math.floor(i / n)), blob.map((i) => i % n)].map(
      (places) => [Math.min(...places), Math.max(...places) + 1]);
    if (box.some(([start, stop]) => stop - start > WINDOW - 2)) return null;
    const middle = box.map(([start, stop]) => Math.floor((start + stop) / 2));
    let near = new Set(blob);
    for (let k = 0; k < 2; k++) {
      near = new Set([...near, ...[...near].flatMap((i) => neighbours(i, n, false))]);
    }
    const at = (dy, dx) => this.cut(picture, ground, near,
      middle[0] + dy - WINDOW / 2, middle[1] + dx - WINDOW / 2);
    const here = at(0, 0);
    const errors = this.templates.map((template) => [error(template, here), template]);
    const likely = errors.sort(([a], [b]) => a - b).slice(0, 6).map(([, t]) => t);
    let best = {error: Infinity};
    for (const dy of [-1, 0, 1]) {
      for (const dx of [-1, 0, 1]) {
        const pair = at(dy, dx);
        for (const template of likely) {
          const found = error(template, pair);
          if (found < best.error) best = {error: found, template, step: [dy, dx]};
        }
      }
    }
    if (best.error > TOLERANCE) return null;
    const [y, x] = middle.map((m, k) => (m + best.step[k] + best.template.offset[k]) / n);
    return {...best.template.name, x, y};
  }

  // {things, ground, unknown}: what stands where in a picture, given as bytes of red,
  // green, blue and opacity; `unknown` counts what has no name.
  read(picture) {
    const ground = this.findGround(picture);
    const named = this.findBlobs(picture, ground).map(
      (blob) => this.nameBlob(picture, ground, blob));
    const things = named.filter(Boolean);
    return {things, ground, unknown: named.length - things.length};
  }
}

// The mean difference over a thing's area between what is seen and the thing redrawn.
function error({drawn, area}, {seen, behind}) {
  let sum = 0;
  for (let k = 0; k < WINDOW * WINDOW; k++) {
    const alpha = drawn[4 * k + 3];
    for (let c = 0; c < 3; c++) {
      const ground = behind[3 * k + c];
      sum += Math.abs(ground + alpha * (drawn[4 * k + c] - ground) - seen[3 * k + c]);
    }
  }
  return sum / (3 * area);
}

// The pixels beside a pixel of an n × n picture; `corners`: also those that only touch.
function neighbours(i, n, corners) {
  const y = Math.floor(i / n), x = i % n, found = [];
  for (const [dy, dx] of [[-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0],
    [1, 1]]) {
    const inside = y + dy >= 0 && y + dy < n && x + dx >= 0 && x + dx < n;
    if (inside && (corners || dy === 0 || dx === 0)) found.push((y + dy) * n + x + dx);
  }
  return found;
}

// Strictly: just the things asked for, each as said, standing as said. `request` is one
// of words.js; what it does not say may be anything.
export function satisfies(verdict, request, world) {
  const {groups, relation, place} = request;
  const count = groups.reduce((sum, group) => sum + group.count, 0);
  if (verdict.unknown || verdict.things.length !== count) return false;
  if (place && world.places[verdict.ground] !== place) return false;
  const centres = [];
  for (const {count: wanted, thing, colour, size} of groups) {
    const members = verdict.things.filter((seen) => seen.shape === thing &&
      [seen.colour, ""].includes(colour) && [seen.size, ""].includes(size));
    if (members.length !== wanted) return false;
    const mean = (axis) => members.reduce((sum, m) => sum + m[axis], 0) / wanted;
    centres.push([mean("x"), mean("y")]);
  }
  const names = Object.keys(world.relations);
  const name = names.find((key) => world.relations[key].includes(relation));
  if (!name) return true;
  const [x, y] = centres[0].map((value, axis) => value - centres[1][axis]);
  const [aside, amount] = {left: [y, -x], right: [y, x], above: [x, -y], below: [x, y]}[name];
  return amount > Math.abs(aside);
}

// What the judge sees, in words: "a red star and two blue houses, on paper".
export function tell({things, ground, unknown}, world) {
  const kinds = new Map();
  for (const {colour, shape} of things) {
    const kind = `${colour} ${shape}`;
    kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
  }
  const numbers = ["no", "a", "two", "three", "four", "five"];
  const named = [...kinds].map(([kind, count]) => {
    const [colour, shape] = kind.split(" ");
    if (count === 1) return `${/^[aeiou]/.test(kind) ? "an" : "a"} ${kind}`;
    return `${numbers[count] ?? count} ${colour} ${world.things[shape]}`;
  });
  if (unknown) named.push(unknown === 1 ? "something" : `${numbers[unknown] ?? unknown} things`);
  if (unknown) named[named.length - 1] += " that I cannot name";
  const all = named.length > 1
    ? `${named.slice(0, -1).join(", ")} and ${named.at(-1)}` : named[0] ?? "nothing";
  return `${all}, ${world.places[ground]}`;
}
