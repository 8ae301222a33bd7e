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

// A row of buttons as one stop of the Tab key; the arrow keys go along it.
export function oneStop(buttons) {
  const stopAt = (button) => {
    for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
  };
  for (const [k, button] of buttons.entries()) {
    button.addEventListener("focus", () => stopAt(button));
    button.addEventListener("keydown", (event) => {
      const n = buttons.length;
      const next = {ArrowRight: (k + 1) % n, ArrowLeft: (k + n - 1) % n, Home: 0,
        End: n - 1}[event.key];
      if (next === undefined) return;
      event.preventDefault();
      buttons[next].focus();
    });
  }
  stopAt(buttons[0]);
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
