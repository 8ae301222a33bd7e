// A formula wider than the page can be scrolled with the keyboard, too.
(() => {
  const mark = () => {
    for (const box of document.querySelectorAll("div.math, mjx-container[display]")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  window.addEventListener("load", () => window.MathJax?.startup?.promise?.then(mark));
  window.addEventListener("resize", mark);
})();

// On paper every answer to "Do you follow?" is open; on the screen, those that were.
(() => {
  const shut = "div.follow details:not([open])";
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll(shut)];
    opened.forEach((one) => (one.open = true));
  });
  window.addEventListener("afterprint", () => {
    opened.forEach((one) => (one.open = false));
  });
})();
