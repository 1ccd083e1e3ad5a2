// A picture that is no link opens in full, above the page: the SVG where there is one. A click or Escape closes it.
const shown = document.body.appendChild(document.createElement("dialog"));
shown.className = "picture";
shown.addEventListener("click", () => shown.close());
shown.addEventListener("keydown", (event) => event.key === "Escape" && shown.close()); // Sphinx takes it elsewhere
for (const picture of document.querySelectorAll("article img")) {
  if (picture.closest("a")) continue;
  const figure = picture.className.match(/figure-(\S+)/)?.[1] ?? picture.src.match(/_images\/(\d\d-.+)\.png$/)?.[1];
  picture.classList.add("opens");
  picture.addEventListener("click", () => {
    const whole = new Image();
    whole.alt = picture.alt;
    whole.src = figure ? `${document.documentElement.dataset.content_root}_static/${figure}.svg` : picture.src;
    shown.replaceChildren(whole);
    shown.showModal();
  });
}
