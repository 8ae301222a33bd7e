// The language of the small world, as chapter 4 defines it: reading, saying, inventing.
// `world` is the part of that name in model.json.
//
// A request is {opening, groups: [{count, size, colour, thing}], relation, place}; what is
// not said is "". `relation` is one of the words, such as "left of", or "and".

const any = (words) => `(?:${[...words].sort((a, b) => b.length - a.length).join("|")})`;
const pick = (list, random) => list[Math.floor(random() * list.length)];

// A text as a request, or null if it is not a sentence of this world.
export function read(text, world) {
  const links = ["and", ...Object.values(world.relations).flat()];
  const group = `(${any(Object.keys(world.counts))})(?: (${any(world.sizes)}))?` +
    `(?: (${any(Object.keys(world.colours))}))? (${any(Object.keys(world.things))})s?`;
  const sentence = new RegExp(`^(${world.opening} )?${group}(?: (${any(links)}) ${group})?` +
    `(?: (${any(Object.values(world.places))}))?$`);
  const found = text.toLowerCase().trim().replace(/\s+/g, " ").match(sentence);
  if (!found) return null;
  const [opening, first, link, second, place] = [
    found[1], found.slice(2, 6), found[6], found.slice(7, 11), found[11]];
  const groupOf = ([count, size = "", colour = "", thing]) =>
    ({count: world.counts[count], size, colour, thing});
  const groups = [groupOf(first), ...(link ? [groupOf(second)] : [])];
  return {opening: opening ? world.opening : "", groups, relation: link ?? "",
          place: place ?? ""};
}

// {text, ends}: a request in words, and where each of its groups ends.
export function say(request, world) {
  const words = {1: "a", 2: "two", 3: "three"};
  const name = ({count, size, colour, thing}) => {
    const named = count === 1 ? thing : world.things[thing];
    const rest = [size, colour, named].filter(Boolean).join(" ");
    return `${count === 1 && /^[aeiou]/.test(rest) ? "an" : words[count]} ${rest}`;
  };
  let text = request.opening ? `${request.opening} ` : "";
  const ends = request.groups.map((group, k) => {
    text += (k ? ` ${request.relation} ` : "") + name(group);
    return text.length;
  });
  return {text: text + (request.place ? ` ${request.place}` : ""), ends};
}

// The request after somebody took the word `value` of a kind: it replaces what was said
// of the thing number `at`, and taken again it goes.
export function take(request, at, kind, value, world, random = Math.random) {
  const groups = request.groups.map((group) => ({...group}));
  const group = groups[at];
  const next = {...request, groups};
  if (kind === "place") next.place = request.place === value ? "" : value;
  else if (kind === "relation") {
    next.relation = request.relation === value ? "" : value;
    if (!next.relation) groups.splice(1);
    else if (groups.length < 2) groups.push(another(groups[0], world, random));
  } else if (kind === "colour") group.colour = group.colour === value ? "" : value;
  else group[kind] = value;
  return next;
}

// Some other thing, of a colour in which it was shown in training.
function another({thing: not = ""}, world, random) {
  const held = new Set(world.held_out.map((pair) => pair.join(" ")));
  for (;;) {
    const thing = pick(Object.keys(world.things), random);
    const colour = pick(Object.keys(world.colours), random);
    if (thing !== not && !held.has(`${thing} ${colour}`)) {
      return {count: 1, size: "", colour, thing};
    }
  }
}

// A request that nobody made: one thing, some equal things, or two.
export function invent(world, random = Math.random) {
  const first = another({}, world, random), kind = random();
  const place = random() < 0.4 ? pick(Object.values(world.places), random) : "";
  if (kind < 0.35) return {opening: "", groups: [first], relation: "", place};
  if (kind < 0.6) {
    const count = random() < 0.5 ? 2 : 3;
    return {opening: "", groups: [{...first, count}], relation: "", place};
  }
  const links = ["and", ...Object.values(world.relations).map(([plain]) => plain)];
  const groups = [first, another(first, world, random)];
  return {opening: "", groups, relation: pick(links, random), place};
}

// Every word that the model has met in training.
export function known(world) {
  const {counts, sizes, colours, things, relations, places, opening} = world;
  const texts = [...Object.keys(counts), ...sizes, ...Object.keys(colours), "and",
    ...Object.entries(things).flat(), ...Object.values(relations).flat(),
    ...Object.values(places), opening];
  return new Set(texts.flatMap((text) => text.split(" ")));
}

// [{word, near}]: words of a text that the model has never met, and the word that it
// has met that differs by one letter, if there is one.
export function strangers(text, world) {
  const words = known(world);
  const found = text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const strange = [...new Set(found.filter((word) => !words.has(word)))];
  return strange.map((word) => ({
    word, near: [...words].find((other) => other.length > 2 && almost(word, other)) ?? "",
  }));
}

// Whether one letter too many, too few or another makes the difference.
function almost(first, second) {
  const [long, short] = first.length < second.length ? [second, first] : [first, second];
  let k = 0;
  while (k < short.length && long[k] === short[k]) k++;
  return long.slice(k + 1) === short.slice(k) || long.slice(k + 1) === short.slice(k + 1);
}
