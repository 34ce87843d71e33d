// Buttons, keys, and the ways in which a picture comes.

const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

const KEYS = { o: "open", x: "example", z: "undo", y: "redo", c: "clear", e: "everything", s: "png", r: "rle" };
const TOOLS = { 1: "add", 2: "remove", 3: "box" };

// What a click or tap does: "add", "remove" or "box".
export const tool = () => document.body.dataset.tool;

function choose(which) {
  document.body.dataset.tool = which;
  document.querySelector(`input[name=tool][value=${which}]`).checked = true;
}

// `run(action)` does what a button says; `open(file, name)` takes a picture; `stop()` ends what takes long.
export function connect({ run, open, complain, refresh, stop }) {
  for (const button of all("[data-do]")) button.addEventListener("click", () => run(button.dataset.do));
  for (const input of all("input[name=tool]")) input.addEventListener("change", () => choose(input.value));
  $("cancel").addEventListener("click", stop);
  $("help").addEventListener("click", () => $("keys").showModal());
  document.addEventListener("keydown", (event) => onKey(event, run, stop));
  new ResizeObserver(refresh).observe($("frame"));
  takePictures(open, complain);
}

function onKey(event, run, stop) {
  if ($("keys").open || event.altKey || event.target.matches("select, input:not([type=radio])")) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    if (key !== "z" && key !== "y") return;
    run(key === "y" || event.shiftKey ? "redo" : "undo");
  } else if (key === "z" && event.shiftKey) run("redo");
  else if (key in KEYS) run(KEYS[key]);
  else if (key in TOOLS) choose(TOOLS[key]);
  else if (key === "?") $("keys").showModal();
  else if (key === "p") $("marks").focus({ focusVisible: true });
  else if (key === "escape") stop();
  else return;
  event.preventDefault();
}

// Chosen, pasted or dropped.
function takePictures(open, complain) {
  const take = (file) => file && open(file, file.name);
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    take(file);
    $("file").value = "";
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) take(file);
    else complain("There is no picture on the clipboard.");
  });
  const over = (event, is) => {
    event.preventDefault();
    $("stage").classList.toggle("over", is);
  };
  document.addEventListener("dragover", (event) => over(event, true));
  document.addEventListener("dragleave", (event) => event.relatedTarget || over(event, false));
  document.addEventListener("drop", (event) => {
    over(event, false);
    take(event.dataTransfer.files[0]);
  });
}
