// Small helpers for the live parts of a page.

// An element: make("button", {class: "chip", onclick: …}, "red", otherElement).
export function make(name, attributes = {}, ...inside) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...inside);
  return element;
}

// Bytes of red, green, blue and opacity onto a canvas of the same size.
export function show(canvas, bytes) {
  const picture = new ImageData(bytes, canvas.width, canvas.height);
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Whether the reader asked for less movement.
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// A number for people: 16.2.
export const short = (number, digits = 1) => number.toFixed(digits);
