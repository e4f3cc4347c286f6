// Runs beside a page in a frame: opens what is folded, and lists what a reader would stumble over.
const page = frame.contentDocument, view = frame.contentWindow, width = view.innerWidth, found = [];
for (const each of page.querySelectorAll("details")) each.open = true;
const name = e => (e.tagName + " " + e.textContent.trim().replace(/\s+/g, " ")).slice(0, 60);
if (page.documentElement.scrollWidth > width) found.push("the page is " + page.documentElement.scrollWidth + " wide");
const scrolls = e => e.closest(".scroll") && !e.matches(".scroll");
for (const e of page.body.querySelectorAll("*")) {
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height) continue;
  if (!scrolls(e) && (box.right > width + 0.5 || box.left < -0.5)) found.push("out of the page: " + name(e));
  if (e.matches("td, th, dt, dd, p, li, h1, h2, pre, figcaption") && e.scrollWidth > e.clientWidth + 1)
    found.push("wider than its box: " + name(e));
}
const light = colour => {
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = colour.match(/[\d.]+/g).map(c => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(view.getComputedStyle(page.body).backgroundColor);
let texts = 0;
for (const svg of page.querySelectorAll("svg")) {
  const all = [...svg.querySelectorAll("text")].filter(e => e.textContent.trim());
  const boxes = all.map(e => e.getBoundingClientRect());
  const whole = svg.getBoundingClientRect();
  texts += all.length;
  all.forEach((e, i) => {
    const a = boxes[i], ink = light(view.getComputedStyle(e).fill);
    if ((Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) < 4.5) found.push("too faint: " + name(e));
    if (a.left < whole.left - 2 || a.right > whole.right + 2 || a.top < whole.top - 2 || a.bottom > whole.bottom + 2)
      found.push("out of its picture: " + name(e));
    if (parseFloat(view.getComputedStyle(e).fontSize) * whole.width / svg.viewBox.baseVal.width < 8.5)
      found.push("too small: " + name(e));
    for (let j = 0; j < i; j++) {
      const b = boxes[j];
      const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (w > 1 && h > 3) found.push("on one another: " + name(all[j]) + " and " + name(e));
    }
  });
}
for (const mark of page.querySelectorAll("svg [clip-path] use, svg use[clip-path]")) {
  const svg = mark.ownerSVGElement, by = mark.closest("[clip-path]").getAttribute("clip-path");
  const clip = svg.querySelector(by.slice(4, -1).replace(/"/g, "") + " rect");
  if (!clip) continue;
  const whole = svg.getBoundingClientRect(), scale = whole.width / svg.viewBox.baseVal.width;
  const left = whole.left + scale * clip.x.baseVal.value, top = whole.top + scale * clip.y.baseVal.value;
  const right = left + scale * clip.width.baseVal.value, bottom = top + scale * clip.height.baseVal.value;
  const box = mark.getBoundingClientRect();
  if (box.left < left - 0.5 || box.right > right + 0.5 || box.top < top - 0.5 || box.bottom > bottom + 0.5)
    found.push("a mark is cut in the picture " + svg.dataset.picture);
}
const dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
result.textContent = JSON.stringify({width, height: page.documentElement.scrollHeight, dark, paper, texts, found});
