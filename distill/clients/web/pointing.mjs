// Mouse, finger and keys on the picture, as what they mean: `add`, `remove`, `box`, `hover`, `leave`, `draw`, `cross`.

const SLACK = 5; // CSS pixels within which a press is a click
const LONG = 500; // milliseconds after which a finger's press removes
const STEP = 12; // CSS pixels that an arrow key moves the crosshair; with Shift 2

// Listens on the top canvas of a view. `act` has a function for each of those; `tool()` is "add", "remove" or "box",
// `isOpen()` whether there is a picture.
export function listen(canvas, view, act, tool, isOpen) {
  byPointer(canvas, view, act, tool, isOpen);
  byKeys(canvas, view, act, tool, isOpen);
}

function byPointer(canvas, view, act, tool, isOpen) {
  let press = null;
  let timer = 0;

  const end = () => {
    clearTimeout(timer);
    press = null;
    act.draw(null);
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (!isOpen() || (event.button !== 0 && event.button !== 2)) return;
    press = { at: view.locate(event), x: event.clientX, y: event.clientY, moved: false, touch: event.pointerType === "touch" };
    press.off = event.button === 2 || event.shiftKey || tool() === "remove";
    if (press.touch) {
      timer = setTimeout(() => {
        if (press && !press.moved && tool() !== "box") act.remove(...press.at);
        if (press && tool() !== "box") end();
      }, LONG);
    }
    canvas.setPointerCapture(event.pointerId);
  });

  canvas.addEventListener("pointermove", (event) => {
    if (!isOpen()) return;
    if (!press) {
      if (event.pointerType !== "touch") act.hover(...view.locate(event));
      return;
    }
    if (Math.hypot(event.clientX - press.x, event.clientY - press.y) > SLACK) press.moved = true;
    if (press.moved && !press.off && (!press.touch || tool() === "box")) act.draw([...press.at, ...view.locate(event)]);
  });

  canvas.addEventListener("pointerup", (event) => {
    if (!press) return;
    const { at, moved, off, touch } = press;
    end();
    if (!moved && tool() !== "box") (off ? act.remove : act.add)(...at);
    else if (moved && !off && (!touch || tool() === "box")) act.box([...at, ...view.locate(event)]);
  });

  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => !press && act.leave());
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
}

function byKeys(canvas, view, act, tool, isOpen) {
  let at = null;
  let corner = null;

  const show = () => {
    act.cross(at);
    act.draw(corner && at ? [...corner, ...at] : null);
  };

  const finish = () => {
    act.box([...corner, ...at]);
    corner = null;
  };

  canvas.addEventListener("keydown", (event) => {
    if (!isOpen() || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    at ??= [view.width / 2, view.height / 2];
    if (event.key in arrows) {
      const step = (event.shiftKey ? 2 : STEP) * view.scale;
      const [x, y] = arrows[event.key];
      at = [Math.min(Math.max(at[0] + x * step, 0), view.width - 1), Math.min(Math.max(at[1] + y * step, 0), view.height - 1)];
      if (!corner) act.hover(...at);
    } else if (event.key === "Enter" || event.key === " ") {
      if (corner) finish();
      else if (tool() === "box") corner = at;
      else (event.shiftKey || tool() === "remove" ? act.remove : act.add)(...at);
    } else if (event.key.toLowerCase() === "b") {
      if (corner) finish();
      else corner = at;
    } else if (event.key === "Escape" && corner) {
      corner = null;
    } else return;
    event.preventDefault();
    event.stopPropagation();
    show();
  });

  canvas.addEventListener("focus", () => {
    if (!isOpen() || !canvas.matches(":focus-visible")) return;
    at ??= [view.width / 2, view.height / 2];
    show();
  });

  canvas.addEventListener("blur", () => {
    corner = null;
    act.cross(null);
    act.draw(null);
    act.leave();
  });

  canvas.addEventListener("pointerdown", () => {
    at = corner = null;
    act.cross(null);
  });

  canvas.addEventListener("newpicture", () => {
    at = corner = null;
  });
}
