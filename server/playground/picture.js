// The kept visual tokens, lit on the picture.

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent?.append(node);
  return node;
}

// Light `owners` on a picture: for each visual token, row by row, the kept one that stands for it. Returns nothing; the element
// is a slider over the kept tokens, and `say` gets a sentence about the one that is pointed at.
export function light(element, source, centerCrop, owners, scores, say) {
  const side = Math.round(Math.sqrt(owners.length));
  const [columns, rows] = side * side === owners.length ? [side, side] : [owners.length, 1];
  const groups = new Map();
  owners.forEach((owner, token) => groups.set(owner, [...(groups.get(owner) ?? []), token]));
  const kept = [...groups.keys()].sort((a, b) => a - b);
  const all = kept.length === owners.length;
  const mean = scores && scores.reduce((sum, score) => sum + Math.exp(score), 0) / scores.length;

  const image = new Image();
  image.alt = "";
  image.src = source;
  const overlay = svg("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  image.onload = () => {
    image.classList.toggle("small", image.naturalWidth < 200);
    if (centerCrop) fitToCrop(overlay, image);
  };
  element.replaceChildren(image, overlay);

  const at = (token) => ({ x: token % columns, y: Math.floor(token / columns) });
  const cells = owners.map((owner, token) => {
    const cell = { ...at(token), width: 1, height: 1 };
    return svg("rect", { ...cell, class: owner === token ? "hidden-cell" : "gone" }, overlay);
  });
  if (!all) {
    for (const token of kept) {
      const { x, y } = at(token);
      // Area grows with the number of tokens, up to a patch and a half across.
      const r = Math.min(0.75, 0.16 + 0.09 * Math.sqrt(groups.get(token).length - 1));
      svg("circle", { cx: x + 0.5, cy: y + 0.5, r, class: "dot", "pointer-events": "none" }, overlay);
    }
  }
  const outline = svg("path", { class: "group", "pointer-events": "none" }, overlay);

  let current = 0;
  const show = (token) => {
    current = kept.indexOf(token);
    outline.setAttribute("d", groups.get(token).map((t) => `M${at(t).x} ${at(t).y}h1v1h-1z`).join(""));
    const { x, y } = at(token);
    const size = groups.get(token).length;
    const what = size > 1 ? `stands for ${size} visual tokens` : "stands for itself";
    const score = scores ? `; foreseen attention ${(Math.exp(scores[token]) / mean).toFixed(1)} × the average` : "";
    const text = `Row ${y + 1}, column ${x + 1} ${what}${score}.`;
    say(text);
    element.setAttribute("aria-valuenow", current + 1);
    element.setAttribute("aria-valuetext", text);
  };
  cells.forEach((cell, token) => cell.addEventListener("pointerenter", () => show(owners[token])));
  element.onpointerleave = () => outline.removeAttribute("d");
  element.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(kept[Math.min(kept.length - 1, Math.max(0, current + step))]);
  };
  element.setAttribute("aria-valuemin", 1);
  element.setAttribute("aria-valuemax", kept.length);
  element.setAttribute("aria-valuenow", 1);
  element.setAttribute("aria-valuetext", `${kept.length} of ${owners.length} visual tokens are kept`);
  say(all ? "All visual tokens are kept." : "Point at a token, or use the arrow keys, to see what it stands for.");
}

// The model sees only the middle square of a picture that its processor crops.
function fitToCrop(overlay, image) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const shorter = Math.min(width, height);
  overlay.style.inset = "auto";
  overlay.style.width = `${(100 * shorter) / width}%`;
  overlay.style.height = `${(100 * shorter) / height}%`;
  overlay.style.left = `${(50 * (width - shorter)) / width}%`;
  overlay.style.top = `${(50 * (height - shorter)) / height}%`;
}
