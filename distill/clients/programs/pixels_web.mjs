// A picture's own numbers in a browser: upright, without its colour profile, its alpha dropped and not blended.

const TILE = 2048; // pixels of a side that are read at a time: canvases and textures have bounds
const OWN = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };

// A file → { width, height, data, bitmap, exact }: RGBA bytes whose A is 255, and the same to be drawn. `exact` is false
// where colours under transparency had to be guessed. Raises an error that people can read where it is no picture.
export async function readPixels(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, OWN);
  } catch {
    throw new Error("That is not a picture that this browser can read.");
  }
  const { width, height } = bitmap;
  const data = new Uint8ClampedArray(4 * width * height);
  read(bitmap, data, fromCanvas());
  if (isOpaque(data)) return { width, height, data, bitmap, exact: true };

  // A canvas keeps colours multiplied by alpha, which loses them; a texture takes them as they are.
  const colours = new Uint8ClampedArray(data.length);
  const exact = read(bitmap, colours, fromTexture());
  if (exact) data.set(colours);
  for (let i = 3; i < data.length; i += 4) data[i] = 255;
  bitmap.close();
  bitmap = await createImageBitmap(new ImageData(data, width, height));
  return { width, height, data, bitmap, exact };
}

function isOpaque(data) {
  for (let i = 3; i < data.length; i += 4) if (data[i] !== 255) return false;
  return true;
}

// Fills `data` tile by tile: `tile(bitmap, x, y, width, height)` gives the RGBA bytes of one, or null where it cannot.
// Returns whether all came.
function read(bitmap, data, tile) {
  for (let y = 0; y < bitmap.height; y += TILE)
    for (let x = 0; x < bitmap.width; x += TILE) {
      const width = Math.min(TILE, bitmap.width - x);
      const height = Math.min(TILE, bitmap.height - y);
      const found = tile(bitmap, x, y, width, height);
      if (!found) return false;
      for (let row = 0; row < height; row++)
        data.set(found.subarray(row * width * 4, (row + 1) * width * 4), ((y + row) * bitmap.width + x) * 4);
    }
  return true;
}

function fromCanvas() {
  const context = new OffscreenCanvas(TILE, TILE).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  return (bitmap, x, y, width, height) => {
    context.clearRect(0, 0, width, height);
    context.drawImage(bitmap, x, y, width, height, 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  };
}

function fromTexture() {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) return () => null;
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  return (bitmap, x, y, width, height) => {
    gl.pixelStorei(gl.UNPACK_SKIP_PIXELS, x);
    gl.pixelStorei(gl.UNPACK_SKIP_ROWS, y);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, width, height, 0, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
    const found = new Uint8Array(width * height * 4);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, found);
    return gl.getError() === gl.NO_ERROR ? found : null; // the graphics card may have been lost
  };
}
