// Texts to token ids, as chapter 6 does it: CLIP's byte-pair encoding.

// One printable character for each of the 256 bytes, in the order of GPT-2 and CLIP.
function byteSymbols() {
  const symbols = new Array(256);
  let spare = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte < 127) || (byte >= 161 && byte !== 173);
    symbols[byte] = String.fromCodePoint(printable ? byte : spare++);
  }
  return symbols;
}

const SYMBOLS = byteSymbols();

// Endings such as 's, runs of letters, single digits, runs of anything else.
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;

export class Tokenizer {
  // `facts` is the part `tokenizer` of model.json.
  constructor(facts) {
    Object.assign(this, facts);
    this.ranks = new Map(facts.merges.map((pair, rank) => [pair.join(" "), rank]));
    this.texts = new Map(Object.entries({...facts.vocab, ...facts.special}).map(
      ([text, id]) => [id, text]));
    const names = Object.keys(facts.special).sort((a, b) => b.length - a.length);
    const escaped = names.map((name) => name.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.specials = new RegExp(`(${escaped.join("|")})`);
  }

  // A word as pieces: while there are neighbours that were learned as a pair, the pair
  // that was learned first is joined, everywhere.
  pieces(word) {
    let parts = Array.from(new TextEncoder().encode(word), (byte) => SYMBOLS[byte]);
    parts.push(parts.pop() + "</w>");
    for (;;) {
      let best = Infinity, pair = null;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, pair] = [rank, [parts[i], parts[i + 1]]];
      }
      if (pair === null) return parts;
      const joined = [];
      for (let i = 0; i < parts.length; i++) {
        const meets = parts[i] === pair[0] && parts[i + 1] === pair[1];
        joined.push(meets ? parts[i] + parts[++i] : parts[i]);
      }
      parts = joined;
    }
  }

  // All ids of a text, from start to end, however many they are.
  ids(text) {
    const found = [this.start];
    // Before anything is made lower case: <|ENDOFTEXT|> is no special token.
    for (const part of text.split(this.specials)) {
      if (part in this.special) {
        found.push(this.special[part]);
        continue;
      }
      // Letter by letter, since JavaScript would write a Greek word's last sigma
      // otherwise, and the tokenizers of Python do not.
      const small = Array.from(part.normalize("NFC"), (c) => c.toLowerCase()).join("");
      for (const [word] of small.matchAll(WORDS)) {
        for (const piece of this.pieces(word)) found.push(this.vocab[piece]);
      }
    }
    return [...found, this.end];
  }

  // {ids: exactly `length` ids, cut or filled up; cut: how many did not fit}.
  encode(text) {
    const all = this.ids(text);
    const cut = Math.max(0, all.length - this.length);
    const ids = cut ? [...all.slice(0, this.length - 1), this.end] : all;
    while (ids.length < this.length) ids.push(this.padding);
    return {ids, cut};
  }

  // What stands behind ids, such as "red</w>".
  tokens(ids) {
    return ids.map((id) => this.texts.get(id));
  }
}
