// The random numbers of PyTorch on a CPU, so that a seed draws the same picture here.

// MT19937 (Matsumoto and Nishimura, 1998): 624 numbers of 32 bits that are stirred
// together, and read one by one through a filter.
export class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(before, 1812433253) + i;
    }
    this.place = 624;
  }

  stir() {
    const s = this.state;
    for (let i = 0; i < 624; i++) {
      const mixed = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
      s[i] = s[(i + 397) % 624] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
    }
    this.place = 0;
  }

  // A whole number from 0 to 2³² - 1.
  next() {
    if (this.place === 624) this.stir();
    let y = this.state[this.place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  // From [0, 1) in steps of 2⁻²⁴, which is as fine as a float32 can hold.
  uniform() {
    return (this.next() & 0xffffff) / 2 ** 24;
  }

  // From [0, 1) in steps of 2⁻⁵³, of two whole numbers.
  fineUniform() {
    const high = this.next() & 0x1fffff;
    return (high * 2 ** 32 + this.next()) / 2 ** 53;
  }
}

// Two uniform numbers become two normal ones (Box and Muller, 1958): a point at a
// random angle, at the distance that makes its coordinates normal.
function boxMuller(radiusFrom, angleFrom) {
  const radius = Math.sqrt(-2 * Math.log(radiusFrom));
  const angle = 2 * Math.PI * angleFrom;
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
}

// `torch.randn(count, generator=torch.Generator().manual_seed(seed))`.
//
// PyTorch has two ways. From 16 numbers on it fills the row with uniform ones and turns
// them into normal ones by sixteens, the first eight with the last eight; if some are
// left over, the last sixteen are drawn again. Fewer are drawn one by one, more finely.
export function randn(seed, count) {
  const dice = new MersenneTwister(seed);
  const x = new Float32Array(count);
  if (count < 16) {
    for (let i = 0; i < count; i += 2) {
      const angle = dice.fineUniform();
      const pair = boxMuller(1 - dice.fineUniform(), angle);
      x.set(pair.slice(0, count - i), i);
    }
    return x;
  }
  const sixteen = (start) => {
    for (let i = start; i < start + 8; i++) {
      [x[i], x[i + 8]] = boxMuller(1 - x[i], x[i + 8]);
    }
  };
  for (let i = 0; i < count; i++) x[i] = dice.uniform();
  for (let i = 0; i + 16 <= count; i += 16) sixteen(i);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) x[i] = dice.uniform();
    sixteen(count - 16);
  }
  return x;
}
