// Brings the live parts of a page to life: each <div class="play" data-play="draw"> is
// given to the function that draw.js exports. Until then, and without JavaScript, what
// stands inside is the page.
//
// Over http the modules are loaded as they are. A page that was opened as a file may
// load classic scripts only: there the modules come as text, in one script, and are
// made into blobs. Both ways lead to the same code.
(() => {
  const here = document.currentScript.src.replace(/[^/]*$/, "");

  // Texts of modules to addresses of blobs, each after those that it imports.
  function link(texts) {
    const urls = {};
    const address = (name) => {
      if (!(name in urls)) {
        const text = texts[name].replace(
          /from "\.\/([\w./-]+)"/g, (_, other) => `from "${address(other)}"`);
        urls[name] = URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
      }
      return urls[name];
    };
    return address;
  }

  const play = (window.sdbookPlay = {
    here,
    link,
    kept: {}, // what the scripts of the folder pack/ bring
    keep: (more) => Object.assign(play.kept, more),
    asFile: location.protocol === "file:",
    script: (name) =>
      new Promise((done, fail) => {
        const tag = document.createElement("script");
        tag.onload = () => done(tag.remove());
        tag.onerror = () => fail(new Error(`${name} is missing`));
        tag.src = here + name;
        document.head.append(tag);
      }),
  });

  async function start() {
    const boxes = [...document.querySelectorAll("div.play[data-play]")];
    if (play.asFile && boxes.length) await play.script("pack/code.js");
    const address = play.asFile ? link(play.kept) : (name) => here + name;
    for (const box of boxes) {
      const facts = JSON.parse(box.querySelector("script.play-facts").textContent);
      const {default: enliven} = await import(address(`${box.dataset.play}.js`));
      enliven(box, facts);
    }
  }

  const begin = () => start().catch((error) => console.info("the page stays still:", error));
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", begin);
  else begin();
})();
